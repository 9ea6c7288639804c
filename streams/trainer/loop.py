"""The trainer's loop: labels in; checkpoints, published models and progressive figures out.

Order of what must be durable, each before the next: dead letters and both journals, the checkpoint, the published
model. So a checkpoint never points behind a dead letter that was not written, and a published model never runs ahead
of what a restarted trainer resumes from, nor of the batches from which it can be made again.
"""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Mapping
from contextlib import ExitStack, closing
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec
import structlog
import torch

from gpl.catalogue import Catalogue
from streams import dead_letters, metrics
from streams.frame import Frame
from streams.kafka import producer
from streams.liveness import health_of
from streams.settings import ConfigError, Settings
from streams.storage import InUseError, open_storage
from streams.topics import full_name
from streams.trainer import intake
from streams.trainer.batch_journal import Batch, BatchJournal, Run, ranges, software
from streams.trainer.checkpoint import Checkpoint, CheckpointError, CheckpointStore
from streams.trainer.columns import Columns
from streams.trainer.exported import export
from streams.trainer.gate import Refusal
from streams.trainer.group import Alone, Group
from streams.trainer.journal import Journal
from streams.trainer.publish import Publisher
from streams.trainer.source import LabelSource, OffsetsGoneError, offsets_at
from streams.trainer.start import StartFrom
from streams.trainer.trainer import Trainer
from streams.trainer.vectors import ItemVectors

log = structlog.get_logger()

WAIT_SECONDS = 0.2
"""How long a batch may wait to fill at the end of the log."""
SEND_SECONDS = 60.0
"""How long a dead letter may take to be acknowledged before the trainer gives up."""
EXPORT_SECONDS = 10.0
"""Between computations of the exported progressive figures."""


class TrainingDivergedError(RuntimeError):
    """The model's weights or scores are no numbers any more; nothing of it was saved or published."""


CLEAR = (CheckpointError, ConfigError, InUseError, metrics.AddressError, OffsetsGoneError, TrainingDivergedError)
"""Errors that an operator can put right: their message says all."""


def serve(settings: Settings, stop: threading.Event, start_from: str, skip_to: str | None, group: Group) -> None:
    """``run`` as the one trainer of its checkpoints and models, with metrics and health over HTTP; in a group all of
    that is rank 0's.

    Raises InUseError beside another trainer, AddressError, and as ``run``.
    """
    health = health_of(settings.metrics)
    with ExitStack() as opened:
        if group.rank == 0:
            own = settings.trainer
            _hold(opened, "checkpoints", own.checkpoints)
            if open_storage(own.models).uri("") != open_storage(own.checkpoints).uri(""):
                _hold(opened, "models", own.models)
            _, close = metrics.serve(settings.metrics.host, settings.metrics.port, health)
            opened.callback(close)
        run(settings, stop, health, settings.trainer.journal, None, start_from, skip_to, group)


def _hold(opened: ExitStack, name: str, location: Path | str) -> None:
    try:
        opened.enter_context(open_storage(location).held())
    except InUseError as error:
        raise InUseError(
            f"trainer.{name}: {error}; exactly one `gpl train` per trainer.{name} (more processes that train as one: "
            "--ranks)"
        ) from error


def run(
    settings: Settings,
    stop: threading.Event,
    health: metrics.Health | None = None,
    journal: Path | None = None,
    frame: Frame | None = None,
    start_from: str = "latest",
    skip_to: str | None = None,
    group: Group | None = None,
) -> None:
    """Train until ``stop`` is set, then leave a final checkpoint and, if the gate allows, a final publication.

    Beats "trainer"; ready once the catalogue has been read. ``journal``: file of the evaluation journal, none without.
    ``frame``: the space of vectors and labels, by default that of the artefacts. ``group``: of ranks, by default none.
    ``start_from``, ``skip_to``: see ``start``. Raises TrainingDivergedError, OffsetsGoneError, CheckpointError for a
    start that there is not, or that other settings made, and what the broker or the disk raises: a restarted process
    continues from the newest valid checkpoint.
    """
    health = health or metrics.Health()
    health.wait_for("trainer")
    start = StartFrom.parse(start_from, skip_to)
    with Loop(settings, frame or Frame.load(settings.artefacts), journal, start, group) as loop:
        health.done("trainer")
        # What was loaded stays: the collector need not walk through it each time that labels have filled its quota.
        gc.freeze()
        try:
            while loop.round(stop.is_set()):
                health.beat("trainer")
        except dead_letters.Halted as why:
            # The checkpoint is of before its batch: a restarted trainer reads the refused record again.
            health.halt("trainer", str(why))
            log.error("halted", why=str(why))
            stop.wait()
            return
        finally:
            gc.unfreeze()  # or torch's native parts, never let go of, are reported as leaks when the process ends
        loop.finish()


