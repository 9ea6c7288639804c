"""The trainer and the scorer on the real Apache Kafka: order, recovery from kill -9, and labels to served scores."""

import itertools
import json
import multiprocessing
import random
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kafka import TopicPartition
from prometheus_client import REGISTRY

from gpl.labels.mixed import MIN_EXPOSURES
from gpl.preranker.model import PreRanker
from streams import kafka as clients
from streams import models
from streams.contracts import Exposed, ItemVector, Label, ModelUpdate, Provenance, Unexposed, decode, encode
from streams.frame import Frame
from streams.log_view import LogView, TopicMissingError
from streams.metrics import Health
from streams.scoring.scorer import Scorer
from streams.settings import DeadLetterSettings, KafkaSettings, Settings, TrainerSettings
from streams.storage import open_storage
from streams.topics import full_name
from streams.trainer.batch_journal import BatchJournal
from streams.trainer.checkpoint import Checkpoint, CheckpointError, CheckpointStore
from streams.trainer.group import Alone, Processes
from streams.trainer.loop import run
from streams.trainer.rebuild import RebuildError, rebuild
from streams.trainer.source import LabelSource, OffsetsGoneError
from streams.views import vector_bytes

DIM, ITEMS, USERS = 16, 60, 30
FRAME = Frame(DIM, 1, "encoder-1", "quantiser-1")
_RNG = np.random.default_rng(3)
VECTORS, LIKES = (
    (v / np.linalg.norm(v, axis=1, keepdims=True)).astype(np.float32)
    for v in (_RNG.normal(size=(ITEMS, DIM)), _RNG.normal(size=(USERS, DIM)))
)


def until(condition: Callable[[], bool], timeout: float = 60.0) -> None:
    """Wait for a condition, looking every few milliseconds."""
    for _ in range(int(timeout / 0.005)):
        if condition():
            return
        threading.Event().wait(0.005)
    raise TimeoutError(f"not within {timeout} s")


def label(n: int, rng: np.random.Generator, revision: int = 0) -> Label:
    user = n % USERS
    items = rng.permutation(ITEMS)[:15]
    cosine = (VECTORS[items] @ LIKES[user]).round(6).astype(float)
    shown = 4 + revision
    return Label(
        request_id=f"r{n}",
        revision=revision,
        user_id=f"u{user}",
        ts=1000 + n,
        outcome="labelled",
        history=[f"i{(n + k) % ITEMS}" for k in range(n % 4)],
        exposed=Exposed(
            [f"i{i}" for i in items[:shown]], (cosine[:shown] > 0.1).astype(int).tolist(), cosine[:shown].tolist()
        ),
        unexposed=Unexposed(
            [f"i{i}" for i in items[shown:]],
            cosine[shown:].tolist(),
            ((1 + cosine[shown:]) / 2).tolist(),
            [0.5] * (15 - shown),
        ),
        provenance=Provenance(
            (0, n),
            [],
            15,
            0,
            None,
            None,
            FRAME.encoder,
            FRAME.quantiser,
            None,
            None,
            "",
            "feedback" if revision else None,
        ),
    )


class Topics:
    """Writes what the other roles would, and reads what they wrote."""

    def __init__(self, kafka: KafkaSettings) -> None:
        self.kafka = kafka
        self.producer = clients.producer(kafka)
        for n in range(ITEMS):
            self.vector(n, VECTORS[n])
        self.producer.flush()

    def vector(self, n: int, vector: np.ndarray) -> None:
        unit = (vector / np.linalg.norm(vector)).astype(np.float32)
        item = ItemVector(f"i{n}", vector_bytes(unit), [n], "hash", FRAME.encoder, FRAME.quantiser)
        self.send("item-vectors", item.item_id, encode(item))

    def send(self, topic: str, key: str, value: bytes | None, headers: Any = (), **where: Any) -> None:
        self.producer.send(full_name(self.kafka, topic), key=key.encode(), value=value, headers=list(headers), **where)

    def label(self, record: Label, **where: Any) -> None:
        self.send("labels", record.user_id, encode(record), [("gpl-newest-at", b"%d" % (10**12 + record.ts))], **where)

    def read(self, topic: str) -> list[Any]:
        found: list[Any] = []
        with closing(LogView(self.kafka, {topic: found.append})) as view:
            view.warm_up()
        return found


