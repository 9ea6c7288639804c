"""Each way in which a label can come to differ, made to happen alone and together, and found under its own name."""

from __future__ import annotations

import gzip
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from streams.contracts import Calibration, Feedback, Label, Recall, encode
from streams.replay.capture import CaptureLog, CaptureWriter
from streams.replay.compare import Comparison, compare
from streams.replay.log import Log, LogError
from streams.replay.output import LABELS as LABELS_FILE
from streams.replay.output import Files, Nowhere
from streams.replay.record import capture
from streams.replay.run import Replay, Setup
from streams.replay.select import Selection, Wanted, resolve
from streams.replay.values import Value, distance, kind, move
from streams.replay.whatif import WhatIfError, what_if
from tests.streams.replay_world import EVERYTHING, FRAME, LABELS, SETTINGS, START, World, unit


def compared(log: Log, *changes: str, selection: Selection = EVERYTHING) -> Comparison:
    asked = what_if(SETTINGS, changes)
    beside = [Setup.of(SETTINGS, FRAME)] if changes else []
    return compare(Replay(log, selection, Setup.of(asked.settings, FRAME), *beside), Nowhere(), top=50)


@pytest.fixture
def world() -> World:
    world = World(1)
    world.send(world.events(30))
    world.record()
    return world


def causes(found: Comparison) -> dict[str, int]:
    return {cause: group.requests for cause, group in found.groups.items()}


def test_an_unchanged_log_is_identical(world: World):
    found = compared(world.log)
    assert (found.requests, found.identical, found.changed, found.moved) == (30, 30, 0, 0)
    assert not found.groups and not found.only_recorded.reasons and not found.only_replayed.reasons


def test_a_late_refresh_is_the_anchors(world: World):
    world.put_anchors("user-1", START + 20_000, 2)
    found = compared(world.log)
    assert set(causes(found)) == {"anchors"}
    group = found.groups["anchors"]
    assert list(group.details) == ["version 1 then, version 2 now"]
    assert found.reproduced == found.changed == group.requests > 0
    assert {ranked.user_id for ranked in group.biggest()} == {"user-1"}
    sizes = [ranked.move.size for ranked in group.biggest()]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] == group.largest


def test_a_refresh_made_anew_under_the_same_number_is_the_anchors(world: World):
    world.put_anchors("user-1", START, 1)
    found = compared(world.log)
    assert causes(found).keys() == {"anchors"}
    assert list(found.groups["anchors"].details) == ["version 1 then, version 1 now, which says something else"]
    assert found.reproduced == found.changed > 0


def test_a_late_calibration_is_the_calibration(world: World):
    world.put_calibration(Calibration("cal-2", START + 40_000, "platt", 4.0, -2.0, 10))
    found = compared(world.log)
    assert causes(found).keys() == {"calibration"}
    assert list(found.groups["calibration"].details) == ["cal-1 then, cal-2 now"]
    assert found.reproduced == found.changed > 0
    assert found.identical > 0  # those before it


def test_a_calibration_that_says_something_else_under_its_old_name_is_found_by_what_it_did(world: World):
    world.put_calibration(Calibration("cal-1", 0, "platt", 4.0, -2.0, 10))
    found = compared(world.log)
    assert causes(found).keys() == {"calibration"}
    assert "says something else now" in next(iter(found.groups["calibration"].details))


def test_a_changed_item_vector_is_the_catalogue(world: World):
    world.put_item("item-3", unit(world.rng, 1)[0])
    found = compared(world.log)
    assert causes(found).keys() == {"catalogue"}
    group = found.groups["catalogue"]
    assert {ranked.move.item for ranked in group.biggest()} == {"item-3"}
    assert found.reproduced == found.changed == group.requests == group.labels > 0
    assert "item-3" in next(iter(group.details))


