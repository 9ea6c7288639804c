"""The trainer under load: its throughput beside the bare torch loop, and how soon a label is in a published model.

Labels are made up, with tastes to learn, and go the way of real ones: JSON on a real Kafka, the trainer's own loop with
checkpoints, journal, gate and publication. The bare loop is ``Learner.step`` over the same batches, made beforehand.
"""

from __future__ import annotations

import gc
import multiprocessing
import queue
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from gpl.catalogue import Catalogue
from gpl.preranker.ids import GrowingIds
from gpl.preranker.learner import Learner
from gpl.preranker.loss import LossConfig
from gpl.preranker.model import PreRanker
from streams import topics
from streams.bench.synthetic import drawn_history
from streams.contracts import Exposed, ItemVector, Label, ModelUpdate, Provenance, Unexposed, decode, encode
from streams.demo.processes import ProcessEndedError
from streams.frame import Frame
from streams.kafka import producer
from streams.log_view import LogView
from streams.settings import KafkaSettings, Settings, TrainerSettings
from streams.storage import open_storage
from streams.topics import full_name
from streams.trainer import intake, loop
from streams.trainer.batch import Rows, prepare
from streams.trainer.batch_journal import BatchJournal
from streams.trainer.columns import Columns
from streams.trainer.group import Group, Processes
from streams.trainer.start import StartFrom
from streams.trainer.trainer import Trainer
from streams.views import vector_bytes


@dataclass(frozen=True)
class Load:
    """``candidates`` a request, of which ``exposed`` are shown; ``items`` must be twice as many or more."""

    items: int
    users: int
    candidates: int
    exposed: int
    dim: int


class Workload:
    """Made-up vectors, and labels of requests whose users click what lies near their taste. Popularity is Zipf's."""

    def __init__(self, load: Load, seed: int = 0) -> None:
        self.load = load
        self.frame = Frame(load.dim, 1, "bench-encoder", "bench-quantiser")
        self._rng = np.random.default_rng(seed)
        self.vectors = self._unit(load.items)
        self._tastes = self._unit(load.users)
        share = 1 / np.arange(1, load.items + 1) ** 0.8
        self._cumulative = np.cumsum(share / share.sum())

    def catalogue(self) -> Catalogue:
        made = Catalogue(self.load.dim, 1)
        for n, vector in enumerate(self.vectors):
            made.put(f"item-{n}", vector, [n])
        return made

    def item_vectors(self) -> Iterator[tuple[bytes, bytes]]:
        """Key and value of the records of ``gpl.item-vectors``."""
        for n, vector in enumerate(self.vectors):
            frame = self.frame
            item = ItemVector(f"item-{n}", vector_bytes(vector), [n], "bench", frame.encoder, frame.quantiser)
            yield item.item_id.encode(), encode(item)

    def labels(self, count: int, first: int = 0) -> list[tuple[bytes, bytes]]:
        """Key and value of ``count`` label records, requests numbered from ``first``."""
        return [self._label(first + n) for n in range(count)]

    def _label(self, n: int) -> tuple[bytes, bytes]:
        load, rng = self.load, self._rng
        user = int(rng.integers(load.users))
        drawn = np.empty(0, np.int64)
        while len(drawn) < load.candidates:  # popular items come more than once
            more = np.searchsorted(self._cumulative, rng.random(2 * load.candidates))
            drawn = np.union1d(drawn, more)
        items = rng.permutation(drawn)[: load.candidates]
        cosine = np.round(self.vectors[items] @ self._tastes[user], 6).astype(float)
        shown = load.exposed
        clicked = cosine[:shown] + 0.05 * rng.normal(size=shown) > 0.05
        names = [f"item-{i}" for i in items.tolist()]
        label = Label(
            request_id=f"request-{n}",
            revision=0,
            user_id=f"user-{user}",
            ts=1_700_000_000_000 + n,
            outcome="labelled",
            history=drawn_history(self._cumulative, rng),
            exposed=Exposed(names[:shown], clicked.astype(int).tolist(), cosine[:shown].tolist()),
            unexposed=Unexposed(
                names[shown:],
                cosine[shown:].tolist(),
                np.round((1 + cosine[shown:]) / 2, 6).tolist(),
                np.round(rng.random(len(items) - shown), 6).tolist(),
            ),
            provenance=Provenance(
                recall=(0, n),
                feedback=list(range(shown)),
                candidates=len(items),
                unknown=0,
                anchors_ts=1_700_000_000_000,
                anchors_version=1,
                encoder=self.frame.encoder,
                quantiser=self.frame.quantiser,
                generator="bench",
                calibration="none",
                config="bench",
                correction=None,
            ),
        )
        return label.user_id.encode(), encode(label)

    def _unit(self, count: int) -> NDArray[np.float32]:
        made = self._rng.normal(size=(count, self.load.dim)).astype(np.float32)
        made /= np.linalg.norm(made, axis=1, keepdims=True)
        return made


