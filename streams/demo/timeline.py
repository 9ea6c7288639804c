"""A data directory in event-time order: the first part is for fitting, the rest is streamed.

Only an index is held in memory (time, place and size of each line); the lines are read again when they are due, and
go to the topics byte for byte. A line that is no valid record goes too, right after the line before it: what becomes of
it is for the system to say.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from streams.contracts import Feedback, Recall
from streams.data.reader import entries

_FILES = ("recalls.jsonl", "feedback.jsonl")
_TOPICS = ("recalls", "feedback")
_INDEX = np.dtype([("ts", "<i8"), ("file", "i1"), ("offset", "<i8"), ("size", "<i8")])


@dataclass(frozen=True, slots=True)
class Event:
    """A line that is due: its time in milliseconds, the topic without prefix, and its bytes."""

    ts: int
    topic: str
    value: bytes


@dataclass(frozen=True)
class Split:
    """Requests and feedback before ``cut`` (event time, milliseconds) are for fitting.

    Feedback goes with its request, whatever its own time; feedback without one goes by its time.
    """

    cut: int
    training_requests: frozenset[str] = field(repr=False)

    @classmethod
    def of(cls, directory: Path, fraction: float, max_bytes: int) -> Split:
        """Cut where ``fraction`` of all feedback has come. Raises ValueError when there is no feedback at all."""
        feedback = entries(directory / "feedback.jsonl", Feedback, max_bytes)
        times = np.sort(np.fromiter((e.record.ts for e in feedback if e.record is not None), dtype=np.int64))
        if not len(times):
            raise ValueError(f"{directory / 'feedback.jsonl'}: no valid record, so there is nothing to learn from")
        at = min(int(len(times) * fraction), len(times) - 1)
        cut = int(times[at]) if fraction < 1 else int(times[-1]) + 1
        recalls = entries(directory / "recalls.jsonl", Recall, max_bytes)
        early = (e.record.request_id for e in recalls if e.record is not None and e.record.ts < cut)
        return cls(cut, frozenset(early))

    def trains(self, event: Feedback) -> bool:
        """Whether this feedback is for fitting."""
        return event.ts < self.cut or event.request_id in self.training_requests

    def training(self, directory: Path, max_bytes: int) -> Iterator[Feedback]:
        """The valid feedback of the first part, in file order."""
        for entry in entries(directory / "feedback.jsonl", Feedback, max_bytes):
            if entry.record is not None and self.trains(entry.record):
                yield entry.record


@dataclass(frozen=True)
class Timeline:
    """What is streamed, by time; at equal times recalls come before feedback, then the order of the files.

    ``requests``: ids of the valid recalls in it. ``unreadable``: lines in it that are no valid record.
    ``over_cap``: lines longer than the cap on a record, which no producer may send; they are not in it.
    """

    directory: Path
    requests: frozenset[str] = field(repr=False)
    unreadable: int
    over_cap: int
    recalls: int
    feedback: int
    _index: NDArray[np.void] = field(repr=False)

    @classmethod
    def build(cls, directory: Path, split: Split, max_bytes: int) -> Timeline:
        """Index the part that is streamed."""
        rows: list[tuple[int, int, int, int]] = []
        requests: set[str] = set()
        unreadable = over_cap = 0
        counts = [0, 0]
        kinds: tuple[type[Recall] | type[Feedback], ...] = (Recall, Feedback)
        for file, kind in enumerate(kinds):
            ts = 0  # of the valid line before; an unreadable first line has none and goes with the fitting part
            for entry in entries(directory / _FILES[file], kind, max_bytes):
                record, line = entry.record, entry.line
                if record is not None:
                    ts = record.ts
                    if isinstance(record, Recall):
                        streamed = ts >= split.cut
                        if streamed:
                            requests.add(record.request_id)
                    else:
                        streamed = not split.trains(record)
                else:
                    streamed = ts >= split.cut
                    over_cap += streamed and line.raw is None
                    streamed = streamed and line.raw is not None
                    unreadable += streamed
                if streamed:
                    rows.append((ts, file, line.offset, line.size))
                    counts[file] += 1
        index = np.array(rows, dtype=_INDEX)
        order = np.lexsort((index["offset"], index["file"], index["ts"]))
        return cls(directory, frozenset(requests), unreadable, over_cap, counts[0], counts[1], index[order])

    def __len__(self) -> int:
        return len(self._index)

    @property
    def span_seconds(self) -> float:
        """Event time from the first to the last event."""
        return float(self._index["ts"][-1] - self._index["ts"][0]) / 1000 if len(self) else 0.0

    def __iter__(self) -> Iterator[Event]:
        with ExitStack() as stack:
            handles = [stack.enter_context((self.directory / name).open("rb")) for name in _FILES]
            for ts, file, offset, size in self._index.tolist():
                handles[file].seek(offset)
                yield Event(ts, _TOPICS[file], handles[file].read(size).rstrip(b"\r\n"))