def test_items_that_came_and_went_are_the_catalogue(world: World):
    world.put_item("ghost", unit(world.rng, 1)[0])
    world.put_item("item-4", None)
    found = compared(world.log)
    assert causes(found).keys() == {"catalogue"}
    kinds = found.groups["catalogue"].kinds
    assert kinds["appeared"] == 30
    assert kinds["vanished"] > 0
    assert found.reproduced == found.changed


def test_a_vector_of_before_that_was_compacted_away_is_the_catalogue_by_elimination(world: World):
    world.put_item("item-3", unit(world.rng, 1)[0])
    world.log.compact("item-vectors")
    found = compared(world.log)
    assert causes(found).keys() == {"catalogue"}
    assert {ranked.move.item for ranked in found.groups["catalogue"].biggest()} == {"item-3"}


def test_feedback_later_than_all_retention_is_the_feedback():
    world = World(1)
    records = world.events(30)
    late = [r for r in records if isinstance(r, Feedback) and r.kind == "click"][:2]
    world.send([r for r in records if r not in late])
    # Recorded while the clicks had not come; in the log of the replay they came in time.
    recorded = world.record()
    whole = World(1)
    whole.send(whole.events(30))
    for label in recorded:
        whole.log.put("labels", label.user_id, encode(label), [("gpl-request-id", label.request_id.encode())])
    found = compared(whole.log)
    assert "feedback" in causes(found)
    changed = {ranked.request_id for ranked in found.groups["feedback"].biggest()}
    assert changed <= {event.request_id for event in late} and changed
    assert found.groups["feedback"].kinds.keys() <= {"exposed", "clicked"}


@pytest.mark.parametrize(
    ("change", "detail"),
    [
        ("labels.matching=kernel", "labels.matching: max then, kernel now"),
        ("labels.history=false", "labels.history: True then, False now"),
        ("window=1.2", "labels.window_seconds: 10.0 then, 1.2 now"),
    ],
)
def test_another_setting_is_the_configuration(world: World, change: str, detail: str):
    found = compared(world.log, change)
    assert causes(found).keys() == {"configuration"}
    assert list(found.groups["configuration"].details) == [detail]
    assert found.reproduced == found.changed > 0


def test_settings_that_change_no_label_leave_it_identical(world: World):
    found = compared(world.log, "labels.kernel_tau=0.3")  # of the kernel, which is not used
    assert (found.identical, found.changed) == (30, 0)


def test_another_code_is_named_when_every_input_is_the_same():
    world = World(1)
    world.send(world.events(12))
    world.record()
    for at, entries in world.log.entries.items():
        if at[0] == "labels":
            world.log.entries[at] = [_other_code(entry) for entry in entries]
    found = compared(world.log)
    assert causes(found).keys() == {"code version"}
    assert "older then" in next(iter(found.groups["code version"].details))


def _other_code(entry: Any) -> Any:
    """The label as other code made it: every confidence halved."""
    label = msgspec.json.decode(entry.value, type=Label)
    halved = msgspec.structs.replace(label.unexposed, confidence=[c / 2 for c in label.unexposed.confidence])
    provenance = msgspec.structs.replace(label.provenance, code="older")
    return replace(entry, value=encode(msgspec.structs.replace(label, unexposed=halved, provenance=provenance)))


def test_rounding_of_another_machine_is_named():
    world = World(1)
    world.send(world.events(12))
    world.record()
    for at, entries in world.log.entries.items():
        if at[0] == "labels":
            for n, entry in enumerate(entries):
                label = msgspec.json.decode(entry.value, type=Label)
                score = [s + 1e-6 for s in label.unexposed.score]
                other = msgspec.structs.replace(label, unexposed=msgspec.structs.replace(label.unexposed, score=score))
                entries[n] = replace(entry, value=encode(other))
    assert causes(compared(world.log)).keys() == {"numerics"}


