"""The labels that production recorded: of each request the highest revision, found again by request id.

They are kept in a file of their own while a comparison runs, so memory does not grow with the range.
"""

from __future__ import annotations

import sqlite3
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec

from streams.contracts import Label, decode
from streams.labels import published
from streams.replay.log import Entry, Log
from streams.replay.select import Selection

CLOCK_SKEW_MS = 60_000
"""Producers' clocks are taken to agree within this: a label is appended after its recall."""

_SCHEMA = """
PRAGMA journal_mode = OFF;
PRAGMA synchronous = OFF;
CREATE TABLE recorded (
    request_id TEXT PRIMARY KEY, revision INTEGER, offset INTEGER, kafka_ms INTEGER, value BLOB, met INTEGER DEFAULT 0
);
"""
_PUT = """
INSERT INTO recorded (request_id, revision, offset, kafka_ms, value) VALUES (?, ?, ?, ?, ?)
ON CONFLICT (request_id) DO UPDATE SET
    revision = excluded.revision, offset = excluded.offset, kafka_ms = excluded.kafka_ms, value = excluded.value
    WHERE excluded.revision > recorded.revision
"""


@dataclass(frozen=True, slots=True)
class Recorded:
    """A label record as it is on the log."""

    label: Label
    offset: int
    kafka_ms: int


def request_id_of(entry: Entry) -> str | None:
    """Request id of a label entry, from its header, or from its value where it has none; None for what is no label."""
    for name, data in entry.headers:
        if name == published.REQUEST_ID and data is not None:
            return data.decode(errors="replace")
    label = label_of(entry)
    return None if label is None else label.request_id


def label_of(entry: Entry) -> Label | None:
    """The label of an entry; None when it cannot be read."""
    try:
        return decode(Label, entry.value or b"")
    except msgspec.DecodeError:
        return None


class RecordedLabels:
    """The recorded labels of one partition that the selection chooses, as of the end of the log."""

    def __init__(self, log: Log, partition: int, selection: Selection, since_kafka_ms: int) -> None:
        """``since_kafka_ms``: when the first chosen recall was logged."""
        self.read = 0
        self.unreadable = 0
        self._directory = tempfile.TemporaryDirectory(prefix="gpl-replay-")
        self._db = sqlite3.connect(Path(self._directory.name) / "recorded.sqlite", isolation_level=None)
        self._db.executescript(_SCHEMA)
        self._db.execute("BEGIN")
        start = log.offset_at("labels", partition, max(0, since_kafka_ms - CLOCK_SKEW_MS))
        for entry in log.read("labels", partition, start):
            self.read += 1
            label = label_of(entry)
            if label is None:
                self.unreadable += 1
            elif selection.label(label):
                row = (label.request_id, label.revision, entry.offset, entry.kafka_ms, entry.value)
                self._db.execute(_PUT, row)

    def __enter__(self) -> RecordedLabels:
        return self

    def __exit__(self, *_: object) -> None:
        self._db.close()
        self._directory.cleanup()

    def take(self, request_id: str) -> Recorded | None:
        """The newest recorded label of a request, counted as met; None when there is none."""
        row = self._db.execute(
            "UPDATE recorded SET met = 1 WHERE request_id = ? RETURNING value, offset, kafka_ms", (request_id,)
        ).fetchone()
        return None if row is None else Recorded(decode(Label, row[0]), row[1], row[2])

    def left(self) -> Iterator[Recorded]:
        """Recorded labels that were not taken, in the order in which they were logged."""
        rows = self._db.execute("SELECT value, offset, kafka_ms FROM recorded WHERE met = 0 ORDER BY offset")
        for value, offset, kafka_ms in rows:
            yield Recorded(decode(Label, value), offset, kafka_ms)
