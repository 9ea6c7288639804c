"""Checking a data directory before it is streamed: every bad record by file, line, field and reason.

Errors are records that would end in the dead letters or contradict another record. Warnings are what the stream takes
but counts: candidates unknown to the catalogue, feedback that joins no request. Warnings that can come by the
million are tallied: one problem with the first line and the count. Memory holds the ids, never the records.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np

from streams.contracts import Feedback, Item, Recall, Record
from streams.data.reader import FILES, Entry, lines, parse

R = TypeVar("R", bound=Record)
Severity = Literal["error", "warning"]


@dataclass(frozen=True)
class Problem:
    """``line`` 0 means the file as a whole; ``field`` "" the record as a whole."""

    file: str
    line: int
    field: str
    reason: str
    severity: Severity = "error"


@dataclass
class _Tally:
    """One kind of warning, counted: where it came first, how often, and an example."""

    file: str
    field: str
    what: str
    line: int = 0
    count: int = 0
    example: str = ""

    def add(self, line: int, example: str, count: int = 1) -> None:
        if not self.count:
            self.line, self.example = line, example
        self.count += count

    def problem(self) -> Iterator[Problem]:
        if self.count:
            reason = f"{self.count} {self.what}; the first: {self.example!r}"
            yield Problem(self.file, self.line, self.field, reason, "warning")


@dataclass
class _Known:
    """Ids met so far, for the checks across records and files."""

    items: dict[str, int] = field(default_factory=dict)  # id -> line
    requests: dict[str, tuple[int, str, int]] = field(default_factory=dict)  # id -> (line, user, ts)
    events: dict[str, int] = field(default_factory=dict)


def validate(
    directory: Path, max_bytes: int = 8 * 2**20, window_seconds: float | None = None, until: int | None = None
) -> list[Problem]:
    """All problems of a data directory, in file and line order. Use ``problems`` to have them one by one."""
    return list(problems(directory, max_bytes, window_seconds, until))


def problems(
    directory: Path, max_bytes: int = 8 * 2**20, window_seconds: float | None = None, until: int | None = None
) -> Iterator[Problem]:
    """Check the three files, the items first.

    ``max_bytes``: cap on one record (``kafka.max_record_bytes``). ``window_seconds``: when given, feedback that comes
    later than this after its recall is counted as a warning, since it would not enter a label. ``until``: when given,
    recalls and feedback of later times (milliseconds) are errors.
    """
    if not directory.is_dir():
        yield Problem(str(directory), 0, "", "no such directory")
        return
    missing = [name for name in FILES if not (directory / name).is_file()]
    for name in missing:
        yield Problem(name, 0, "", "file is missing")
    known = _Known()
    if "items.jsonl" not in missing:
        yield from _items(directory / "items.jsonl", max_bytes, known)
    if "recalls.jsonl" not in missing:
        yield from _recalls(directory / "recalls.jsonl", max_bytes, known, until)
    if "feedback.jsonl" not in missing:
        yield from _feedback(directory / "feedback.jsonl", max_bytes, known, window_seconds, until)


def _parsed(path: Path, kind: type[R], max_bytes: int) -> Iterator[Entry[R] | Problem]:
    """Lines as records or problems: blank lines, unreadable records and an empty file are reported here."""
    found = False
    for line in lines(path, max_bytes):
        if line.blank:
            yield Problem(path.name, line.number, "", "blank line, passed over", "warning")
            continue
        found = True
        entry = parse(line, kind, max_bytes)
        if entry.error is not None:
            yield Problem(path.name, line.number, entry.error.field, entry.error.reason)
        else:
            yield entry
    if not found:
        yield Problem(path.name, 0, "", "file has no records")


def _items(path: Path, max_bytes: int, known: _Known) -> Iterator[Problem]:
    first: tuple[int, int | None] | None = None  # line and embedding dimension of the first item
    for entry in _parsed(path, Item, max_bytes):
        if isinstance(entry, Problem):
            yield entry
            continue
        item, number = entry.record, entry.line.number
        if item is None:
            continue
        if item.item_id in known.items:
            yield _duplicate(path, number, "item_id", item.item_id, known.items[item.item_id])
            continue
        known.items[item.item_id] = number
        dim = None if item.embedding is None else len(item.embedding)
        if first is None:
            first = (number, dim)
        if (problem := content_problem(item, dim, first)) is not None:
            yield Problem(path.name, number, *problem)


def content_problem(item: Item, dim: int | None, first: tuple[int, int | None]) -> tuple[str, str] | None:
    """Field and reason when an item's content cannot stand beside the first item's, None when it can.

    ``dim``: of its embedding, None without; ``first``: line and dimension of the first item.
    """
    first_line, first_dim = first
    if (dim is None) != (first_dim is None):
        have, has = ("no embedding", "has one") if dim is None else ("an embedding", "has none")
        return "embedding", f"{have}, but the item of line {first_line} {has}: all items have one, or none has"
    if dim is None:
        empty = f"empty ({item.text!r}), and the item has no embedding"
        return None if item.text.strip() else ("text", empty)
    if dim != first_dim:
        return "embedding", f"{dim} dimensions, but the item of line {first_line} has {first_dim}"
    with np.errstate(over="ignore"):
        vector = np.asarray(item.embedding, dtype=np.float32)
    if not np.isfinite(vector).all():
        largest = max(item.embedding or [], key=abs)
        return "embedding", f"value {largest!r} does not fit a 32-bit float"
    return None if np.any(vector) else ("embedding", "all values are 0: it has no direction")


def _recalls(path: Path, max_bytes: int, known: _Known, until: int | None) -> Iterator[Problem]:
    unknown = _Tally(path.name, "candidates", "candidates are not in items.jsonl (they will not be labelled)")
    repeated = _Tally(path.name, "candidates", "candidates stand twice or more in their recall (they count once)")
    for entry in _parsed(path, Recall, max_bytes):
        if isinstance(entry, Problem):
            yield entry
            continue
        recall, number = entry.record, entry.line.number
        if recall is None:
            continue
        if recall.request_id in known.requests:
            yield _duplicate(path, number, "request_id", recall.request_id, known.requests[recall.request_id][0])
            continue
        known.requests[recall.request_id] = (number, recall.user_id, recall.ts)
        if until is not None and recall.ts > until:
            yield _ahead(path, number, recall.ts)
        distinct = Counter(recall.candidates)
        strangers = [item for item in distinct if item not in known.items]
        if strangers:
            unknown.add(number, strangers[0], len(strangers))
        if len(distinct) < len(recall.candidates):
            twice = next(item for item, times in distinct.items() if times > 1)
            repeated.add(number, twice, len(recall.candidates) - len(distinct))
    yield from unknown.problem()
    yield from repeated.problem()


def _feedback(
    path: Path, max_bytes: int, known: _Known, window_seconds: float | None, until: int | None
) -> Iterator[Problem]:
    orphans = _Tally(path.name, "request_id", "events name a request that is not in recalls.jsonl (they join nothing)")
    unknown = _Tally(path.name, "item_id", "events name an item that is not in items.jsonl (it gets no score)")
    early = _Tally(path.name, "ts", "events are older than their recall (they do not count)")
    late = _Tally(path.name, "ts", f"events come more than {window_seconds} s after their recall (they do not count)")
    for entry in _parsed(path, Feedback, max_bytes):
        if isinstance(entry, Problem):
            yield entry
            continue
        event, number = entry.record, entry.line.number
        if event is None:
            continue
        if event.event_id in known.events:
            yield _duplicate(path, number, "event_id", event.event_id, known.events[event.event_id])
            continue
        known.events[event.event_id] = number
        if until is not None and event.ts > until:
            yield _ahead(path, number, event.ts)
        if event.item_id not in known.items:
            unknown.add(number, event.item_id)
        if event.request_id is None:
            continue
        request = known.requests.get(event.request_id)
        if request is None:
            orphans.add(number, event.request_id)
            continue
        line, user_id, ts = request
        if event.user_id != user_id:
            reason = f"{event.user_id!r}, but request {event.request_id!r} (recalls.jsonl:{line}) is of {user_id!r}"
            yield Problem(path.name, number, "user_id", reason)
        elif event.ts < ts:
            early.add(number, event.event_id)
        elif window_seconds is not None and event.ts - ts > window_seconds * 1000:
            late.add(number, event.event_id)
    for tally in (orphans, unknown, early, late):
        yield from tally.problem()


def _ahead(path: Path, number: int, ts: int) -> Problem:
    return Problem(path.name, number, "ts", f"{ts}: in the future by this machine's clock")


def _duplicate(path: Path, number: int, name: str, value: str, first: int) -> Problem:
    return Problem(path.name, number, name, f"duplicate: {value!r} stands in line {first} already")