def test_several_causes_at_once_each_get_the_labels_they_moved(world: World):
    world.put_item("item-3", unit(world.rng, 1)[0])
    world.put_anchors("user-1", START + 20_000, 2)
    found = compared(world.log)
    assert causes(found).keys() == {"catalogue", "anchors"}
    for ranked in found.groups["catalogue"].biggest():
        assert ranked.move.item == "item-3"
    assert {ranked.user_id for ranked in found.groups["anchors"].biggest()} == {"user-1"}
    assert found.reproduced == found.changed


def test_anchors_of_then_that_are_gone_are_said_to_be_gone():
    world = World(1, users=1)
    world.send([Recall("r", "user-0", START + 50_000, world.items[:8])])
    world.record()
    world.put_anchors("user-0", START + 20_000, 2)
    world.log.compact("user-anchors")
    found = compared(world.log)
    assert causes(found) == {"anchors": 1}
    assert "not in the log any more" in next(iter(found.groups["anchors"].details))
    assert found.reproduced == 0


def test_labels_on_one_side_are_listed_with_the_reason():
    world = World(1)
    events = world.events(20)
    world.send(events)
    world.record()
    late = Recall("never labelled", "user-1", START + 30_000, world.items[:3])
    open_ = Recall("open", "user-1", START + 90_000, world.items[:3])
    refused = Recall("refused", "user-1", START + 40_000, world.items[:3])
    world.send([late, open_, refused])
    recalls = [entry for p in (0, 1) for entry in world.log.read("recalls", p)]
    (at,) = [entry for entry in recalls if b"refused" in (entry.value or b"")]
    world.log.put(
        "dead-letters",
        "user-1",
        at.value,
        [
            ("gpl-topic", b"gpl.recalls"),
            ("gpl-partition", str(at.partition).encode()),
            ("gpl-offset", str(at.offset).encode()),
            ("gpl-message", b"too large"),
        ],
    )
    # One recall expires.
    key = ("recalls", 0)
    gone = world.log.entries[key].pop(0)
    found = compared(world.log)
    why = {one.request_id: one.why for one in found.only_replayed.listed}
    assert why.keys() == {"never labelled", "open", "refused"}
    assert "behind" in why["never labelled"]
    assert "window is not over" in why["open"]
    assert why["refused"] == "its recall is a dead letter: too large"
    (left,) = found.only_recorded.listed
    assert left.request_id.encode() in (gone.value or b"")


@pytest.mark.parametrize(
    ("change", "newest_ms", "why"),
    [
        ("labels.window_seconds=5", 7_500, "its window is not over on the log"),
        ("labels.allowed_lateness_seconds=0", 11_000, "its window is not over on the log"),
        ("labels.window_seconds=30", 15_000, "the labels role is behind"),
    ],
)
def test_a_label_is_missing_for_what_production_waits_for_whatever_is_set(change: str, newest_ms: int, why: str):
    """Production's window is 10 s, its allowed lateness 2 s."""
    world, newest = World(1, users=1), START + newest_ms
    click = Feedback("e", "user-0", "item-0", newest, "click")
    world.send([Recall("r", "user-0", START, ["item-1"]), Recall("newest", "user-0", newest, ["item-1"]), click])
    found = compared(world.log, change)
    assert why in {one.request_id: one.why for one in found.only_replayed.listed}["r"]


def test_not_replayable_requests_are_listed():
    world = World(1, users=1)
    world.put_anchors("user-0", START + 1_000, 2)
    world.send([Recall("r", "user-0", START + 1_500, world.items[:8])])
    world.record()
    world.put_anchors("user-0", START + 50_000, 3)
    world.log.compact("user-anchors")
    found = compared(world.log)
    assert found.requests == 0
    assert [one.request_id for one in found.not_replayable.listed] == ["r"]
    assert not found.only_recorded.reasons  # it is listed once


