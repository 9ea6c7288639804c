"""The log as replay reads it: entries of one partition of one topic, from a broker or from a capture."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import msgspec
from kafka import TopicPartition

from streams.contracts import Feedback, Recall, decode, under_its_user
from streams.frame import Frame
from streams.kafka import consumer
from streams.log_view import TopicMissingError
from streams.settings import KafkaSettings
from streams.topics import full_name

STALLED_SECONDS = 60.0
"""Without a record, before the end of a partition, after which reading gives up."""
_POLL_MS = 500
_RECORDS = 2000


class LogError(ValueError):
    """The log cannot give what was asked of it; the message says what and why."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One record. ``topic`` is without prefix, ``kafka_ms`` its Kafka timestamp.

    ``missing``: how many offsets below this one the log does not hold (compacted or expired), so that two entries with
    the same number have nothing missing between them. ``event_ms`` is set where a capture kept only the record's event
    time: it moves the watermark and says nothing else.
    """

    topic: str
    partition: int
    offset: int
    kafka_ms: int
    key: bytes | None
    value: bytes | None
    headers: tuple[tuple[str, bytes | None], ...] = ()
    missing: int = 0
    event_ms: int | None = None


E = TypeVar("E", bound=Recall | Feedback)


def taken(entry: Entry, kind: type[E], max_ahead_seconds: float) -> E | None:
    """The event of a record; None for one that the roles refuse: no such event, from the future, under another key."""
    try:
        event = decode(kind, entry.value or b"")
    except msgspec.DecodeError:
        return None
    if event.ts - entry.kafka_ms > max_ahead_seconds * 1000 or not under_its_user(entry.key, event):
        return None
    return event


@dataclass(frozen=True, slots=True)
class Span:
    """Offsets that a partition held when the log was opened: from ``start`` up to, and without, ``end``."""

    start: int
    end: int

    def __len__(self) -> int:
        return max(0, self.end - self.start)


class Log(Protocol):
    """What can be replayed: fixed when it is opened, so reading it twice gives the same."""

    frame: Frame

    def partitions(self, topic: str) -> list[int]:
        """Partition numbers of a topic, ascending."""
        ...

    def span(self, topic: str, partition: int) -> Span:
        """Offsets held."""
        ...

    def offset_at(self, topic: str, partition: int, kafka_ms: int) -> int:
        """The first offset whose Kafka timestamp is at or after a time; the end when there is none."""
        ...

    def read(self, topic: str, partition: int, start: int | None = None, end: int | None = None) -> Iterator[Entry]:
        """The entries with ``start <= offset < end``, in order; by default all."""
        ...


class BrokerLog:
    """A broker's topics up to their present ends. Every read has a consumer of its own, without a group.

    Raises TopicMissingError for a topic that does not exist, when it is first asked for.
    """

    def __init__(self, kafka: KafkaSettings, frame: Frame) -> None:
        self.frame = frame
        self._kafka = kafka
        self._asking = consumer(kafka)
        self._spans: dict[str, dict[int, Span]] = {}

    def __enter__(self) -> BrokerLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._asking.close()

    def partitions(self, topic: str) -> list[int]:
        return sorted(self._of(topic))

    def span(self, topic: str, partition: int) -> Span:
        try:
            return self._of(topic)[partition]
        except KeyError:
            raise LogError(
                f"topic {full_name(self._kafka, topic)} has no partition {partition}, only {self.partitions(topic)}"
            ) from None

    def _of(self, topic: str) -> dict[int, Span]:
        if topic not in self._spans:
            name = full_name(self._kafka, topic)
            found = self._asking.partitions_for_topic(name)
            if not found:
                raise TopicMissingError(f"topic {name} does not exist; `gpl topics create` makes it")
            tps = [TopicPartition(name, p) for p in sorted(found)]
            starts, ends = self._asking.beginning_offsets(tps), self._asking.end_offsets(tps)
            self._spans[topic] = {tp.partition: Span(starts[tp], ends[tp]) for tp in tps}
        return self._spans[topic]

    def offset_at(self, topic: str, partition: int, kafka_ms: int) -> int:
        span = self.span(topic, partition)
        tp = TopicPartition(full_name(self._kafka, topic), partition)
        found = self._asking.offsets_for_times({tp: max(0, kafka_ms)})[tp]
        return span.end if found is None else min(span.end, max(span.start, found.offset))

    def read(self, topic: str, partition: int, start: int | None = None, end: int | None = None) -> Iterator[Entry]:
        """Raises LogError when the broker gives nothing for a minute before the end."""
        span = self.span(topic, partition)
        first = span.start if start is None else max(start, span.start)
        last = span.end if end is None else min(end, span.end)
        if first >= last:
            return
        tp = TopicPartition(full_name(self._kafka, topic), partition)
        reader = consumer(self._kafka, max_poll_records=_RECORDS)
        try:
            reader.assign([tp])
            reader.seek(tp, first)
            given, silent = 0, 0.0
            while (position := reader.position(tp)) < last:
                batch = reader.poll(timeout_ms=_POLL_MS).get(tp, ())
                silent = 0.0 if batch or reader.position(tp) > position else silent + _POLL_MS / 1000
                if silent >= STALLED_SECONDS:
                    raise LogError(f"{tp.topic}, partition {partition}: nothing comes from offset {position} on")
                for record in batch:
                    if record.offset >= last:
                        return
                    yield _entry(topic, record, record.offset - given if start is None else 0)
                    given += 1
        finally:
            reader.close()


def _entry(topic: str, record: Any, missing: int) -> Entry:
    headers = tuple((name, value) for name, value in record.headers)
    return Entry(topic, record.partition, record.offset, record.timestamp, record.key, record.value, headers, missing)
