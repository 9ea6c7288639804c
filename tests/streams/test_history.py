"""History labelled offline: nothing depends on the order of arrival or the number of processes."""

from __future__ import annotations

import math
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import Result
from kafka.errors import KafkaError
from typer.testing import CliRunner

from gpl.artefacts import Artefacts
from gpl.catalogue import ItemContent
from gpl.fit import Event as PastEvent
from gpl.fit import FitOptions, fit
from streams.cli import app
from streams.contracts import Feedback, Item, Label, Recall, UserAnchors, decode, encode
from streams.fitting import catalogue_of, fit_directory
from streams.frame import Frame
from streams.history import backfill as work
from streams.history.backfill import BackfillError, backfill, is_complete, labels_in_order
from streams.history.partition import ANCHORS, LABELS, PROFILES, file_of, load_catalogue, partition_of, save_catalogue
from streams.history.pipeline import Event, Pipeline, in_event_time
from streams.kafka import RecordTooLargeError
from streams.profiles.state import Profile
from streams.settings import (
    GeneratorSettings,
    KafkaSettings,
    LabelSettings,
    ProfileSettings,
    Settings,
    TrainerSettings,
)
from streams.storage import LocalStorage, open_storage
from streams.trainer.checkpoint import CheckpointStore
from streams.trainer.trainer import Trainer

DIM, ITEMS, USERS, PARTITIONS = 12, 60, 15, 3
START, WINDOW = 1_700_000_000_000, 60
HOUR = 3_600_000


def items() -> list[Item]:
    rng = np.random.default_rng(7)
    centres = rng.normal(size=(6, DIM))
    vectors = centres[np.arange(ITEMS) % 6] + 0.4 * rng.normal(size=(ITEMS, DIM))
    return [Item(f"i{n}", "", embedding=vector.tolist()) for n, vector in enumerate(vectors)]


def events(requests: int = 200) -> list[Event]:
    """Users who keep to a group of items; a fifth of the feedback names no request."""
    rng = np.random.default_rng(3)
    found: list[Event] = []
    for n in range(requests):
        user = int(rng.integers(USERS))
        ts = START + n * 20_000
        candidates = [f"i{i}" for i in rng.choice(ITEMS, 20, replace=False)]
        found.append(Recall(f"r{n}", f"u{user}", ts, [*candidates, "ghost"]))
        for k, item in enumerate(candidates[:5]):
            named = f"r{n}" if k else None
            found.append(Feedback(f"e{n}-{k}", f"u{user}", item, ts + 1000 * k, "impression", named))
            if int(item[1:]) % 6 == user % 6:
                found.append(Feedback(f"c{n}-{k}", f"u{user}", item, ts + 1000 * k + 1, "click", named))
    return found


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    past = [PastEvent(f"past{u}", f"i{(u % 6) + 6 * k}", k, bool(k % 3)) for u in range(30) for k in range(10)]
    contents = [ItemContent(item.item_id, item.text, item.embedding) for item in items()]
    target = tmp_path_factory.mktemp("artefacts") / "fitted"
    fit(contents, past, None, FitOptions(generator="history"), seed=0).save(target)
    return target


@pytest.fixture
def settings(fitted: Path, tmp_path: Path) -> Settings:
    return Settings(
        artefacts=fitted,
        kafka=KafkaSettings(partitions=PARTITIONS),
        labels=LabelSettings(window_seconds=WINDOW),
        profiles=ProfileSettings(min_interval_seconds=60, drift_threshold=0.2),
        trainer=TrainerSettings(checkpoints=tmp_path / "checkpoints", dim=4, batch_records=8),
    )


@pytest.fixture
def data(tmp_path: Path) -> Path:
    directory = tmp_path / "data"
    directory.mkdir()
    found = events()
    random.Random(5).shuffle(found)
    for name, kind, lines in (
        ("items", Item, items()),
        ("recalls", Recall, found),
        ("feedback", Feedback, found),
    ):
        text = b"".join(encode(line) + b"\n" for line in lines if isinstance(line, kind))
        (directory / f"{name}.jsonl").write_bytes(text + b"not a record\n")
    return directory