# --- captures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "selection",
    [
        EVERYTHING,
        Selection(START + 20_000, START + 60_000),
        Selection(START + 20_000, START + 60_000, "user-1"),
        Selection(0, START + 60_000, None, {0: [(1, 5)], 1: [(2, 4)]}),
    ],
    ids=["all", "range", "user", "offsets"],
)
def test_a_capture_gives_the_bytes_and_the_comparison_of_its_log(world: World, selection: Selection, tmp_path: Path):
    world.put_item("item-3", unit(world.rng, 1)[0])
    world.put_anchors("user-1", START + 20_000, 2)
    world.log.put("recalls", "user-1", b"\xff not json")
    setup = Setup.of(SETTINGS, FRAME)
    manifest = capture(world.log, selection, SETTINGS, tmp_path / "cap", Replay(world.log, selection, setup))
    captured = CaptureLog(tmp_path / "cap")
    assert captured.settings().labels == SETTINGS.labels
    for name, log in (("log", world.log), ("captured", captured)):
        files = Files(tmp_path / name)
        found = compare(Replay(log, selection, setup), files, top=50)
        files.finish({})
        assert found.requests == manifest.requests
        # A capture holds the labels of the range only.
        (tmp_path / f"{name}.txt").write_text(repr(replace(found, recorded_read=0)))
    assert (tmp_path / "log" / LABELS_FILE).read_bytes() == (tmp_path / "captured" / LABELS_FILE).read_bytes()
    assert (tmp_path / "log.txt").read_text() == (tmp_path / "captured.txt").read_text()
    capture(world.log, selection, SETTINGS, tmp_path / "again", Replay(world.log, selection, setup))
    for path in (tmp_path / "cap").iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()
    if selection.user is not None:
        text = b"".join(_plain(path) for path in (tmp_path / "cap").glob("*.gz"))
        assert b"user-1" in text and b"user-2" not in text


def _plain(path: Path) -> bytes:
    return gzip.decompress(path.read_bytes())


def test_a_capture_keeps_headers_as_they_were(world: World, tmp_path: Path):
    (label, *_) = list(world.log.read("labels", world.log.partitions("labels")[0]))
    headers = (*label.headers, ("trace", None), ("trace", b"\xff"), ("trace", b""))
    writer = CaptureWriter(tmp_path / "kept")
    span = world.log.span("labels", label.partition)
    writer.add(replace(label, headers=headers), span)
    writer.add(replace(label, offset=label.offset + 1, value=b'{"a":' * 10**5), span)
    about = CaptureLog(captured(world, tmp_path)).manifest
    writer.finish(**{n: getattr(about, n) for n in about.__struct_fields__ if n not in ("format", "files")})
    first, second = CaptureLog(tmp_path / "kept").read("labels", label.partition)
    assert first.headers == headers
    assert second.value == b'{"a":' * 10**5


def captured(world: World, tmp_path: Path) -> Path:
    setup = Setup.of(SETTINGS, FRAME)
    capture(world.log, EVERYTHING, SETTINGS, tmp_path / "cap", Replay(world.log, EVERYTHING, setup))
    return tmp_path / "cap"


@pytest.mark.parametrize("user", [None, "user-1"])
def test_the_last_minute_of_a_capture_of_an_older_range_counts_from_its_newest_recall(
    world: World, user: str | None, tmp_path: Path
):
    world.send([Recall(f"y{k}", "user-0", START + 400_000 + k * 100, ["item-3"]) for k in range(300)])
    world.send([Recall(f"z{k}", "user-1", START + 400_000 + k * 100, ["item-3"]) for k in range(300)])
    chosen = Selection(START, START + 60_000, user)
    setup = Setup.of(SETTINGS, FRAME)
    capture(world.log, chosen, SETTINGS, tmp_path / "cap", Replay(world.log, chosen, setup))
    log = CaptureLog(tmp_path / "cap")
    every = [result.request.recall.ts for result in Replay(log, log.selection(), setup)]
    found = resolve(log, Wanted(last_ms=30_000), LABELS, log.selection())
    last = [result.request.recall.ts for result in Replay(log, found, setup)]
    assert 0 < len(last) < len(every)
    assert sorted(last) == sorted(ts for ts in every if ts >= max(every) - 30_000)


