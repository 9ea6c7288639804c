"""A request found by its id: its newest label, and its recall. The newest part of the log is looked at first."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import msgspec
from kafka.partitioner.default import murmur2

from streams.contracts import Recall, decode
from streams.labels import published
from streams.replay.log import Entry, Log
from streams.replay.recorded import Recorded, label_of

_CHUNK = 1_000
_LARGEST = 50_000


@dataclass(frozen=True)
class Hints:
    """What is known of a request: its user, event times between which its recall lies. ``ahead_ms``: how far an event
    may be ahead of its Kafka time."""

    user: str | None = None
    from_ms: int | None = None
    ahead_ms: int = 0


@dataclass(frozen=True)
class Found:
    """``recorded``: None where no label is on the log; ``recall``: None where it has expired. Not both."""

    recorded: Recorded | None
    recall: Entry | None

    def decoded(self) -> Recall | None:
        return None if self.recall is None else decode(Recall, self.recall.value or b"")


def find(log: Log, request_id: str, hints: Hints) -> Found | None:
    """The request; None when neither a label nor a recall of it is on the log."""
    named = request_id.encode()

    def is_label(entry: Entry) -> bool:
        ids = [value for name, value in entry.headers if name == published.REQUEST_ID]
        if ids:
            return named in ids
        label = label_of(entry)
        return label is not None and label.request_id == request_id

    def is_recall(entry: Entry) -> bool:
        try:
            return entry.value is not None and decode(Recall, entry.value).request_id == request_id
        except msgspec.DecodeError:
            return False

    entry = _newest(log, "labels", hints, is_label)
    label = None if entry is None else label_of(entry)
    if entry is None or label is None:
        recall = _newest(log, "recalls", hints, is_recall)
        return None if recall is None else Found(None, recall)
    recorded = Recorded(label, entry.offset, entry.kafka_ms)
    partition, offset = label.provenance.recall
    recall = None
    if partition in log.partitions("recalls"):
        recall = next(log.read("recalls", partition, offset, offset + 1), None)
    return Found(recorded, recall if recall is not None and is_recall(recall) else None)


def partition_of(user: str, count: int) -> int:
    """Where Kafka's default partitioner puts the records of a user."""
    return int((murmur2(user.encode()) & 0x7FFFFFFF) % count)


def _newest(log: Log, topic: str, hints: Hints, wanted: Callable[[Entry], bool]) -> Entry | None:
    """The last entry that is wanted, of the partitions in turn; the likely partition of a known user alone first."""
    every = log.partitions(topic)
    turns = [every]
    if hints.user is not None and every:
        likely = every[partition_of(hints.user, len(every))]
        turns = [[likely], [p for p in every if p != likely]]
    for partitions in turns:
        readers = [_backwards(log, topic, p, hints) for p in partitions]
        while readers:
            for reader in list(readers):
                chunk = next(reader, None)
                if chunk is None:
                    readers.remove(reader)
                    continue
                found = [entry for entry in chunk if wanted(entry)]
                if found:
                    return found[-1]
    return None


def _backwards(log: Log, topic: str, partition: int, hints: Hints) -> Iterator[list[Entry]]:
    """A partition in growing pieces from its end on, each in order."""
    span = log.span(topic, partition)
    first, end, size = span.start, span.end, _CHUNK
    if hints.from_ms is not None:
        first = log.offset_at(topic, partition, hints.from_ms - hints.ahead_ms)
    while end > first:
        start = max(first, end - size)
        yield list(log.read(topic, partition, start, end))
        end, size = start, min(2 * size, _LARGEST)