@pytest.fixture
def topics(kafka_settings: KafkaSettings) -> Iterator[Topics]:
    made = Topics(kafka_settings)
    yield made
    made.producer.close()


def settings_of(kafka: KafkaSettings, directory: Path, **trainer: Any) -> Settings:
    chosen: dict[str, Any] = {
        "checkpoints": directory / "checkpoints",
        "models": directory / "models",
        "dim": 8,
        "batch_records": 4,
        "shadow": True,
        "window_records": 200,
        "publish_min_records": 50,
        **trainer,
    }
    return Settings(kafka=kafka, trainer=TrainerSettings(**chosen))


# The source


def test_a_ready_log_is_cut_into_the_same_batches_from_wherever_one_starts(topics: Topics) -> None:
    rng = random.Random(1)
    for n in range(200):
        topics.send("labels", "k", b"%d" % n, partition=rng.choice([0, 0, 1]), timestamp_ms=10_000 + n // 3)
    topics.producer.flush()
    with closing(LabelSource(topics.kafka, {})) as source:
        batches, starts = [], []
        while True:
            starts.append(dict(source.positions))
            batch = source.take(16, wait=0.0)
            if not batch and sum(source.lag().values()) == 0:
                break
            if batch:
                batches.append([(r.partition, r.offset) for r in batch])
            else:
                starts.pop()
    records = [at for batch in batches for at in batch]
    assert [len(batch) for batch in batches] == [16] * 12 + [8]
    assert len(set(records)) == 200 and {p for p, _ in records} == {0, 1}
    # In order within a partition, and across partitions by time.
    for p in (0, 1):
        assert [offset for q, offset in records if q == p] == list(range(sum(q == p for q, _ in records)))
    for start in (3, 9):
        with closing(LabelSource(topics.kafka, starts[start])) as resumed:
            taken: list[Any] = []
            until(lambda resumed=resumed, taken=taken: bool(taken.extend(resumed.take(16, wait=0.0)) or taken))
        assert [(r.partition, r.offset) for r in taken] == batches[start]


def test_batches_follow_the_time_of_publication_across_partitions(topics: Topics) -> None:
    for n in range(60):
        topics.send("labels", "k", b"%d" % n, partition=n % 3, timestamp_ms=5_000 + n)
    topics.producer.flush()
    taken: list[int] = []
    with closing(LabelSource(topics.kafka, {})) as source:
        until(lambda: bool(taken.extend(int(r.value) for r in source.take(7, wait=0.0)) or len(taken) == 60))
        assert source.positions == {0: 20, 1: 20, 2: 20}
        assert taken == list(range(60))
        topics.send("labels", "k", b"60", partition=1)
        topics.producer.flush()
        until(lambda: bool(taken.extend(int(r.value) for r in source.take(7, wait=0.0)) or len(taken) == 61))


def test_a_position_behind_the_end_is_refused(topics: Topics) -> None:
    with pytest.raises(ValueError, match=r"partition 2: position 5 is behind its end 0"):
        LabelSource(topics.kafka, {2: 5})


def test_records_that_retention_takes_under_a_trainers_eyes_are_not_skipped_in_silence(topics: Topics) -> None:
    for n in range(30):
        topics.send("labels", "k", b"%d" % n, partition=0)
    topics.producer.flush()
    with closing(LabelSource(topics.kafka, {0: 10})) as source:
        expire(topics.kafka, 0, 20)
        with pytest.raises(OffsetsGoneError, match=r"partition=0.*10.*Started again"):
            until(lambda: bool(source.take(7, wait=0.1)))
        assert source.positions[0] == 10


def expire(kafka: KafkaSettings, partition: int, before: int) -> None:
    """Let go of the labels before an offset, as retention does."""
    with clients.admin(kafka, timeout=30) as admin:
        admin.delete_records({TopicPartition(full_name(kafka, "labels"), partition): before})


def cut(rank: int, ranks: int, meet: str, kafka: KafkaSettings, size: int, found: Any) -> None:
    """One rank reads all that lies on the log."""
    with Processes(rank, ranks, meet) as group, closing(LabelSource(kafka, {}, group=group)) as source:
        batches: list[list[tuple[int, int]]] = []
        while sum(source.lag().values()):
            if batch := source.take(size, wait=0.05):
                batches.append([(r.partition, r.offset) for r in batch])
        found.put((rank, batches))


def test_ranks_cut_the_batches_that_one_trainer_cuts(topics: Topics, tmp_path: Path) -> None:
    rng = random.Random(2)
    for n in range(900):
        topics.send("labels", "k", b"%d" % n, partition=rng.choice([0, 0, 0, 1, 2]), timestamp_ms=10_000 + n // 3)
    topics.producer.flush()
    with closing(LabelSource(topics.kafka, {})) as source:
        expected: list[list[tuple[int, int]]] = []
        while sum(source.lag().values()):
            if batch := source.take(16, wait=0.05):
                expected.append([(r.partition, r.offset) for r in batch])
    assert [len(batch) for batch in expected] == [16] * 56 + [4]
    found = _PROCESSES.Queue()
    meet = (tmp_path / "meet").as_uri()
    processes = [_PROCESSES.Process(target=cut, args=(r, 2, meet, topics.kafka, 16, found)) for r in range(2)]
    for process in processes:
        process.start()
    by_rank = dict(found.get(timeout=120) for _ in processes)
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert by_rank == {0: expected, 1: expected}
    with pytest.raises(ValueError, match=r"ranks: 4, but .* has 3 partitions"):
        LabelSource(topics.kafka, {}, group=TooMany())


class TooMany(Alone):
    ranks = 4


# Recovery


def newest(checkpoints: Path) -> int:
    """Step of the newest checkpoint."""
    return max((int(path.name[5:]) for path in checkpoints.glob("step-*")), default=0)


def saved(checkpoints: Path) -> int:
    """Label records behind the newest checkpoint."""
    try:
        manifest = (checkpoints / f"step-{newest(checkpoints):08d}" / "manifest.json").read_text()
    except FileNotFoundError:  # none yet, or just retired
        return 0
    return sum(json.loads(manifest)["positions"].values())


def final(settings: Settings) -> Checkpoint:
    checkpoint = CheckpointStore(settings.trainer.checkpoints, 3).load_newest()
    assert checkpoint is not None
    return checkpoint


@contextmanager
def running(
    settings: Settings, health: Health, start_from: str = "latest", journal: Path | None = None
) -> Iterator[None]:
    """A trainer in a thread, stopped and joined at the end. Raises what it raised."""
    stop, failures = threading.Event(), []

    def train() -> None:
        try:
            run(settings, stop, health, journal, FRAME, start_from)
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=train)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(60)
        assert not thread.is_alive()
    if failures:
        raise failures[0]


# One server process has torch loaded, with what its first optimizer imports; each trainer is a fork of it.
_PROCESSES = multiprocessing.get_context("forkserver")
_PROCESSES.set_forkserver_preload(["streams.trainer.loop", "torch._dynamo"])


class Trainer:
    """A trainer in a process of its own."""

    def __init__(self, settings: Settings, journal: Path) -> None:
        self.stop = _PROCESSES.Event()
        self.process = _PROCESSES.Process(target=run, args=(settings, self.stop, None, journal, FRAME), daemon=True)
        self.process.start()

    def wait_for(self, condition: Callable[[], bool]) -> None:
        until(lambda: condition() or self.process.exitcode is not None, timeout=120)
        assert self.process.exitcode is None, "the trainer has ended by itself; its output tells why"

    def kill(self) -> None:
        self.process.kill()
        self.process.join(60)
        assert self.process.exitcode == -signal.SIGKILL

    def finish(self) -> None:
        self.stop.set()
        self.process.join(60)
        assert self.process.exitcode == 0


class Producing(threading.Thread):
    """Labels that come while trainers run, with redeliveries, corrections, records that are no labels, and items whose
    vectors come late or change. ``counts``: what of each was sent; ``halt`` ends it early."""

    BAD = (b"{", b'{"request_id": 1}', b"\xff\xfe", b"NaN")

    def __init__(self, topics: Topics, count: int) -> None:
        super().__init__(daemon=True)
        self.topics, self.count = topics, count
        self.halt = threading.Event()
        self.counts = {"bad": 0, "again": 0, "corrected": 0}
        self.sent = 0

    def run(self) -> None:
        rng = np.random.default_rng(8)
        sent: list[Label] = []
        for n in range(self.count):
            record = label(n, rng)
            sent.append(record)
            self.topics.label(record)
            if n % 10 == 3:
                self.topics.label(sent[int(rng.integers(len(sent)))])
                self.counts["again"] += 1
            if n % 25 == 7:
                self.topics.label(label(n - 5, rng, revision=1))
                self.counts["corrected"] += 1
            if n % 50 == 9:
                self.topics.send("labels", f"u{n % USERS}", self.BAD[self.counts["bad"] % len(self.BAD)])
                self.counts["bad"] += 1
            if n % 20 == 0:
                self.topics.vector(n // 20 % ITEMS, rng.normal(size=DIM))
            if n % 7 == 0:
                self.topics.producer.flush()
                self.halt.wait(0.02)
            self.sent = n + 1
        self.topics.producer.flush()

    @property
    def total(self) -> int:
        return self.count + sum(self.counts.values())


def test_kill_9_at_any_moment_leaves_what_the_log_gives_again(topics: Topics, tmp_path: Path) -> None:
    settings = settings_of(
        topics.kafka,
        tmp_path,
        checkpoint_every_wall_seconds=0.1,
        publish_every_wall_seconds=0.3,
        max_users=USERS - 5,  # ids are let go of and come back
    )
    lines = tmp_path / "evaluations.jsonl"
    producing = Producing(topics, 700)
    producing.start()
    rng = random.Random()
    kills = sorted(rng.sample(range(20, 600), 5))
    for at in kills:
        trainer = Trainer(settings, lines)
        trainer.wait_for(lambda at=at: producing.sent >= at and newest(settings.trainer.checkpoints) > 0)
        threading.Event().wait(rng.random() * 0.3)
        trainer.kill()
    trainer = Trainer(settings, lines)
    trainer.wait_for(lambda: not producing.is_alive() and saved(settings.trainer.checkpoints) == producing.total)
    trainer.finish()

    # Each request was evaluated, and so trained on, once in what survived.
    evaluated = [json.loads(line) for line in lines.read_text().splitlines()]
    shown = [(line["request_id"], line["item"]) for line in evaluated if line["kind"] == "score"]
    assert len(set(shown)) == len(shown) == 4 * producing.count
    checkpoint = final(settings)
    assert sum(checkpoint.positions.values()) == producing.total

    # Every bad record has a dead letter with its bytes and origin; a killed trainer may repeat one.
    origins = [dict(record.headers) for record in topics.read("dead-letters")]
    assert len({(at["gpl-partition"], at["gpl-offset"]) for at in origins}) == producing.counts["bad"]

    announced = [decode(ModelUpdate, r.value) for r in topics.read("model-updates")]
    versions = [update.version for update in announced]
    assert versions == sorted(set(versions)) and len(versions) >= 2
    assert sum(announced[-1].source_offsets.values()) == producing.total

    # The last model and one from between kills come out of the log bit for bit, as does what the checkpoint holds.
    # (Of those that are kept: a slow machine publishes more.)
    kept = sorted(set(models.ModelStore(settings.trainer.models).versions()) & set(versions[:-1]))
    for version in (versions[-1], rng.choice(kept)):
        made = rebuild(settings, version, frame=FRAME)
        assert (made.differing, made.first_difference, made.base) == ([], None, None), f"killed at {kills}: {version}"
        assert made.steps == int(version[-8:])
    network = PreRanker.of_state(checkpoint.tensors["model"], DIM)
    last = models.read(announced[-1].uri, announced[-1].checksum)
    for name in ("content", "default", "score_moments"):
        assert torch.equal(network.state_tensors()[name], last.weights[name])

    # From a checkpoint of its history, without the log before it.
    steps = CheckpointStore(settings.trainer.checkpoints, 3).steps()
    made = rebuild(settings, versions[-1], base=steps[0], frame=FRAME)
    assert made.differing == [] and made.base == steps[0] and made.steps == checkpoint.step - steps[0]


def train_as(rank: int, ranks: int, meet: str, settings: Settings, stop: Any, journal: Path) -> None:
    with Processes(rank, ranks, meet) as group:
        run(settings, stop, None, journal, FRAME, group=group)


class Ranks:
    """A group of trainers, a process each."""

    def __init__(self, settings: Settings, journal: Path, ranks: int, meet: Path) -> None:
        self.stop = _PROCESSES.Event()
        self.processes = []
        for rank in range(ranks):
            arguments = rank, ranks, meet.as_uri(), settings, self.stop, journal
            self.processes.append(_PROCESSES.Process(target=train_as, args=arguments, daemon=True))
            self.processes[-1].start()

    def wait_for(self, condition: Callable[[], bool]) -> None:
        until(lambda: condition() or any(p.exitcode is not None for p in self.processes), timeout=120)
        assert [p.exitcode for p in self.processes] == [None] * len(self.processes), "the output tells why"

    def kill(self, rank: int) -> None:
        """The others end by themselves."""
        self.processes[rank].kill()
        for process in self.processes:
            process.join(60)
        assert self.processes[rank].exitcode == -signal.SIGKILL
        assert all(p.exitcode not in (None, 0) for p in self.processes)

    def finish(self) -> None:
        self.stop.set()
        for process in self.processes:
            process.join(60)
            assert process.exitcode == 0


def test_a_group_of_ranks_survives_kill_9_of_any_and_is_made_again_in_one_process(
    topics: Topics, tmp_path: Path
) -> None:
    settings = settings_of(
        topics.kafka,
        tmp_path,
        checkpoint_every_wall_seconds=0.1,
        publish_every_wall_seconds=0.3,
        max_users=USERS - 5,
        loss="pointwise",  # its labels are of all that the trainers before saw
        evidence=False,
    )
    lines = tmp_path / "evaluations.jsonl"
    producing = Producing(topics, 500)
    producing.start()
    rng = random.Random()
    kills = sorted(rng.sample(range(20, 400), 2))
    for victim, at in zip((1, 0), kills, strict=True):
        group = Ranks(settings, lines, 2, tmp_path / f"meet-{victim}")
        before = newest(settings.trainer.checkpoints)
        group.wait_for(
            lambda at=at, before=before: producing.sent >= at and newest(settings.trainer.checkpoints) > before
        )
        threading.Event().wait(rng.random() * 0.3)
        group.kill(victim)
    # A single trainer takes over what a group has left, and a group what that has.
    trainer = Trainer(settings, lines)
    before = newest(settings.trainer.checkpoints)
    trainer.wait_for(lambda: newest(settings.trainer.checkpoints) > before)
    trainer.kill()
    group = Ranks(settings, lines, 2, tmp_path / "meet-last")
    group.wait_for(lambda: not producing.is_alive() and saved(settings.trainer.checkpoints) == producing.total)
    group.finish()

    evaluated = [json.loads(line) for line in lines.read_text().splitlines()]
    shown = [(line["request_id"], line["item"]) for line in evaluated if line["kind"] == "score"]
    assert len(set(shown)) == len(shown) == 4 * producing.count
    assert sum(final(settings).positions.values()) == producing.total
    assert float(final(settings).tensors["mixed"]["sources"][:, 4].max()) > MIN_EXPOSURES
    origins = [dict(record.headers) for record in topics.read("dead-letters")]
    assert len({(at["gpl-partition"], at["gpl-offset"]) for at in origins}) == producing.counts["bad"]

    journal = BatchJournal(open_storage(settings.trainer.checkpoints))
    assert [journal.header(run).ranks for run in journal.runs()] == [2, 2, 1, 2]
    announced = [decode(ModelUpdate, r.value) for r in topics.read("model-updates")]
    assert sum(announced[-1].source_offsets.values()) == producing.total
    made = rebuild(settings, announced[-1].version, frame=FRAME)
    assert (made.differing, made.first_difference, made.base) == ([], None, None), f"killed at {kills}"
    assert made.steps == int(announced[-1].version[-8:])


def test_start_from_goes_back_and_models_of_both_histories_can_be_made_again(topics: Topics, tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    settings = settings_of(
        topics.kafka,
        tmp_path,
        keep_checkpoints=50,
        publish_min_records=1,
        shadow=False,
        checkpoint_every_wall_seconds=0.1,
    )
    store = CheckpointStore(settings.trainer.checkpoints, 50)

    sent = itertools.count()
    total = 0

    def train(count: int, start_from: str = "latest", **changed: object) -> str:
        """Train on ``count`` more labels, with ``changed`` settings; the version published at the end."""
        nonlocal total
        total += count
        for _ in range(count):
            topics.label(label(next(sent), rng))
        topics.producer.flush()
        own = settings.model_copy(update={"trainer": settings.trainer.model_copy(update=changed)})
        with running(own, Health(), start_from):
            until(lambda: saved(settings.trainer.checkpoints) == total)
        return decode(ModelUpdate, topics.read("model-updates")[-1].value).version

    first = train(40)
    middle = store.steps()[-1]
    written_at = store.manifest(middle).written_at
    second = train(40)
    # As after an upgrade that came with other defaults: a model has a history of both.
    other = train(20, negatives_weight=0.3, pseudo_weight=1.5, learning_rate=0.005, batch_records=16)
    assert store.steps()[-1] > middle
    third = train(20, f"step-{middle}")
    fourth = train(20, f"before=ts={written_at}")
    for version in (first, second, other, third, fourth):
        made = rebuild(settings, version, frame=FRAME)
        assert (made.differing, made.first_difference) == ([], None), version
    with pytest.raises(RebuildError, match="checkpoint step-"):
        rebuild(settings, second, base=next(s for s in store.steps() if s > middle), frame=FRAME)
    with pytest.raises(ValueError, match="manifest"):
        run(settings, threading.Event(), None, None, FRAME, "step-99999999")
    anew = train(1, "earliest")
    assert rebuild(settings, anew, frame=FRAME).differing == []
    assert models.ModelStore(settings.trainer.models).manifest(anew)[0].records == total
    assert train(5, "2100-01-01") == anew  # nothing is that new, so nothing was trained on


def test_a_model_is_made_again_from_the_checkpoint_that_a_run_took_up_when_labels_had_expired(
    topics: Topics, tmp_path: Path
) -> None:
    settings = settings_of(topics.kafka, tmp_path, keep_checkpoints=50, publish_min_records=1, shadow=False)
    rng = np.random.default_rng(2)
    store = CheckpointStore(settings.trainer.checkpoints, keep=50)

    def train(first: int, last: int) -> int:
        for n in range(first, last):
            topics.label(label(n, rng), partition=n % 2)
        topics.producer.flush()
        with running(settings, Health()):
            until(lambda: saved(settings.trainer.checkpoints) == last)
        return store.steps()[-1]

    taken_up = train(0, 60)
    for n in range(60, 100):
        topics.label(label(n, rng), partition=0)
    topics.producer.flush()
    expire(topics.kafka, 0, 70)  # 30 were trained on, 40 never will be
    train(100, 160)
    version = models.ModelStore(settings.trainer.models).versions()[0]
    for step in store.steps():
        if step != taken_up:
            open_storage(settings.trainer.checkpoints).remove(f"step-{step:08d}")
    made = rebuild(settings, version, frame=FRAME)
    assert (made.differing, made.first_difference, made.base) == ([], None, taken_up)


def test_a_start_that_fails_leaves_all_as_it_was_and_one_anew_keeps_the_old_evaluations(
    topics: Topics, tmp_path: Path
) -> None:
    settings = settings_of(topics.kafka, tmp_path, keep_checkpoints=50, checkpoint_every_wall_seconds=0.05)
    rng = np.random.default_rng(2)
    lines = tmp_path / "evaluations.jsonl"

    aside = tmp_path / "evaluations.jsonl.before-1"

    def train(total: int, start_from: str = "latest") -> None:
        with running(settings, Health(), start_from, lines):
            until(lambda: aside.exists() or start_from == "latest")
            until(lambda: saved(settings.trainer.checkpoints) == total)

    for count in (40, 80):
        for n in range(count - 40, count):
            topics.label(label(n, rng))
        topics.producer.flush()
        train(count)
    store = CheckpointStore(settings.trainer.checkpoints, 50)
    steps, written = store.steps(), lines.read_bytes()

    def fails(error: type[Exception], start_from: str, **changed: Any) -> None:
        with pytest.raises(error):
            run(settings.model_copy(update=changed), threading.Event(), None, lines, FRAME, start_from)
        assert (store.steps(), lines.read_bytes()) == (steps, written)

    wider = settings.trainer.model_copy(update={"dim": 16})
    fails(CheckpointError, f"step-{steps[0]}", trainer=wider)
    elsewhere = topics.kafka.model_copy(update={"prefix": f"{topics.kafka.prefix}-none"})
    for start_from in (f"step-{steps[0]}", "earliest"):
        fails(TopicMissingError, start_from, kafka=elsewhere)

    train(80, "earliest")
    assert aside.read_bytes() == written
    shown = [json.loads(line)["request_id"] for line in lines.read_text().splitlines() if '"score"' in line]
    assert len(set(shown)) == 80


def test_each_start_gets_past_more_bad_labels(topics: Topics, tmp_path: Path) -> None:
    settings = settings_of(
        topics.kafka, tmp_path, checkpoint_every_wall_seconds=1000, publish_every_wall_seconds=1000
    ).model_copy(update={"dead_letters": DeadLetterSettings(max_consecutive=10, max_ratio=1)})
    rng = np.random.default_rng(4)
    for n in range(50):
        if n == 20:
            for _ in range(25):
                topics.send("labels", "u1", b"{", partition=0)
        topics.label(label(n, rng), partition=0)
    topics.producer.flush()

    def halts(**changed: float) -> bool:
        health, own = Health(), settings.trainer.model_copy(update=changed)
        with running(settings.model_copy(update={"trainer": own}), health, journal=tmp_path / "evaluations.jsonl"):
            until(lambda: bool(health.halted()) or saved(own.checkpoints) == 75)
        return bool(health.halted())

    # Ten are let go by, and the batches of four before the eleventh are kept.
    for after in (28, 36):
        assert halts() and saved(settings.trainer.checkpoints) == after
    assert not halts(checkpoint_every_wall_seconds=0.1)
    shown = [json.loads(line) for line in (tmp_path / "evaluations.jsonl").read_text().splitlines()]
    counts = Counter(line["request_id"] for line in shown if line["kind"] == "score")
    assert counts == {f"r{n}": 4 for n in range(50)}
    origins = [dict(record.headers)["gpl-offset"] for record in topics.read("dead-letters")]
    assert {int(at) for at in origins} == set(range(20, 45))


# From labels to served scores


def test_labels_become_a_served_model_and_bad_ones_dead_letters(topics: Topics, tmp_path: Path) -> None:
    settings = settings_of(
        topics.kafka, tmp_path, publish_every_wall_seconds=0.2, checkpoint_every_wall_seconds=0.2, shadow=False
    )
    rng = np.random.default_rng(4)
    health = Health()
    with Scorer(settings, FRAME) as scorer:
        with running(settings, health):
            until(lambda: not health.waiting())
            assert scorer.model_version is None
            topics.send("labels", "u1", b'{"not": "a label"}')
            topics.send("labels", "u1", None)
            for n in range(120):
                topics.label(label(n, rng))
            topics.producer.flush()
            until(lambda: scorer.model_version is not None)
            first = scorer.model_version
            for n in range(120, 240):
                topics.label(label(n, rng))
            topics.producer.flush()
            until(lambda: scorer.model_version != first)
            until(lambda: saved(settings.trainer.checkpoints) == 242)
        last = decode(ModelUpdate, topics.read("model-updates")[-1].value)
        until(lambda: scorer.model_version == last.version)
        scored = scorer.score("u7", [f"i{n}" for n in range(ITEMS)])
    assert sum(last.source_offsets.values()) == 242
    assert last.newest_event_ts == 1239
    assert {"auc", "gauc", "log_loss", "hr10", "model_age_seconds"} <= last.metrics.keys()
    published = models.read(last.uri, last.checksum)
    network = PreRanker.of_state(published.weights, DIM)
    items = [f"i{n}" for n in range(ITEMS)]
    rows = np.array([published.ids.items.index(item) + 1 for item in items])
    expected = network.score(published.ids.users.index("u7") + 1, rows, VECTORS, None)
    assert dict(zip(scored.items, scored.scores, strict=True)) == pytest.approx(
        dict(zip(items, expected.tolist(), strict=True)), abs=1e-6
    )
    dead = topics.read("dead-letters")
    assert sorted((r.value or b"") for r in dead) == [b"", b'{"not": "a label"}']
    assert all(dict(r.headers)["gpl-topic"] == full_name(topics.kafka, "labels").encode() for r in dead)
    assert health.stalled() == []
    assert REGISTRY.get_sample_value("gpl_progressive", {"metric": "auc", "model": "gpl"}) is not None