def run_command(settings: Settings, *arguments: str) -> Result:
    """``gpl backfill`` under these settings."""
    return CliRunner().invoke(
        app,
        ["backfill", "--processes", "1", *arguments],
        env={
            "GPL_ARTEFACTS": str(settings.artefacts),
            "GPL_KAFKA__PARTITIONS": str(PARTITIONS),
            "GPL_LABELS__WINDOW_SECONDS": str(WINDOW),
            "GPL_TRAINER__CHECKPOINTS": str(settings.trainer.checkpoints),
            "GPL_TRAINER__DIM": "4",
        },
    )


def pipeline(settings: Settings, period_ms: int | None = None) -> Pipeline:
    artefacts = Artefacts.load(settings.artefacts)
    return Pipeline(settings, artefacts, catalogue_of(items(), artefacts, settings.space), 0, period_ms)


def test_labels_do_not_depend_on_the_order_of_arrival(settings: Settings) -> None:
    numbered = list(enumerate(events()))
    in_order = list(pipeline(settings).run(in_event_time(numbered)))
    random.Random(1).shuffle(numbered)
    assert list(pipeline(settings).run(in_event_time(numbered))) == in_order
    assert sorted(label.request_id for label in in_order) == sorted(f"r{n}" for n in range(200))
    assert {label.outcome for label in in_order} == {"labelled", "no_anchors"}
    assert all(label.provenance.unknown == 1 for label in in_order)


def test_anchors_in_force_are_never_of_the_future(settings: Settings) -> None:
    run = pipeline(settings)
    labels = list(run.run(in_event_time(enumerate(events()))))
    made = {(anchors.user_id, anchors.ts): anchors for anchors in run.answers}
    clicks = [event for event in events() if isinstance(event, Feedback) and event.kind == "click"]
    for label in labels:
        at = label.provenance.anchors_ts
        if at is None:
            continue
        assert at <= label.ts and (label.user_id, at) in made
        assert not any(u == label.user_id and at < ts <= label.ts for u, ts in made)
        # And they were made from the clicks up to then.
        known = [c.item_id for c in clicks if c.user_id == label.user_id and c.ts <= at]
        assert made[label.user_id, at].history == known[-50:]
    assert run.refreshes["cold"] and run.refreshes["drift"] and sum(run.refreshes.values()) == len(run.answers)