@dataclass(frozen=True)
class Throughput:
    """Label records and samples (pairs of request and item) a second; ``processor``: seconds of it a record.

    On a machine that others use too, processor time still compares.
    """

    records: float
    samples: float
    processor: float


class _Clock:
    """Wall and processor seconds since it was made."""

    def __init__(self) -> None:
        self._started = time.perf_counter(), time.process_time()

    def throughput(self, workload: Workload, records: int) -> Throughput:
        wall, processor = time.perf_counter() - self._started[0], time.process_time() - self._started[1]
        return Throughput(records / wall, records * workload.load.candidates / wall, processor / records)


@dataclass(frozen=True)
class Comparison:
    """The bare loop, the trainer's steps from bytes in memory, and the whole trainer over a backlog on Kafka, also as
    ``ranks`` processes."""

    bare: Throughput
    in_memory: Throughput
    from_kafka: Throughput
    divided: Throughput
    ranks: int

    def to_dict(self) -> dict[str, Any]:
        every = {"bare": self.bare, "in_memory": self.in_memory, "from_kafka": self.from_kafka, "ranks": self.divided}
        return {
            name: {
                "records": of.records,
                "samples": of.samples,
                "of_bare": of.samples / self.bare.samples,
                "processor": of.processor,
                "of_bare_by_processor_time": self.bare.processor / of.processor,
            }
            for name, of in every.items()
        }

    def lines(self) -> Iterator[str]:
        titles = {
            "bare": "bare torch loop, batches in memory",
            "in_memory": "trainer's steps, from bytes in memory",
            "from_kafka": "trainer, backlog on Kafka, checkpoints and publication",
            "ranks": f"the same as {self.ranks} ranks, a process each",
        }
        for name, of in self.to_dict().items():
            wall = f"{of['records']:7,.0f} records/s {of['samples']:9,.0f} samples/s {of['of_bare']:5.0%}"
            processor = f"{of['processor'] * 1e6:6,.0f} us of processor a record"
            yield f"{titles[name]:<56} {wall}  {processor} {of['of_bare_by_processor_time']:5.0%}"


def throughput(workload: Workload, values: list[bytes], warm: int, settings: Settings, ranks: int = 2) -> Comparison:
    """Records per second over ``values`` without the first ``warm``: with ids and tables grown, as in a running system.

    The records must lie on the log of ``settings``, all of them. ``ranks``: processes of the last figure.
    """
    own = settings.trainer
    gc.freeze()  # as the trainer does
    try:
        return Comparison(
            _bare(workload, values, warm, own),
            _in_memory(workload, values, warm, own),
            _from_kafka(workload, len(values), warm, settings),
            _over_ranks(workload, len(values), warm, settings, ranks),
            ranks,
        )
    finally:
        gc.unfreeze()


def _bare(workload: Workload, values: list[bytes], warm: int, settings: TrainerSettings) -> Throughput:
    catalogue = workload.catalogue()
    users, items = GrowingIds(settings.max_users), GrowingIds(settings.max_items)
    rows = Rows(users, items, catalogue)
    batches = []
    for start in range(0, len(values), settings.batch_records):
        labels = _read(values[start : start + settings.batch_records])
        batch = prepare(labels, [True] * len(labels), rows).batch
        assert batch is not None
        batches.append(batch)
    model = PreRanker(workload.load.dim, settings.dim, settings.seed)
    model.grow(users.size, items.size)
    loss = LossConfig(
        settings.loss, settings.pseudo_weight, settings.negatives_weight, settings.negatives, personal=settings.personal
    )
    learner = Learner(model, loss, settings.learning_rate, settings.weight_decay)
    timed = warm // settings.batch_records
    for batch in batches[:timed]:
        learner.step(batch, catalogue.vectors)
    clock = _Clock()
    for batch in batches[timed:]:
        learner.step(batch, catalogue.vectors)
    return clock.throughput(workload, sum(len(batch.user_row) for batch in batches[timed:]))


