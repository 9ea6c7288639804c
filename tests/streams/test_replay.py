"""Replay over a log in memory: the labels of the contract, the same ones in any order of arrival, nothing guessed."""

from __future__ import annotations

import itertools
import random

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streams.contracts import Calibration, Feedback, ItemVector, Label, Recall, decode, encode
from streams.labels.joiner import Joiner, Source
from streams.replay.join import Requests
from streams.replay.log import LogError
from streams.replay.run import Replay, Result, Setup
from streams.replay.select import (
    Selection,
    Wanted,
    duration_ms,
    merged,
    moment_ms,
    offset_ranges,
    resolve,
    time_text,
)
from tests.streams.replay_world import EVERYTHING, FRAME, LABELS, SETTINGS, START, MemoryLog, World

WINDOW = int(LABELS.window_seconds * 1000)


def run(log: MemoryLog, selection: Selection = EVERYTHING) -> list[Result]:
    return list(Replay(log, selection, Setup.of(SETTINGS, FRAME)))


def said(results: list[Result]) -> dict[str, Label | str | None]:
    """What each request's label says of its items; not where its events lay in the log."""
    found: dict[str, Label | str | None] = {}
    for result in results:
        label = result.label
        if label is not None:
            label = replace_provenance(label)
        found[result.request.recall.request_id] = label or result.lost
    return found


def replace_provenance(label: Label) -> Label:
    placeless = msgspec.structs.replace(label.provenance, recall=(0, 0), feedback=[])
    return msgspec.structs.replace(label, provenance=placeless)


def shuffled(records: list[Recall | Feedback], seed: int, by_ms: int) -> list[Recall | Feedback]:
    """Arrival out of order, each record at most so much later than its time."""
    rng = random.Random(seed)
    return [r for _, _, r in sorted((r.ts + rng.uniform(0, by_ms), n, r) for n, r in enumerate(records))]


@given(seed=st.integers(0, 50), order=st.integers(0, 10_000))
def test_the_order_of_arrival_changes_nothing_but_offsets(seed: int, order: int):
    ordered, mixed = World(seed), World(seed)
    records = ordered.events()
    assert mixed.events() == records
    ordered.send(records)
    # Later than the lateness, not later than what is retained: those are corrections, and part of the last revision.
    mixed.send(shuffled(records, order, int((LABELS.allowed_lateness_seconds + LABELS.retention_seconds) * 1000)))
    assert said(run(mixed.log)) == said(run(ordered.log))


@given(seed=st.integers(0, 50), order=st.integers(0, 10_000))
def test_a_request_joins_what_the_joiner_of_the_whole_log_joins(seed: int, order: int):
    world = World(seed)
    world.send(shuffled(world.events(), order, 15_000))
    joiner = Joiner(WINDOW, 10**12)
    for partition in world.log.partitions("recalls"):
        for entry in world.log.read("feedback", partition):
            joiner.add_feedback(decode(Feedback, entry.value or b""), Source(entry.offset, entry.kafka_ms))
        for entry in world.log.read("recalls", partition):
            joiner.add_recall(decode(Recall, entry.value or b""), Source(entry.offset, entry.kafka_ms))
    expected = {joined.recall.request_id: joined.exposed for joined in joiner.close(10**15)}
    results = run(world.log)
    assert {r.request.recall.request_id: r.request.joined[0].exposed for r in results} == expected


def test_twice_gives_identical_bytes_in_the_order_of_the_recalls():
    world = World(1)
    world.send(shuffled(world.events(40), 3, 15_000))
    first, second = run(world.log), run(world.log)
    assert [encode(r.label) for r in first if r.label] == [encode(r.label) for r in second if r.label]
    places = [(r.request.partition, r.request.offset) for r in first]
    assert places == sorted(places)
    assert len(places) == 40


@given(low=st.integers(0, 39), high=st.integers(0, 39))
def test_a_range_gives_the_labels_that_the_whole_log_gives(low: int, high: int):
    world = World(2)
    world.send(shuffled(world.events(40), 5, 15_000))
    low, high = sorted((low, high + 1))
    from_ms, to_ms = START + 1_000 + low * 3_000, START + 1_000 + high * 3_000
    expected = {r.request.recall.request_id: r.label for r in run(world.log) if from_ms <= r.request.recall.ts < to_ms}
    chosen = run(world.log, Selection(from_ms, to_ms))
    assert {r.request.recall.request_id: r.label for r in chosen} == expected
    assert len(chosen) == len(expected) == high - low


