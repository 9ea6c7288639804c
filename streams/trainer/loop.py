"""The trainer's loop: labels in; checkpoints, published models and progressive figures out.

Order of what must be durable, each before the next: dead letters and the journal, the checkpoint, the published model.
So a checkpoint never points behind a dead letter that was not written, and a published model never runs ahead of
what a restarted trainer resumes from.

Recovery re-cuts the same batches from the same positions (see ``source``). A journal of offset ranges, from which any
published model can be rebuilt also across partitions that were trained live, belongs beside ``source.take``.
"""

from __future__ import annotations

import threading
import time
from contextlib import ExitStack, closing
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec
import structlog

from gpl.catalogue import Catalogue
from streams import dead_letters, metrics
from streams.contracts import Label
from streams.frame import Frame
from streams.kafka import producer
from streams.log_view import LogView
from streams.settings import Settings
from streams.topics import full_name
from streams.trainer import intake
from streams.trainer.checkpoint import CheckpointStore
from streams.trainer.journal import Journal
from streams.trainer.publish import Publisher
from streams.trainer.source import LabelSource
from streams.trainer.trainer import Trainer
from streams.views import CatalogueView

log = structlog.get_logger()

WAIT_SECONDS = 0.2
"""How long a batch may wait to fill at the end of the log."""
SEND_SECONDS = 60.0
"""How long a dead letter may take to be acknowledged before the trainer gives up."""
EXPORT_SECONDS = 2.0
"""Between computations of the exported progressive figures."""


def run(
    settings: Settings,
    stop: threading.Event,
    health: metrics.Health | None = None,
    journal: Path | None = None,
    frame: Frame | None = None,
) -> None:
    """Train until ``stop`` is set, then leave a final checkpoint and, if the gate allows, a final publication.

    Beats "trainer"; ready once the catalogue has been read. ``journal``: file of the evaluation journal, none without.
    ``frame``: the space of vectors and labels, by default that of the artefacts.
    Raises what the broker or the disk raises: a restarted process continues from the newest valid checkpoint.
    """
    health = health or metrics.Health()
    health.wait_for("trainer")
    with Loop(settings, frame or Frame.load(settings.artefacts), journal) as loop:
        health.done("trainer")
        try:
            while not stop.is_set():
                loop.round()
                health.beat("trainer")
        except dead_letters.Halted as why:
            # No checkpoint: a restarted trainer reads the batch with the refused record again.
            health.halt("trainer", str(why))
            log.error("halted", why=str(why))
            stop.wait()
            return
        loop.finish()


class Loop:
    """What ``run`` repeats, over the connections and files that it holds open."""

    def __init__(self, settings: Settings, frame: Frame, journal: Path | None) -> None:
        self._settings = settings
        catalogue = Catalogue(frame.dim, frame.levels)
        self._store = CheckpointStore(settings.trainer.checkpoints, settings.trainer.keep_checkpoints)
        self._trainer = Trainer(settings.trainer, frame, catalogue)
        checkpoint = self._store.load_newest()
        self._journal_length = 0 if checkpoint is None else self._trainer.restore(checkpoint)
        self._dead: list[Any] = []
        self._guard = dead_letters.Guard(settings.dead_letters)
        vectors = CatalogueView(catalogue, frame.dim, frame.encoder, frame.quantiser)
        with ExitStack() as opened:
            self._journal = None
            if journal is not None:
                self._journal = opened.enter_context(closing(Journal(journal, self._journal_length)))
            self._view = opened.enter_context(closing(LogView(settings.kafka, {"item-vectors": vectors})))
            self._view.warm_up()
            positions = {} if checkpoint is None else checkpoint.positions
            self._source = opened.enter_context(closing(LabelSource(settings.kafka, positions)))
            self._producer = opened.enter_context(closing(producer(settings.kafka)))
            self._publisher = Publisher(settings.kafka, settings.trainer, self._producer)
            self._opened = opened.pop_all()
        self._saved = -1 if checkpoint is None else checkpoint.step
        self._exported_step = self._trainer.step_count
        now = time.monotonic()
        self._next_checkpoint = now + settings.trainer.checkpoint_every_wall_seconds
        self._next_publication = now + settings.trainer.publish_every_wall_seconds
        self._next_export = now
        log.info("trainer_ready", step=self._trainer.step_count, positions=self._source.positions, items=len(catalogue))

    def __enter__(self) -> Loop:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._opened.close()

    def round(self) -> None:
        """Bring the catalogue up to date, train on at most one batch, and do what has fallen due."""
        self._view.apply(self._view.fetch(0))
        records = self._source.take(self._settings.trainer.batch_records, WAIT_SECONDS)
        if records:
            self._train(records)
        now = time.monotonic()
        if now >= self._next_export:
            self._export()
            self._next_export = now + EXPORT_SECONDS
        if now >= self._next_publication:
            self._publish()
            self._next_publication = time.monotonic() + self._settings.trainer.publish_every_wall_seconds
        if now >= self._next_checkpoint:
            self._save()
            self._next_checkpoint = time.monotonic() + self._settings.trainer.checkpoint_every_wall_seconds

    def finish(self) -> None:
        """Leave nothing that was trained on behind: checkpoint, publish, export."""
        self._publish()
        self._export()

    def _train(self, records: list[Any]) -> None:
        labels: list[Label] = []
        newest_at: int | None = None
        for record in records:
            try:
                labels.append(intake.parse(record.value))
            except (msgspec.DecodeError, ValueError) as error:
                self._dead_letter(record, error)
                continue
            self._guard.accepted(record.topic, record.partition)
            arrived = intake.newest_at(record.headers)
            if arrived is not None:
                newest_at = max(arrived, newest_at or 0)
        metrics.EVENTS.labels("labels").inc(len(records))
        lines = self._trainer.step(labels, newest_at)
        if self._journal is not None:
            self._journal.append(lines)

    def _dead_letter(self, record: Any, error: Exception) -> None:
        original = dead_letters.Original.of(record)
        self._guard.refused(original.topic, original.partition, original.offset, error)
        metrics.DEAD_LETTERS.labels(original.topic, dead_letters.reason_of(error)).inc()
        log.warning("dead_letter", topic=record.topic, partition=record.partition, offset=record.offset, why=str(error))
        sent = self._producer.send(
            full_name(self._settings.kafka, dead_letters.TOPIC),
            key=record.key,
            value=record.value,
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
        self._store.save(self._trainer.checkpoint(self._source.positions, self._journal_length))
        self._saved = self._trainer.step_count
        metrics.CHECKPOINT_TIME.set(time.time())

    def _publish(self) -> None:
        self._save()
        if self._trainer.step_count:
            self._publisher.publish(self._trainer.candidate(self._source.positions))

    def _export(self) -> None:
        for partition, behind in self._source.lag().items():
            metrics.CONSUMER_LAG.labels(full_name(self._settings.kafka, "labels"), str(partition)).set(behind)
        if self._trainer.step_count == self._exported_step:
            return
        self._exported_step = self._trainer.step_count
        for model, figures in self._trainer.figures().items():
            for name, value in figures.items():
                metrics.PROGRESSIVE.labels(name, model).set(value)