def _in_memory(workload: Workload, values: list[bytes], warm: int, settings: TrainerSettings) -> Throughput:
    trainer = Trainer(settings, workload.frame, workload.catalogue(), evaluations=False)
    size = settings.batch_records

    def train(first: int, end: int) -> None:
        for start in range(first, end, size):
            trainer.train(_read(values[start : start + size]))

    train(0, warm)
    clock = _Clock()
    train(warm, len(values))
    return clock.throughput(workload, len(values) - warm)


def _read(values: list[bytes]) -> list[Columns]:
    return [label for label in intake.read(values) if isinstance(label, Columns)]


def _from_kafka(
    workload: Workload, total: int, warm: int, settings: Settings, group: Group | None = None
) -> Throughput:
    with loop.Loop(settings, workload.frame, None, StartFrom.parse("latest"), group) as running:
        while sum(running.positions.values()) < warm:
            running.round()
        first, clock = sum(running.positions.values()), _Clock()
        while sum(running.positions.values()) < total:
            running.round()
        running.finish()
        return clock.throughput(workload, total - first)


def _over_ranks(workload: Workload, total: int, warm: int, settings: Settings, ranks: int) -> Throughput:
    """Rank 0's wall time and the processor time of all."""
    context = multiprocessing.get_context("spawn")
    found: Any = context.Queue()
    with tempfile.TemporaryDirectory(prefix="gpl-ranks-") as name:
        directory = Path(name)
        places = {"checkpoints": directory / "checkpoints", "models": directory / "models"}
        own = settings.model_copy(update={"trainer": settings.trainer.model_copy(update=places)})
        meet = (directory / "meet").as_uri()
        shared = workload.load, total, warm, own, torch.get_num_threads(), found
        processes = [context.Process(target=_rank, args=(rank, ranks, meet, *shared)) for rank in range(ranks)]
        by_rank: dict[int, Throughput] = {}
        try:
            for process in processes:
                process.start()
            while len(by_rank) < ranks:
                try:
                    by_rank.update([found.get(timeout=1)])
                except queue.Empty:
                    if any(process.exitcode for process in processes):
                        raise ProcessEndedError("a rank has ended by itself; its output tells why") from None
            for process in processes:
                process.join()
        finally:
            for process in processes:
                if process.is_alive():  # it waits for a rank that is gone
                    process.terminate()
                    process.join()
    return replace(by_rank[0], processor=sum(of.processor for of in by_rank.values()))


def _rank(
    rank: int, ranks: int, meet: str, load: Load, total: int, warm: int, settings: Settings, threads: int, found: Any
) -> None:
    torch.set_num_threads(threads)
    workload = Workload(load)
    gc.freeze()  # as the other figures have it
    with Processes(rank, ranks, meet) as group:
        found.put((rank, _from_kafka(workload, total, warm, settings, group)))


class Topics:
    """A run's own topics, with the catalogue on them."""

    def __init__(self, kafka: KafkaSettings, workload: Workload) -> None:
        self.kafka = kafka
        topics.create(kafka)
        self._producer = producer(kafka)
        self._labels = full_name(kafka, "labels")
        vectors = full_name(kafka, "item-vectors")
        for key, value in workload.item_vectors():
            self._producer.send(vectors, key=key, value=value)
        self._producer.flush()

    def send(self, labels: list[tuple[bytes, bytes]]) -> None:
        """All at once, and wait."""
        for key, value in labels:
            self._producer.send(self._labels, key=key, value=value)
        self._producer.flush()

    def send_at(self, labels: list[tuple[bytes, bytes]], rate: float) -> list[Any]:
        """On a timetable of ``rate`` a second. Returns what the broker answered to each."""
        futures = []
        started = time.perf_counter()
        for n, (key, value) in enumerate(labels):
            ahead = started + n / rate - time.perf_counter()
            if ahead > 0:
                time.sleep(ahead)
            futures.append(self._producer.send(self._labels, key=key, value=value))
        self._producer.flush()
        return [future.get(60) for future in futures]

    def close(self) -> None:
        self._producer.close()