def test_a_user_and_offsets_choose_and_change_no_label():
    world = World(3)
    world.send(shuffled(world.events(40), 6, 15_000))
    whole = {r.request.recall.request_id: r for r in run(world.log)}
    user = world.users[1]
    mine = run(world.log, Selection(EVERYTHING.from_ms, EVERYTHING.to_ms, user))
    assert {r.request.recall.request_id for r in mine} == {
        name for name, r in whole.items() if r.request.recall.user_id == user
    }
    assert all(r.label == whole[r.request.recall.request_id].label for r in mine)

    some = resolve(world.log, Wanted(offsets=offset_ranges("0:2-5")), LABELS)
    chosen = run(world.log, some)
    assert [(r.request.partition, r.request.offset) for r in chosen] == [(0, n) for n in (2, 3, 4, 5)]
    assert all(r.label == whole[r.request.recall.request_id].label for r in chosen)

    event = next(world.log.read("feedback", 1, 7))
    joined = run(world.log, resolve(world.log, Wanted(offsets=offset_ranges("1:7"), topic="feedback"), LABELS))
    holders = {n for n, r in whole.items() if r.request.partition == 1 and 7 in r.request.joined[0].feedback_offsets}
    assert {r.request.recall.request_id for r in joined} == holders, event

    world.record()
    label = next(world.log.read("labels", 0, 3))
    by_label = run(world.log, resolve(world.log, Wanted(offsets=offset_ranges("0:3"), topic="labels"), LABELS))
    assert [r.request.recall.request_id for r in by_label] == [dict(label.headers)["gpl-request-id"].decode()]


def test_the_last_hour_counts_back_from_the_newest_recall():
    world = World(4)
    world.send(world.events(20, 60_000))
    found = resolve(world.log, Wanted(last_ms=5 * 60_000), LABELS)
    assert {r.request.recall.request_id for r in run(world.log, found)} == {f"r{n}" for n in range(14, 20)}


def test_a_refused_recall_of_the_future_is_not_the_newest():
    world = World(4)
    world.send([*world.events(20, 60_000), Recall("far", "user-0", 253_402_300_000_000, ["item-1"])])
    found = resolve(world.log, Wanted(last_ms=5 * 60_000), LABELS)
    assert {r.request.recall.request_id for r in run(world.log, found)} == {f"r{n}" for n in range(14, 20)}


def test_the_newest_recall_is_found_before_a_long_tail_that_is_refused():
    world = World(4)
    world.send(world.events(20, 60_000))
    for _ in range(300):
        world.log.put("recalls", "user-0", b"{not json")
        world.log.put("recalls", "user-1", b"{not json")
    found = resolve(world.log, Wanted(last_ms=5 * 60_000), LABELS)
    assert len(run(world.log, found)) == 6


def test_malformed_records_and_those_from_the_future_or_under_another_key_are_counted_and_label_nothing():
    world = World(5)
    world.log.put("recalls", "user-0", b"{not json")
    far = Recall("far", "user-0", START + 10**9, ["item-1"])
    world.log.put("recalls", "user-1", encode(Recall("astray", "user-0", START, ["item-1"])))
    world.send([far, *world.events(6)])
    replay = Replay(world.log, EVERYTHING, Setup.of(SETTINGS, FRAME))
    assert {r.request.recall.request_id for r in replay} == {f"r{n}" for n in range(6)}
    assert replay.progress.refused["recalls"] == 3


def test_a_recall_that_comes_when_its_retention_is_over_is_refused_and_changes_no_other_label():
    world, alone = World(6), World(6)
    records = world.events(20)
    assert alone.events(20) == records
    recalls = [record for record in records if isinstance(record, Recall)]
    over = int((LABELS.window_seconds + LABELS.retention_seconds + LABELS.allowed_lateness_seconds) * 1000)
    late = msgspec.structs.replace(recalls[-1], request_id="late", ts=recalls[-1].ts - over - 1_000)
    alone.send(records)
    world.send([*records, late])
    replay = Replay(world.log, EVERYTHING, Setup.of(SETTINGS, FRAME))
    assert said(list(replay)) == said(run(alone.log))
    assert replay.progress.refused["recalls"] == 1


def test_requests_whose_window_the_log_does_not_end_are_known():
    world = World(6)
    world.send(world.events(10))
    replay = Replay(world.log, EVERYTHING, Setup.of(SETTINGS, FRAME))
    over = {r.request.recall.request_id for r in replay if r.request.over}
    assert replay.open | over == {f"r{n}" for n in range(10)}
    assert "r9" in replay.open and "r0" in over


def test_what_is_retained_stays_small_however_long_the_log_is():
    world = World(7)
    world.send(world.events(300))
    replay = Replay(world.log, EVERYTHING, Setup.of(SETTINGS, FRAME))
    requests = Requests(world.log, 0, EVERYTHING, replay.starts(0), [LABELS])
    held = [requests.retained for _ in requests]
    assert len(held) > 80
    # 32 s of window and retention and 2 s of lateness, a request every 3 s; each counts for joining and for its turn.
    assert max(held) <= 2 * 12


# --- anchors that the log no longer has ------------------------------------------------------------------------------


def refreshed(versions: list[int]) -> World:
    """One user, a refresh every 10 s, a request 5 s after each."""
    world = World(8, users=1)
    for n, version in enumerate(versions, start=1):
        world.put_anchors("user-0", START + 10_000 * n, version)
    world.send(
        [Recall(f"r{n}", "user-0", START + 10_000 * n + 5_000, world.items[:8]) for n in range(len(versions) + 1)]
    )
    return world


def test_every_version_in_the_log_is_found_as_of_its_time():
    results = run(refreshed([2, 3, 4]).log)
    assert [r.label.provenance.anchors_version for r in results if r.label] == [1, 2, 3, 4]