class Loop:
    """What ``run`` repeats, over the connections and files that it holds open."""

    def __init__(
        self,
        settings: Settings,
        frame: Frame,
        journal: Path | None,
        start: StartFrom,
        group: Group | None = None,
    ) -> None:
        self._settings = settings
        self._group = group or Alone()
        self._leads = self._group.rank == 0
        self._frame = frame
        own = settings.trainer
        catalogue = Catalogue(frame.dim, frame.levels)
        storage = open_storage(own.checkpoints)
        if self._leads:
            storage.recover()
        self._store = CheckpointStore(storage, own.keep_checkpoints, own.keep_hourly_checkpoints)
        self._batches = BatchJournal(storage)
        self._agree_on_threads()
        each = None if self._group.ranks == 1 else self._group.each
        self._trainer = Trainer(own, frame, catalogue, evaluations=journal is not None, each=each)
        checkpoint = self._checkpoint(start)
        self._journal_length = 0 if checkpoint is None else self._trainer.restore(checkpoint)
        self._journal: Journal | None = None
        self._dead: list[Any] = []
        self._guard = dead_letters.Guard(settings.dead_letters)
        with ExitStack() as opened:
            evaluations = None
            if self._leads and journal is not None:
                evaluations = opened.enter_context(closing(Journal(journal)))
            vectors = ItemVectors(settings.kafka, frame, catalogue, self._group)
            self._vectors = opened.enter_context(closing(vectors))
            positions = self._positions(start, checkpoint)
            self._source = opened.enter_context(closing(LabelSource(settings.kafka, positions, group=self._group)))
            if self._leads:
                self._producer = opened.enter_context(closing(producer(settings.kafka)))
                self._publisher = opened.enter_context(closing(Publisher(settings.kafka, own, self._producer)))
            self._opened = opened.pop_all()
        now = time.monotonic()
        self._next_checkpoint = now + own.checkpoint_every_wall_seconds
        self._next_publication = now + own.publish_every_wall_seconds
        self._next_export = now
        # From here on the start is made, and all that it needs is there.
        self._begin(start, checkpoint)
        if evaluations is not None:
            evaluations.cut(self._journal_length)
            self._journal = evaluations
        log.info(
            "trainer_ready",
            rank=self._group.rank,
            step=self._trainer.step_count,
            positions=self._source.positions,
            items=len(catalogue),
            start_from=start.text,
        )

    def _begin(self, start: StartFrom, checkpoint: Checkpoint | None) -> None:
        parent = None if checkpoint is None else checkpoint.run
        if self._leads:
            self._run = self._batches.begin(lambda number: self._header(number, parent, start)).run
        if checkpoint is not None and start.skip_to is not None:
            # The other positions become a step of their own, of no records: the checkpoint gone back to stays as it is.
            self._trainer.train([])
            self._written_down([])
        if not self._leads:
            return
        self._saved = -1 if checkpoint is None else checkpoint.step
        if start.kind in ("earliest", "time") or start.skip_to is not None:
            self._save()
        if start.kind != "latest":
            # Behind the save, and the journal is cut behind this: whenever a kill comes, a restart goes on as if there
            # had been no such start, or from here.
            self._store.discard_after(self._saved)
        self._exported_step = self._trainer.step_count

    # What rank 0 decides, and the others are told

    def _from_lead(self, said: bytes) -> bytes:
        return self._group.gather(said if self._leads else b"")[0]

    def _agree_on_threads(self) -> None:
        if self._group.ranks > 1:  # the last bits of a sum depend on their number
            torch.set_num_threads(int(self._from_lead(b"%d" % torch.get_num_threads())))

    def _checkpoint(self, start: StartFrom) -> Checkpoint | None:
        found = start.checkpoint(self._store) if self._leads else None
        step = int(self._from_lead(b"%d" % (-1 if found is None else found.step)))
        return found if self._leads or step < 0 else StartFrom("step", step).checkpoint(self._store)

    def _positions(self, start: StartFrom, checkpoint: Checkpoint | None) -> Mapping[int, int]:
        positions = {} if checkpoint is None else checkpoint.positions
        if self._leads:
            if start.kind == "time":
                positions = offsets_at(self._settings.kafka, start.value)
            if start.skip_to is not None:
                ahead = offsets_at(self._settings.kafka, start.skip_to)
                positions = {p: max(at, positions.get(p, 0)) for p, at in ahead.items()}
        return msgspec.msgpack.decode(self._from_lead(msgspec.msgpack.encode(positions)), type=dict[int, int])

    def __enter__(self) -> Loop:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._opened.close()

    @property
    def positions(self) -> Mapping[int, int]:
        """Next offset to train on, per partition of the labels."""
        return self._source.positions

    def round(self, stop: bool = False) -> bool:
        """Bring the catalogue up to date, train on at most one batch, and do what has fallen due.

        False, and nothing more is done, when this rank or another is asked to ``stop``.
        """
        if self._vectors.follow(stop):
            return False
        before = dict(self._source.positions)
        records = self._source.take(self._settings.trainer.batch_records, WAIT_SECONDS)
        if records:
            try:
                self._train(records)
            except dead_letters.Halted:
                self._source.positions = before
                if self._leads:
                    self._save()
                raise
            self._written_down(ranges(before, self._source.positions))
        if self._leads:
            self._do_what_is_due()
        return True

    def finish(self) -> None:
        """Leave nothing that was trained on behind: checkpoint, publish, export."""
        if self._leads:
            self._publish()
            self._export()

    def _written_down(self, read: list[tuple[int, int, int]]) -> None:
        """The step just taken is the journal's next batch."""
        if self._leads:
            self._batches.append(Batch(read, self._vectors.moved, self._trainer.loss))
            self._vectors.settle()

    def _do_what_is_due(self) -> None:
        now = time.monotonic()
        if now >= self._next_export:
            self._export()
            self._next_export = time.monotonic() + EXPORT_SECONDS
        if now >= self._next_publication:
            self._publish()
            self._next_publication = time.monotonic() + self._settings.trainer.publish_every_wall_seconds
        if now >= self._next_checkpoint:
            self._save()
            self._next_checkpoint = time.monotonic() + self._settings.trainer.checkpoint_every_wall_seconds

    def _train(self, records: list[Any]) -> None:
        labels: list[Columns] = []
        read = intake.read_records(records, self._group.ranks, self._settings.labels.max_ahead_seconds)
        for record, found in zip(records, read, strict=True):
            if isinstance(found, Columns):
                self._guard.accepted(record.topic, record.partition)
                labels.append(found)
            else:
                self._dead_letter(record, found)
        metrics.EVENTS.labels("labels").inc(len(records))
        metrics.TRAINER_LAG_SECONDS.set(max(0.0, time.time() - max(r.timestamp for r in records) / 1000))
        try:
            lines = self._trainer.train(labels, intake.newest_source_at(records))
        except FloatingPointError as error:
            raise self._diverged(error) from error
        if self._journal is not None:
            self._journal.append(lines)

    def _diverged(self, error: FloatingPointError) -> TrainingDivergedError:
        if self._leads:
            self._publisher.refuse(Refusal("not_finite", str(error)), self._trainer.step_count)
        return TrainingDivergedError(
            f"{error}. The last checkpoint and the published models are sound. Trained on "
            "again with the same settings the same happens: lower trainer.learning_rate, or start from before it "
            "(gpl train --start-from before=TIME)"
        )

    def _dead_letter(self, record: Any, error: Exception) -> None:
        original = dead_letters.Original.of(record)
        self._guard.refused(original.topic, original.partition, original.offset, error)
        if not self._leads:
            return
        metrics.DEAD_LETTERS.labels("labels", dead_letters.reason_of(error)).inc()
        log.warning("dead_letter", topic=record.topic, partition=record.partition, offset=record.offset, why=str(error))
        sent = self._producer.send(
            full_name(self._settings.kafka, dead_letters.TOPIC),
            key=record.key,
            value=dead_letters.value_of(original),
            headers=dead_letters.headers(original, error),
        )
        self._dead.append(sent)

    def _save(self) -> None:
        if self._trainer.step_count == self._saved:
            return
        for sent in self._dead:
            sent.get(timeout=SEND_SECONDS)
        self._dead.clear()
        if self._journal is not None:
            self._journal_length = self._journal.sync()
        self._batches.sync()
        try:
            checkpoint = self._trainer.checkpoint(
                self._source.positions, self._journal_length, self._run, self._vectors.positions
            )
        except FloatingPointError as error:
            raise self._diverged(error) from error
        self._store.save(checkpoint)
        self._saved = self._trainer.step_count
        metrics.CHECKPOINT_TIME.set(time.time())
        self._batches.prune(self._settings.trainer.journal_days)

    def _publish(self) -> None:
        self._save()
        if self._trainer.step_count:
            self._publisher.publish(self._trainer.candidate(self._source.positions, self._run))

    def _export(self) -> None:
        for partition, behind in self._source.lag().items():
            metrics.CONSUMER_LAG.labels("labels", str(partition)).set(behind)
        if self._trainer.step_count == self._exported_step:
            return
        self._exported_step = self._trainer.step_count
        export(self._trainer)

    def _header(self, number: int, parent: int | None, start: StartFrom) -> Run:
        return Run(
            run=number,
            parent=parent,
            step=self._trainer.step_count,
            start_from=start.text,
            positions=dict(self._source.positions),
            vectors=dict(self._vectors.positions),
            settings=self._settings.trainer.model_dump(mode="json"),
            versions=self._frame.versions,
            threads=torch.get_num_threads(),
            software=software(),
            started_at=int(time.time() * 1000),
            ranks=self._group.ranks,
            max_ahead_seconds=self._settings.labels.max_ahead_seconds,
        )
