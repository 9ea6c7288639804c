"""The batch journal: which records of the log each step was trained on, so that any model can be made again from it.

Batches are cut while records arrive, so which records share a batch depends on the moment; everything else is a
function of the batches. Each start of a trainer is a *run* with a header that names the run and step it goes on from,
and the settings in force. A run's batches stand in segments, rewritten until full, each sync durable before the
checkpoint that includes it. Nothing is taken back: what a crash lost of a run stays behind the step from which
the next run goes on, so a model keeps its history also when a later start went back behind it.

    journal/000003.json                        run 3
    journal/000003-0000012001.json.gz          its batches from step 12,001 on
"""

from __future__ import annotations

import gzip
import platform
import re
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from typing import Any

import msgspec
import structlog
import torch

from streams.storage import Storage

log = structlog.get_logger()

DIRECTORY = "journal"
SEGMENT_BATCHES = 4096
"""A segment is full at; it is written anew at each checkpoint until then."""

_HEADER = re.compile(r"(\d{6,})\.json")
_SEGMENT = re.compile(r"(\d{6,})-(\d{10,})\.json\.gz")


class JournalError(ValueError):
    """A journal that does not lead to the step that is asked for; the message says where it breaks off."""


class Run(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One start of a trainer. It goes on from ``step`` of run ``parent``; from nothing when that is None.

    ``positions``, ``vectors``: next offsets of the labels and of the item vectors at the start. ``settings``: the
    trainer's; ``threads``, ``ranks``, ``software``: what the last bits of a sum may depend on. ``started_at``: wall
    milliseconds. ``max_ahead_seconds``: of the labels, None in headers older than the field.
    """

    run: int
    parent: int | None
    step: int
    start_from: str
    positions: dict[int, int]
    vectors: dict[int, int]
    settings: dict[str, Any]
    versions: dict[str, str]
    threads: int
    software: dict[str, str]
    started_at: int
    ranks: int = 1
    max_ahead_seconds: float | None = None


class Batch(msgspec.Struct, frozen=True, array_like=True):
    """One step. ``labels``: (partition, first offset, offset behind the last). ``vectors``: (partition, next offset) of
    the item vectors where it has moved on since the step before. ``loss``: None when nothing was trained on."""

    labels: list[tuple[int, int, int]]
    vectors: list[tuple[int, int]]
    loss: float | None


class _Segment(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    run: int
    first_step: int
    written_at: int
    batches: list[Batch]


class BatchJournal:
    """Reads the journal beside the checkpoints and writes the batches of one run."""

    def __init__(self, storage: Storage, clock: Callable[[], float] = time.time) -> None:
        self._storage = storage
        self._clock = clock
        self._run = 0
        self._first_step = 0
        self._batches: list[Batch] = []
        self._synced = 0
        self._pruned_at = 0.0

    # Writing

    def begin(self, make: Callable[[int], Run]) -> Run:
        """Open the next run: its number is one above all there are. ``make`` gives its header for a number."""
        header = make(1 + max(self.runs(), default=0))
        self._storage.put(f"{DIRECTORY}/{header.run:06d}.json", msgspec.json.format(msgspec.json.encode(header)))
        self._run, self._first_step, self._batches, self._synced = header.run, header.step + 1, [], 0
        return header

    def append(self, batch: Batch) -> None:
        """The batch of the next step."""
        self._batches.append(batch)

    def sync(self) -> None:
        """Make all batches durable."""
        if len(self._batches) == self._synced:
            return
        for start in range(0, len(self._batches), SEGMENT_BATCHES):
            batches = self._batches[start : start + SEGMENT_BATCHES]
            first = self._first_step + start
            segment = _Segment(self._run, first, int(self._clock() * 1000), batches)
            data = gzip.compress(msgspec.json.encode(segment), compresslevel=1, mtime=0)
            self._storage.put(f"{DIRECTORY}/{self._run:06d}-{first:010d}.json.gz", data)
        full = len(self._batches) // SEGMENT_BATCHES * SEGMENT_BATCHES
        del self._batches[:full]
        self._first_step += full
        self._synced = len(self._batches)

    def prune(self, days: float) -> None:
        """Let go of segments last written ``days`` before the newest full one or more, and of headers before the oldest
        segment left.

        Not before now: a clock that ran ahead for a moment would end them all. Looks at most once an hour.
        """
        now = self._clock()
        if 0 <= now - self._pruned_at < 3600:
            return
        self._pruned_at = now
        full = [found for found in self._segments() if found < (self._run, self._first_step)]
        newest = next((at for found in reversed(full) if (at := self._written_at(*found)) is not None), 0)
        oldest = min(newest, now * 1000) - days * 86_400_000
        oldest_kept: int | None = None
        for run, first in full:
            at = self._written_at(run, first)
            if at is None or at >= oldest:
                oldest_kept = run
                break
            self._storage.remove(f"{DIRECTORY}/{run:06d}-{first:010d}.json.gz")
        for run in self.runs():
            if run < (self._run if oldest_kept is None else oldest_kept):
                self._storage.remove(f"{DIRECTORY}/{run:06d}.json")

    def _written_at(self, run: int, first: int) -> int | None:
        """Of a segment, wall milliseconds; None when it is damaged: a rebuild says so where it needs it."""
        try:
            return self._segment(run, first).written_at
        except JournalError as error:
            log.warning("journal_segment_damaged", run=run, first_step=first, why=str(error))
            return None

    # Reading

    def runs(self) -> list[int]:
        """Numbers of all runs, ascending."""
        return sorted(int(m[1]) for name in self._storage.names(DIRECTORY) if (m := _HEADER.fullmatch(name)))

    def header(self, run: int) -> Run:
        """Raises JournalError when it is missing or damaged."""
        try:
            return msgspec.json.decode(self._storage.read(f"{DIRECTORY}/{run:06d}.json"), type=Run)
        except FileNotFoundError as error:
            raise JournalError(f"run {run}: no header in the journal") from error
        except ValueError as error:
            raise JournalError(f"run {run}: {error}") from error

    def holds(self, run: int, step: int) -> bool:
        """Whether a segment of the run begins with this step."""
        return (run, step) in self._segments()

    def lineage(self, run: int, step: int) -> list[tuple[Run, int]]:
        """The runs that lead to a step, oldest first, each with the last step that belongs to it.

        Goes back as far as there are headers: the first one's ``parent`` is None, or was let go of.
        """
        chain: list[tuple[Run, int]] = []
        at: int | None = run
        while at is not None:
            try:
                header = self.header(at)
            except JournalError:
                if not chain:
                    raise
                break
            if step < header.step:
                raise JournalError(f"run {at} begins at step {header.step}, step {step} of it is asked for")
            chain.append((header, step))
            at, step = header.parent, header.step
        return chain[::-1]

    def batches(self, run: int, after: int, to: int) -> Iterator[tuple[int, Batch]]:
        """Steps ``after + 1`` to ``to`` of a run with their batches. Raises JournalError when one is missing."""
        step = after
        for of, first in self._segments():
            if of != run or step == to:
                continue
            segment = self._segment(run, first)
            if first > step + 1:
                break
            for batch in segment.batches[step + 1 - first : to + 1 - first]:
                step += 1
                yield step, batch
        if step != to:
            raise JournalError(f"run {run}: the journal holds no batch of step {step + 1}")

    def _segments(self) -> list[tuple[int, int]]:
        found = (_SEGMENT.fullmatch(name) for name in self._storage.names(DIRECTORY))
        return sorted((int(m[1]), int(m[2])) for m in found if m)

    def _segment(self, run: int, first: int) -> _Segment:
        name = f"{DIRECTORY}/{run:06d}-{first:010d}.json.gz"
        try:
            return msgspec.json.decode(gzip.decompress(self._storage.read(name)), type=_Segment)
        except FileNotFoundError as error:
            raise JournalError(f"{name} is missing") from error
        except (ValueError, OSError, EOFError, zlib.error) as error:
            raise JournalError(f"{name}: {error}") from error


def ranges(before: Mapping[int, int], after: Mapping[int, int]) -> list[tuple[int, int, int]]:
    """What was read between two positions, as a batch names it."""
    return [(p, before[p], end) for p, end in sorted(after.items()) if end != before[p]]


def software() -> dict[str, str]:
    """What the last bits of the weights may depend on: versions, and the kind of processor."""
    versions = {name: version(name) for name in ("gpl-streams", "torch", "numpy")}
    return {**versions, "machine": platform.machine(), "vectors": torch.backends.cpu.get_cpu_capability()}