def test_compacted_anchors_are_named_and_never_replaced_by_others():
    world = refreshed([2, 3, 4])
    world.log.compact("user-anchors")
    results = run(world.log)
    assert [r.label is None for r in results] == [True, True, True, False]
    assert all("compacted away" in (r.lost or "") for r in results[:3])
    assert results[3].label is not None and results[3].label.provenance.anchors_version == 4


def test_numbers_that_skip_in_a_log_without_holes_are_no_loss():
    results = run(refreshed([7, 9]).log)
    assert [r.label.provenance.anchors_version for r in results if r.label] == [1, 7, 9]


def test_a_user_whose_first_refresh_is_the_only_one_had_none_before_it():
    world = World(9, users=1)
    world.log.compact("user-anchors")
    world.put_anchors("user-9", START + 50_000, 1)
    world.send([Recall("early", "user-9", START + 1_000, world.items[:5])])
    (result,) = run(world.log)
    assert result.label is not None and result.label.outcome == "no_anchors"


def test_removed_anchors_are_named():
    world = World(10, users=1)
    world.send([Recall("r", "user-0", START + 1_000, world.items[:5])])
    world.log.put("user-anchors", "user-0", None)
    (result,) = run(world.log)
    assert result.label is None and "removed" in (result.lost or "")


def test_calibrations_and_item_vectors_are_those_of_the_log():
    world = World(11, users=1)
    world.put_calibration(Calibration("cal-2", START + 20_000, "platt", 1.0, 0.0, 5))
    world.put_item("item-0", None)
    times = {"r0": START + 15_000, "r1": START + 25_000}
    world.send([Recall(name, "user-0", ts, ["item-0", "item-1"]) for name, ts in times.items()])
    labels = {r.request.recall.request_id: r.label for r in run(world.log) if r.label}
    assert [labels[name].provenance.calibration for name in ("r0", "r1")] == ["cal-1", "cal-2"]
    assert labels["r0"].unexposed.item == ["item-1"]
    assert labels["r0"].provenance.unknown == 1


def test_state_that_production_passes_over_is_passed_over():
    world, sound = World(11, users=1), World(11, users=1)
    for each in (world, sound):
        each.send([Recall("r", "user-0", START + 1_000, ["item-0", "item-1", "item-x"])])
    world.put_calibration(Calibration("cal-2", 5, "isotonic", scores=[0.1, 0.2], labels=[0.5]))
    for item in ("item-0", "item-x"):
        record = ItemVector(item, b"", [0] * FRAME.levels, "content", FRAME.encoder, FRAME.quantiser)
        world.log.put("item-vectors", item, encode(record))
    assert said(run(world.log)) == said(run(sound.log))
    replay = Replay(world.log, EVERYTHING, Setup.of(SETTINGS, FRAME))
    assert list(replay.calibrations.by_version) == ["cal-1"]
    assert len(replay.items.versions("item-0")) == 1 and not replay.items.versions("item-x")


# --- what a range may be said as -------------------------------------------------------------------------------------


def test_times_durations_and_offsets_are_read():
    assert moment_ms("1998-03-01T12:00") == moment_ms("1998-03-01T12:00+00:00") == 888753600000
    assert moment_ms("888753600000") == 888753600000
    assert [duration_ms(text) for text in ("90s", "15m", "2h", "1d", "1w", "250ms")] == [
        90_000,
        900_000,
        7_200_000,
        86_400_000,
        604_800_000,
        250,
    ]
    assert offset_ranges("2:100-200, 3:7,10-20") == {2: [(100, 200)], 3: [(7, 7)], None: [(10, 20)]}
    assert time_text(888753600000) == "1998-03-01 12:00:00.000Z"


@pytest.mark.parametrize("text", ["", "yesterday", "5 fortnights", "1:2:3", "9-3", "9" * 400 + "d"])
def test_what_cannot_be_read_is_refused_with_its_text(text: str):
    for read in (duration_ms, moment_ms, offset_ranges):
        with pytest.raises(ValueError, match="is no"):
            read(text)


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 5))))
def test_merged_ranges_hold_the_same_offsets(pairs):
    ranges = [(first, first + more) for first, more in pairs]
    result = merged(ranges)
    assert {n for a, b in result for n in range(a, b + 1)} == {n for a, b in ranges for n in range(a, b + 1)}
    assert all(b + 1 < c for (_, b), (c, _) in itertools.pairwise(result))


def test_a_range_that_names_nothing_is_refused():
    world = World(12)
    with pytest.raises(LogError, match="empty"):
        resolve(world.log, Wanted(from_ms=10, to_ms=10), LABELS)
    with pytest.raises(LogError, match="no recall"):
        resolve(world.log, Wanted(last_ms=10), LABELS)
    with pytest.raises(LogError, match="partition 9"):
        resolve(world.log, Wanted(offsets=offset_ranges("9:1-2")), LABELS)
    with pytest.raises(LogError, match="expired"):
        resolve(world.log, Wanted(offsets=offset_ranges("0:1000-2000")), LABELS)