def test_a_timetable_refreshes_who_clicked_at_its_times_only(settings: Settings) -> None:
    run = pipeline(settings, period_ms=HOUR // 4)
    list(run.run(in_event_time(enumerate(events()))))
    assert run.answers and all(anchors.ts % (HOUR // 4) == 0 for anchors in run.answers)
    clicks = [event for event in events() if isinstance(event, Feedback) and event.kind == "click"]
    for anchors in run.answers:
        since = anchors.ts - (HOUR // 4 if anchors.version > 1 else 10**15)
        assert any(c.user_id == anchors.user_id and since <= c.ts < anchors.ts for c in clicks)
        assert len(anchors.history) == min(50, sum(c.user_id == anchors.user_id and c.ts < anchors.ts for c in clicks))
    assert len({(anchors.user_id, anchors.ts) for anchors in run.answers}) == len(run.answers)


def test_the_outcome_is_the_same_for_any_number_of_processes(settings: Settings, data: Path, tmp_path: Path) -> None:
    outcomes, weights = [], []
    for processes in (1, 2):
        own = settings.trainer.model_copy(update={"checkpoints": tmp_path / f"checkpoints-{processes}"})
        mine = settings.model_copy(update={"trainer": own})
        out = tmp_path / f"out-{processes}"
        outcome = backfill(data, out, mine, processes, False, lambda _: None)
        assert outcome.labels == 200 and outcome.users > 0
        outcomes.append([file_of(out, kind, p).read_bytes() for kind in (LABELS, ANCHORS, PROFILES) for p in range(3)])
        checkpoint = CheckpointStore(own.checkpoints, 3).load_newest()
        assert checkpoint is not None and checkpoint.step == 25 and checkpoint.positions == {}
        weights.append(checkpoint.tensors["model"])
        with pytest.raises(BackfillError, match="has checkpoints"):
            backfill(data, tmp_path / "again", mine, 1, False, lambda _: None)
    assert outcomes[0] == outcomes[1]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
    # Every user's records are where the topics would have them, with the newest anchors.
    for p in range(PARTITIONS):
        for line in file_of(tmp_path / "out-1", LABELS, p).read_bytes().splitlines():
            label = decode(Label, line)
            assert label.provenance.recall[0] == p == partition_of(label.user_id, PARTITIONS)


def test_a_trainer_and_a_profile_go_on_from_it(settings: Settings, data: Path, tmp_path: Path) -> None:
    done = run_command(settings, str(data), "--out", str(tmp_path / "out"))
    assert done.exit_code == 0, done.output
    artefacts = Artefacts.load(settings.artefacts)
    frame = Frame.of(artefacts)
    catalogue = load_catalogue(tmp_path / "out" / "catalogue.npz")
    checkpoint = CheckpointStore(settings.trainer.checkpoints, 3).load_newest()
    assert checkpoint is not None
    trainer = Trainer(settings.trainer, frame, catalogue)
    trainer.restore(checkpoint)
    assert trainer.records == 200
    again = list(labels_in_order(tmp_path / "out", PARTITIONS))
    assert [label.ts for label in again] == sorted(label.ts for label in again)
    trainer.step(again[:8])  # the same labels from the log: known already
    assert trainer.records == 200
    for p in range(PARTITIONS):
        anchors = [
            decode(UserAnchors, line) for line in file_of(tmp_path / "out", ANCHORS, p).read_bytes().splitlines()
        ]
        profiles = {
            profile.user_id: profile
            for line in file_of(tmp_path / "out", PROFILES, p).read_bytes().splitlines()
            for profile in [decode(Profile, line)]
        }
        for made in anchors:
            assert profiles[made.user_id].sequence == made.version and not profiles[made.user_id].pending


def test_items_that_the_stream_would_refuse_are_passed_over(settings: Settings, data: Path, tmp_path: Path) -> None:
    path = data / "items.jsonl"
    vector = items()[0].embedding
    bad = [Item("blank", " "), Item("short", "", embedding=[1.0, 2.0]), Item("i3", "", embedding=vector)]
    lines = [encode(item) + b"\n" for item in bad]
    path.write_bytes(lines[0] + path.read_bytes() + lines[1] + lines[2])
    said: list[str] = []
    own = settings.model_copy(update={"generator": GeneratorSettings(kind="history")})
    again = fit_directory(data, own, 0, said.append)
    assert again.report["items"] == ITEMS
    assert again.space.version == Artefacts.load(settings.artefacts).space.version  # made from the same vectors
    assert sum("3 passed over" in text for text in said) == 1
    said.clear()
    assert backfill(data, tmp_path / "out", settings, 1, False, said.append).labels == 200
    catalogue = load_catalogue(tmp_path / "out" / "catalogue.npz")
    assert catalogue.ids() == [item.item_id for item in items()]
    assert sum("3 passed over" in text for text in said) == 1


def test_items_of_another_space_are_one_clear_message(settings: Settings, data: Path, tmp_path: Path) -> None:
    (data / "items.jsonl").write_bytes(encode(Item("i0", "", embedding=[1.0, 2.0])))
    done = run_command(settings, str(data), "--out", str(tmp_path / "out"))
    assert done.exit_code == 1 and isinstance(done.exception, SystemExit)
    assert (
        done.stderr.startswith("error: item 'i0': embedding has dimension 2, expected")
        and not (tmp_path / "out").exists()
    )


class Broker:
    """A producer whose records are acknowledged; from the ``failing``-th on they are refused."""

    def __init__(self, failing: float = math.inf) -> None:
        self.failing = failing
        self.sent: list[tuple[str, int, bytes, bytes]] = []
        self.waiting = self.most_waiting = 0

    def __enter__(self) -> Broker:
        return self

    def __exit__(self, *_: object) -> None: ...

    def send(self, topic: str, key: bytes, value: bytes, partition: int) -> Sent:
        self.sent.append((topic, partition, key, value))
        self.waiting += 1
        self.most_waiting = max(self.most_waiting, self.waiting)
        return Sent(self, len(self.sent) >= self.failing)


class Sent:
    def __init__(self, broker: Broker, refused: bool) -> None:
        self.broker, self.refused = broker, refused

    def get(self, timeout: float) -> None:
        self.broker.waiting -= 1
        if self.refused:
            raise KafkaError("refused")


def test_a_publication_that_failed_is_repeated_alone(
    settings: Settings, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = (str(data), "--out", str(tmp_path / "out"), "--publish")
    brokers = [Broker(failing=5), Broker(), Broker()]
    made = iter(brokers)
    monkeypatch.setattr(work, "producer", lambda _: next(made))
    monkeypatch.setattr(work, "_CHUNK", 2)
    failed = run_command(settings, *arguments)
    assert failed.exit_code == 1 and "refused" in failed.stderr and "records on" not in failed.stdout
    assert "checkpoint " in failed.stdout  # what was made is told all the same
    again = run_command(settings, *arguments)
    assert again.exit_code == 0 and "only published" in again.stdout, again.output
    sent = brokers[1].sent
    for topic, kind in (("user-anchors", ANCHORS), ("profiles", PROFILES)):
        lines = [(p, x) for p in range(PARTITIONS) for x in file_of(tmp_path / "out", kind, p).read_bytes().split()]
        assert [(p, value) for name, p, _, value in sent if name == f"gpl.{topic}"] == lines
        assert f"{len(lines):,} records on {topic}" in again.stdout
    assert all(partition_of(key.decode(), PARTITIONS) == p for _, p, key, _ in sent)
    assert brokers[1].most_waiting == 2 and brokers[1].waiting == 0
    # Not of other data, nor what was not made to its end, nor over the cap.
    assert run_command(settings, str(tmp_path), *arguments[1:]).exit_code == 1
    small = settings.kafka.model_copy(update={"max_record_bytes": 64})
    with pytest.raises(RecordTooLargeError):
        work.publish(tmp_path / "out", settings.model_copy(update={"kafka": small}))
    (tmp_path / "out" / "complete.json").unlink()
    assert run_command(settings, *arguments).exit_code == 1


def test_a_complete_backfill_given_again_says_so(settings: Settings, data: Path, tmp_path: Path) -> None:
    arguments = (str(data), "--out", str(tmp_path / "out"))
    assert run_command(settings, *arguments).exit_code == 0
    made = contents(tmp_path)
    again = run_command(settings, *arguments)
    assert again.exit_code == 0 and "complete, nothing is left to do" in again.stdout
    assert contents(tmp_path) == made
    # But not under settings under which nothing was made.
    refit = settings.model_copy(update={"trainer": settings.trainer.model_copy(update={"checkpoints": tmp_path / "2"})})
    other = run_command(refit, *arguments)
    assert other.exit_code == 1 and f"{tmp_path / 'out'} exists" in other.stderr


def test_events_in_the_future_are_passed_over(settings: Settings, data: Path, tmp_path: Path) -> None:
    backfill(data, tmp_path / "out", settings, 1, False, lambda _: None)
    expected = contents(tmp_path / "out")
    ahead = int((time.time() + 86_400) * 1000)
    found = {
        "recalls": Recall("r-ahead", "u1", ahead, ["i1", "i2"]),
        "feedback": Feedback("e-ahead", "u2", "i1", ahead, "click"),
    }
    for name, event in found.items():
        path = data / f"{name}.jsonl"
        path.write_bytes(path.read_bytes() + encode(event) + b"\n")
    own = settings.trainer.model_copy(update={"checkpoints": tmp_path / "again"})
    said: list[str] = []
    out = tmp_path / "out-again"
    backfill(data, out, settings.model_copy(update={"trainer": own}), 1, False, said.append)
    assert contents(out) == expected
    assert "2 events passed over, over 300 s ahead of the clock (gpl validate names them)" in said
    checkpoint = CheckpointStore(own.checkpoints, 3).load_newest()
    assert checkpoint is not None and checkpoint.newest_event_ts < ahead


class Killed(BaseException):
    """As SIGKILL: nothing is tidied up."""


@pytest.mark.parametrize("writes", [0, 1, 2, 6, *range(11, 17)])  # 2 to 10 are the files of the partitions
def test_a_backfill_killed_between_any_two_writes_is_repeated(
    settings: Settings, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writes: int
) -> None:
    whole = settings.model_copy(update={"trainer": settings.trainer.model_copy(update={"checkpoints": tmp_path / "c"})})
    backfill(data, tmp_path / "whole", whole, 1, False, lambda _: None)

    def killed(*_: object, **__: object) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise Killed

    left = writes
    with monkeypatch.context() as patch:
        places = ((LocalStorage, ("put", "write", "remove")), (CheckpointStore, ("save",)), (Path, ("replace",)))
        for cls, names in places:
            for name in names:
                patch.setattr(cls, name, before(killed, getattr(cls, name)))
        with pytest.raises(Killed):
            backfill(data, tmp_path / "out", settings, 1, False, lambda _: None)
    other = tmp_path / "other"
    shutil.copytree(data, other)
    if open_storage(tmp_path / "out").names():
        with pytest.raises(BackfillError):  # not of other data
            backfill(other, tmp_path / "out", settings, 1, False, lambda _: None)
    backfill(data, tmp_path / "out", settings, 1, False, lambda _: None)
    assert is_complete(data, tmp_path / "out", settings)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert contents(tmp_path / "checkpoints") == contents(tmp_path / "c")
    with pytest.raises(BackfillError, match="has checkpoints"):
        backfill(data, tmp_path / "out", settings, 1, False, lambda _: None)


def before(first: Callable[..., None], then: Callable[..., object]) -> Callable[..., object]:
    def both(*args: object, **kwargs: object) -> object:
        first()
        return then(*args, **kwargs)

    return both


def contents(directory: Path) -> dict[str, bytes]:
    """Files by name, but for those that say when they were written."""
    files = (path for path in directory.rglob("*") if path.is_file() and path.suffix != ".npz")
    return {str(f.relative_to(directory)): f.read_bytes() for f in files if f.name not in ("manifest.json", ".lock")}


def test_a_checkpoint_of_another_is_not_taken_for_that_of_a_killed_backfill(
    settings: Settings, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(work, "_train", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            backfill(data, tmp_path / "out", settings, 1, False, lambda _: None)
    backfill(data, tmp_path / "another", settings, 1, False, lambda _: None)
    with pytest.raises(BackfillError, match="has checkpoints"):
        backfill(data, tmp_path / "out", settings, 1, False, lambda _: None)


def test_errors_say_what_to_do(settings: Settings, data: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").touch()
    with pytest.raises(BackfillError, match="exists"):
        backfill(data, tmp_path / "there", settings, 1, False, lambda _: None)
    with open_storage(settings.trainer.checkpoints).held():
        beside = run_command(settings, str(data), "--out", str(tmp_path / "out"))
    assert beside.exit_code == 1 and f"trainer.checkpoints: {settings.trainer.checkpoints} is in use" in beside.stderr
    (data / "recalls.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match=r"recalls\.jsonl"):
        backfill(data, tmp_path / "out", settings, 1, False, lambda _: None)


def test_a_catalogue_comes_back_from_its_file(settings: Settings, tmp_path: Path) -> None:
    artefacts = Artefacts.load(settings.artefacts)
    catalogue = catalogue_of(items(), artefacts, settings.space)
    save_catalogue(catalogue, tmp_path / "catalogue.npz")
    again = load_catalogue(tmp_path / "catalogue.npz")
    assert again.ids() == catalogue.ids()
    np.testing.assert_array_equal(again.vectors, catalogue.vectors)
    np.testing.assert_array_equal(again.sids, catalogue.sids)


def test_items_without_vectors_have_no_place_in_a_space_of_vectors(settings: Settings) -> None:
    artefacts = Artefacts.load(settings.artefacts)
    assert artefacts.space.encoder == "precomputed"
    with pytest.raises(ValueError, match="item 'x': embedding is missing"):
        catalogue_of([Item("x", "red shoe")], artefacts, settings.space)