class Announcements(threading.Thread):
    """Notes when each model was announced from now on, as a scorer learns it: (wall seconds, announcement)."""

    def __init__(self, kafka: KafkaSettings) -> None:
        super().__init__(daemon=True)
        self.seen: list[tuple[float, ModelUpdate]] = []
        self._view = LogView(kafka, {"model-updates": self._note})
        self._view.warm_up()
        self.seen.clear()  # models of earlier runs
        self._stop_asked = threading.Event()

    def run(self) -> None:
        with closing(self._view):
            while not self._stop_asked.is_set():
                self._view.apply(self._view.fetch(0.05))

    def stop(self) -> None:
        self._stop_asked.set()
        self.join()

    def _note(self, record: Any) -> None:
        self.seen.append((time.time(), decode(ModelUpdate, record.value)))


@dataclass(frozen=True)
class Freshness:
    """``asked``, ``sent``: label records a second. ``delays``: seconds from a record's publication (its Kafka time) to
    the announcement of a model trained on it. ``missing``: records in no model when the run ended."""

    asked: float
    sent: float
    delays: NDArray[np.float64]
    missing: int
    models: int

    def percentile(self, q: float) -> float:
        return float(np.percentile(self.delays, q)) if len(self.delays) else float("nan")

    def to_dict(self) -> dict[str, float]:
        delays = {f"p{q}": self.percentile(q) for q in (50, 95, 99)}
        return {"asked": self.asked, "sent": self.sent, **delays, "missing": self.missing, "models": self.models}

    def line(self) -> str:
        delays = "  ".join(f"p{q} {self.percentile(q):.1f} s" for q in (50, 95, 99))
        missing = f"; {self.missing} records in none" if self.missing else ""
        return (
            f"{self.sent:6,.0f} of {self.asked:,.0f} label records/s: in a model after {delays}; {self.models} models"
            f"{missing}"
        )


def freshness(
    workload: Workload, at: Topics, settings: Settings, rate: float, seconds: float, first: int, patience: float = 60.0
) -> Freshness:
    """Publish at a rate beside a running trainer; wait until all of it is in a model, ``patience`` seconds at most."""
    labels = workload.labels(int(rate * seconds), first)
    announcements = Announcements(at.kafka)
    announcements.start()
    try:
        started = time.perf_counter()
        answers = at.send_at(labels, rate)
        took = time.perf_counter() - started
        want: dict[str, int] = {}
        for answer in answers:
            want[str(answer.partition)] = max(want.get(str(answer.partition), 0), answer.offset + 1)
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline and not _covers(announcements.seen, want):
            time.sleep(0.1)
    finally:
        announcements.stop()
    delays, missing = [], 0
    for answer in answers:
        p = str(answer.partition)
        when = next((t for t, update in announcements.seen if update.source_offsets.get(p, 0) > answer.offset), None)
        if when is None:
            missing += 1
        else:
            delays.append(when - answer.timestamp / 1000)
    new = len({update.version for _, update in announcements.seen})
    return Freshness(rate, len(answers) / took, np.array(delays), missing, new)


def _covers(seen: list[tuple[float, ModelUpdate]], want: dict[str, int]) -> bool:
    return bool(seen) and all(seen[-1][1].source_offsets.get(p, 0) >= end for p, end in want.items())


@contextmanager
def running_trainer(settings: Settings, frame: Frame) -> Iterator[None]:
    """The trainer's loop in a process of its own, stopped at the end."""
    context = multiprocessing.get_context("spawn")
    stop = context.Event()
    journal = BatchJournal(open_storage(settings.trainer.checkpoints))
    before = len(journal.runs())
    process = context.Process(target=loop.run, args=(settings, stop, None, None, frame), daemon=True)
    process.start()
    try:
        while len(journal.runs()) == before:  # it begins a run once it is ready
            if process.exitcode is not None:
                raise ProcessEndedError("the trainer has ended by itself; its output tells why")
            time.sleep(0.1)
        yield
    finally:
        stop.set()
        process.join(60)
        if process.is_alive():
            process.kill()
            process.join()


def settings_for(kafka: KafkaSettings, directory: Path, **trainer: Any) -> Settings:
    """The trainer's defaults, with places of the run's own."""
    own = TrainerSettings(checkpoints=directory / "checkpoints", models=directory / "models", **trainer)
    return Settings(kafka=kafka, trainer=own)