@pytest.mark.parametrize(
    ("name", "value"), [("window_seconds", 1), ("allowed_lateness_seconds", 0), ("retention_seconds", 5)]
)
def test_a_capture_answers_smaller_settings_as_its_log_does(world: World, tmp_path: Path, name: str, value: float):
    chosen = Selection(START + 20_000, START + 60_000)
    capture(world.log, chosen, SETTINGS, tmp_path / "cap", Replay(world.log, chosen, Setup.of(SETTINGS, FRAME)))
    log = CaptureLog(tmp_path / "cap")
    smaller = LABELS.model_copy(update={name: value})
    log.check(smaller)
    setup = Setup.of(SETTINGS.model_copy(update={"labels": smaller}), FRAME)
    labels, expected = ([result.label for result in Replay(one, chosen, setup)] for one in (log, world.log))
    assert labels == expected and len(labels) > 10


def test_a_capture_of_no_request_is_refused_and_leaves_nothing(world: World, tmp_path: Path):
    chosen = Selection(0, START)
    with pytest.raises(LogError, match="no request"):
        capture(world.log, chosen, SETTINGS, tmp_path / "cap", Replay(world.log, chosen, Setup.of(SETTINGS, FRAME)))
    assert not list(tmp_path.iterdir())


def test_a_damaged_capture_is_refused(world: World, tmp_path: Path):
    capture(world.log, EVERYTHING, SETTINGS, tmp_path / "cap", Replay(world.log, EVERYTHING, Setup.of(SETTINGS, FRAME)))
    path = tmp_path / "cap" / "recalls-0.jsonl.gz"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"recalls-0\.jsonl\.gz is damaged"):
        CaptureLog(tmp_path / "cap")


# --- settings that can be asked for ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("labels.window_seconds", "KEY=VALUE"),
        ("labels.window_seconds=-1", "greater than 0"),
        ("labels.matching=nearest", "'max' or 'kernel'"),
        ("generator.beams=20", "others need the language model"),
        ("labels.idle_timeout_wall_seconds=3", "when a label is published"),
        ("labels.colour=3", "no such setting"),
        ("trainer.temperature=0", "greater than 0"),
        ("trainer.batch_records=3", "the same batches"),
        ("kafka.partitions=3", "--config"),
    ],
)
def test_what_replay_cannot_answer_is_refused_with_the_reason(change: str, message: str):
    with pytest.raises(WhatIfError, match=message):
        what_if(SETTINGS, [change])


def test_short_names_stand_for_settings():
    asked = what_if(SETTINGS, ["window=5", "lambda=0.25", "threshold=0.9"])
    assert asked.settings.labels.window_seconds == 5
    assert asked.settings.trainer.pseudo_weight == 0.25
    assert asked.settings.profiles.drift_threshold == 0.9


def test_moves():
    shown, clicked = Value(True, 0.5, 0.0, None), Value(True, 0.4, 1.0, None)
    low, high = Value(False, 0.1, 0.2, 0.5), Value(False, 0.3, 0.4, 0.1)
    assert (move(low, high), kind(low, high)) == (pytest.approx(0.4), "moved")
    assert (move(low, clicked), kind(low, clicked)) == (pytest.approx(0.8), "exposed")
    assert (move(shown, clicked), kind(shown, clicked)) == (1.0, "clicked")
    assert (move(None, high), kind(None, high)) == (0.4, "appeared")
    assert (move(low, None), kind(low, None)) == (0.2, "vanished")
    other = shown._replace(score=0.7)
    assert (move(shown, other), kind(shown, other)) == (0.0, "score")
    assert distance(shown, other) == pytest.approx(0.2) and distance(shown, shown) == 0.0
    assert np.isfinite(distance(None, shown)) and distance(None, shown) > 0
