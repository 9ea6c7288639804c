"""A published model made again: from the log and the batch journal, or from an older checkpoint of its history.

The batches are read from the log by the offsets that the journal names, in the order in which they were trained on,
with the item vectors as they stood at each. On a CPU with the same software the weights come out bit for bit.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import Any

import structlog
import torch
from kafka import TopicPartition
from kafka.errors import LogTruncationError, OffsetOutOfRangeError

from gpl.catalogue import Catalogue
from gpl.preranker.division import in_one_process
from streams import models
from streams.frame import Frame
from streams.kafka import consumer
from streams.settings import KafkaSettings, Settings, TrainerSettings
from streams.storage import open_storage
from streams.topics import full_name
from streams.trainer import intake
from streams.trainer.batch_journal import Batch, BatchJournal, JournalError, Run, software
from streams.trainer.checkpoint import Checkpoint, CheckpointError, CheckpointStore, Manifest
from streams.trainer.columns import Columns
from streams.trainer.publish import Candidate
from streams.trainer.source import in_merge_order
from streams.trainer.trainer import Trainer
from streams.views import CatalogueView

log = structlog.get_logger()

WAIT_SECONDS = 60.0
"""How long a record that the journal names may take to come from the broker."""


class RebuildError(ValueError):
    """A model that cannot be made again; the message says what is missing."""


@dataclass(frozen=True)
class Rebuilt:
    """``base``: step of the checkpoint that it was made from, None for the log alone. ``steps``: trained again.

    ``differing``: names of tensors, or "ids", that are not bit for bit the published ones. ``first_difference``: step
    whose loss was not the journal's, None when all were. ``software``: what differs from what trained it.
    """

    candidate: Candidate
    base: int | None
    steps: int
    differing: list[str]
    first_difference: int | None
    software: dict[str, tuple[str, str]]


def rebuild(
    settings: Settings,
    version: str,
    base: int | None = None,
    from_log: bool = False,
    frame: Frame | None = None,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> Rebuilt:
    """Make a published version again and compare it with what was published.

    ``base``: step of a checkpoint to begin with; by default the log alone, or, when the log does not reach back so
    far, the oldest checkpoint of the model's history (``from_log`` forbids it). ``progress(steps done, steps)`` is told
    now and then. Raises RebuildError, JournalError, CheckpointError and models.ModelError for what is missing.
    """
    published = models.ModelStore(settings.trainer.models).read(version)
    run, step = published.manifest.run, published.manifest.step
    if not run:
        raise RebuildError(f"{version} was published without a batch journal")
    frame = frame or Frame.load(settings.artefacts)
    storage = open_storage(settings.trainer.checkpoints)
    journal = BatchJournal(storage)
    lineage = journal.lineage(run, step)
    with ExitStack() as opened:
        labels = opened.enter_context(closing(_RangeReader(settings.kafka, "labels")))
        found = _base(CheckpointStore(storage, keep=1), journal, lineage, base, from_log, labels.earliest)
        vectors = opened.enter_context(closing(_RangeReader(settings.kafka, "item-vectors")))
        replay = _Replay(settings, frame, labels, vectors)
        threads = torch.get_num_threads()
        try:
            replay.go(journal, lineage, found, progress)
        except JournalError as error:
            raise JournalError(
                f"{error}; a checkpoint behind it may do: --base STEP of `gpl models checkpoints`"
            ) from error
        finally:
            torch.set_num_threads(threads)
    candidate = replay.trainer.candidate(replay.positions, run)
    return Rebuilt(
        candidate=candidate,
        base=None if found is None else found.step,
        steps=step - (0 if found is None else found.step),
        differing=_differing(published, candidate),
        first_difference=replay.first_difference,
        software=_software(lineage),
    )


def _base(
    store: CheckpointStore,
    journal: BatchJournal,
    lineage: list[tuple[Run, int]],
    wanted: int | None,
    from_log: bool,
    earliest: Mapping[int, int],
) -> Checkpoint | None:
    """The checkpoint to begin with; None for new weights."""
    root = lineage[0][0]
    if wanted is None:
        expired = _expired(root.positions, lineage, earliest)
        # At step 0 weights are new, also where an earlier run began with them and was let go of.
        pruned = root.step > 0 or (lineage[0][1] > 0 and not journal.holds(root.run, 1))
        if not pruned and not expired:
            return None
        if from_log:
            raise RebuildError(
                f"partitions {expired} of the labels no longer reach back to the beginning of its history"
                if expired
                else f"run {root.run} of the journal goes on from step {root.step}, and nothing before it is there"
                if root.step
                else f"the journal no longer reaches back to the beginning of run {root.run}, which its history began "
                "with"
            )
    candidates = store.steps() if wanted is None else [wanted]
    for step in candidates:
        try:
            manifest = store.manifest(step)
            last = next((last for run, last in lineage if run.run == manifest.run), -1)
            if manifest.run == root.parent and step == root.step:  # its run has no header (any more)
                last = step
            ahead = _ahead(lineage, manifest)
            # Where a run begins with it, the run says where: labels may have expired meanwhile.
            first = ahead[0][0]
            begins = first.step == step and first.run != manifest.run
            lost = _expired(first.positions if begins else manifest.positions, ahead, earliest)
            if step > lineage[-1][1]:
                why = "is of a step after the model"
            elif step > last:
                why = f"is of run {manifest.run}, which is not in the model's history up to there"
            elif lost:
                why = f"goes on from records that partitions {lost} of the labels no longer hold"
            else:
                return store.load(step)
        except CheckpointError as error:
            why = str(error)
        if wanted is not None:
            raise RebuildError(f"checkpoint step-{step}: {why}")
    raise RebuildError(
        "the log or the journal no longer reaches back to the beginning of the model's history, and no checkpoint of "
        "it from which they lead on is left"
    )


def _ahead(lineage: list[tuple[Run, int]], base: Checkpoint | Manifest | None) -> list[tuple[Run, int]]:
    """The runs of a history that a rebuild goes through from ``base`` on; never none of them."""
    if base is None:
        return lineage
    # A run that ended with the checkpoint has nothing to train again; the model's own is the last anyway.
    left = [(run, last) for run, last in lineage[:-1] if run.run >= base.run and last > base.step]
    return [*left, lineage[-1]]


def _expired(positions: Mapping[int, int], lineage: list[tuple[Run, int]], earliest: Mapping[int, int]) -> list[int]:
    """Partitions of the labels that no longer hold what is next at ``positions``, or, of those that came later, where
    a run first read them."""
    first = dict(positions)
    for run, _ in lineage:
        for p, at in run.positions.items():
            first.setdefault(p, at)
    return [p for p, at in first.items() if earliest.get(p, 0) > at]


class _Replay:
    """Trains again what the journal names. ``first_difference``: see Rebuilt; ``positions``: of the labels."""

    def __init__(self, settings: Settings, frame: Frame, labels: _RangeReader, vectors: _RangeReader) -> None:
        self._settings = settings
        self._frame = frame
        self._labels = labels
        self._vectors = vectors
        self._catalogue = Catalogue(frame.dim, frame.levels)
        self._view = CatalogueView(self._catalogue, frame.dim, frame.encoder, frame.quantiser)
        self._ranks = 1
        self._ahead_seconds = 0.0
        self.trainer: Trainer
        self.positions: dict[int, int] = {}
        self.first_difference: int | None = None

    def go(
        self,
        journal: BatchJournal,
        lineage: list[tuple[Run, int]],
        base: Checkpoint | None,
        progress: Callable[[int, int], None],
    ) -> None:
        begun = 0 if base is None else base.step
        state, last_step = base, lineage[-1][1]
        first = True
        for run, last in _ahead(lineage, base):
            if run.versions != self._frame.versions:
                raise RebuildError(f"run {run.run} trained in the space {run.versions}, here is {self._frame.versions}")
            torch.set_num_threads(run.threads)
            self._ranks = run.ranks
            ahead = run.max_ahead_seconds
            self._ahead_seconds = self._settings.labels.max_ahead_seconds if ahead is None else ahead
            each = None if run.ranks == 1 else in_one_process(run.ranks)
            self.trainer = Trainer(self._settings_of(run), self._frame, self._catalogue, evaluations=False, each=each)
            if state is not None:
                self.trainer.restore(state)
            # Of a checkpoint that a run began with, the run says where: a backfill knows no positions.
            at = base if base is not None and state is base and base.step > run.step else run
            if first:
                self.positions = dict(at.positions)
                self._labels.seek(self.positions)
                first = False
            self._apply(at.vectors)
            for step, batch in journal.batches(run.run, self.trainer.step_count, last):
                self._train(step, batch)
                if step % 256 == 0:
                    progress(step - begun, last_step - begun)
            state = self.trainer.checkpoint(self.positions, 0, run.run)
        progress(last_step - begun, last_step - begun)

    def _train(self, step: int, batch: Batch) -> None:
        self._apply(dict(batch.vectors))
        gone = [p for p, start, _ in batch.labels if start < self._labels.earliest.get(p, start + 1)]
        if gone:
            raise RebuildError(f"step {step}: partitions {gone} of the labels no longer hold its records")
        records = in_merge_order(self._labels.take(batch.labels))
        read = intake.read_records(records, self._ranks, self._ahead_seconds)
        labels = [found for found in read if isinstance(found, Columns)]
        self.trainer.train(labels, intake.newest_source_at(records))
        self.positions.update({p: end for p, _, end in batch.labels})
        if self.first_difference is None and self.trainer.loss != batch.loss:
            log.warning("rebuild_differs", step=step, loss=self.trainer.loss, journal=batch.loss)
            self.first_difference = step

    def _apply(self, to: Mapping[int, int]) -> None:
        for record in self._vectors.take([(p, 0, end) for p, end in to.items()]):
            try:
                self._view(record)
            except ValueError as error:  # as the trainer did
                log.warning("record passed over", partition=record.partition, offset=record.offset, error=str(error))

    def _settings_of(self, run: Run) -> TrainerSettings:
        """Those of the run; the places are of no consequence, and the figures are not compared."""
        return TrainerSettings(**{**run.settings, "shadow": False, "journal": None})


class _RangeReader:
    """Reads each partition of a topic once, forwards, up to given offsets. ``earliest``: first offset of each."""

    def __init__(self, kafka: KafkaSettings, name: str) -> None:
        topic = full_name(kafka, name)
        # Without a reset: what retention takes away meanwhile must not be passed over.
        self._consumer = consumer(kafka, max_poll_records=500, auto_offset_reset="none")
        try:
            found = sorted(self._consumer.partitions_for_topic(topic) or ())
            if not found:
                raise RebuildError(f"topic {topic} does not exist")
            self._assignment = {p: TopicPartition(topic, p) for p in found}
            self._consumer.assign(list(self._assignment.values()))
            self._consumer.seek_to_beginning(*self._assignment.values())
            begin = self._consumer.beginning_offsets(list(self._assignment.values()))
            self._ends = {tp.partition: end for tp, end in self._consumer.end_offsets(list(begin)).items()}
        except BaseException:
            self._consumer.close()
            raise
        self.earliest: dict[int, int] = {tp.partition: offset for tp, offset in begin.items()}
        self._topic = topic
        self._buffers: dict[int, deque[Any]] = {p: deque() for p in self._assignment}

    def seek(self, positions: Mapping[int, int]) -> None:
        """Go on from these offsets. Raises RebuildError when records from there on are gone."""
        for p, at in positions.items():
            if p not in self._assignment:
                raise RebuildError(f"{self._topic} has no partition {p}")
            if at < self.earliest[p]:
                raise RebuildError(
                    f"{self._topic}, partition {p}: offset {at} is gone, the first is {self.earliest[p]}"
                )
            self._consumer.seek(self._assignment[p], at)

    def take(self, ranges: list[tuple[int, int, int]]) -> list[Any]:
        """Records of each (partition, first, end) up to its end, those before ``first`` left out.

        Raises RebuildError when the topic ends before, or the broker does not give them.
        """
        for p, _, end in ranges:
            if end > self._ends[p]:
                raise RebuildError(
                    f"{self._topic}, partition {p}: offset {end} is asked for, it ends at {self._ends[p]}"
                )
        waits = 0
        try:
            while missing := [p for p, _, end in ranges if not self._holds(p, end)]:
                polled = self._consumer.poll(timeout_ms=1000)
                for tp, records in polled.items():
                    self._buffers[tp.partition].extend(records)
                waits = 0 if polled else waits + 1
                if waits >= WAIT_SECONDS:
                    raise RebuildError(f"{self._topic}, partitions {missing}: no records for {WAIT_SECONDS:.0f} s")
        except (OffsetOutOfRangeError, LogTruncationError) as error:
            raise RebuildError(f"{error}: retention has overtaken the rebuild") from error
        return [record for p, first, end in ranges for record in self._until(p, end) if record.offset >= first]

    def close(self) -> None:
        self._consumer.close()

    def _holds(self, p: int, end: int) -> bool:
        buffer = self._buffers[p]
        # Where records are missing (compaction), the consumer's position tells that there is nothing to wait for.
        return bool(buffer and buffer[-1].offset >= end - 1) or self._consumer.position(self._assignment[p]) >= end

    def _until(self, p: int, end: int) -> Iterator[Any]:
        buffer = self._buffers[p]
        while buffer and buffer[0].offset < end:
            yield buffer.popleft()


def _differing(published: models.Published, made: Candidate) -> list[str]:
    names = sorted(published.weights.keys() | made.weights.keys())
    differing = [
        name
        for name in names
        if name not in published.weights
        or name not in made.weights
        or not _same_bits(published.weights[name], made.weights[name])
    ]
    return differing if published.ids == made.ids else [*differing, "ids"]


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and one.numpy().tobytes() == other.numpy().tobytes()


def _software(lineage: list[tuple[Run, int]]) -> dict[str, tuple[str, str]]:
    """Versions that trained it and that are here, where they differ."""
    differing: dict[str, tuple[str, str]] = {}
    here = software()
    for run, _ in lineage:
        for name, then in run.software.items():
            if then != here.get(name):
                differing[name] = (then, here.get(name, ""))
    return differing
