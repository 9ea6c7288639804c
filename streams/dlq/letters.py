"""The dead letters as they stand in the log: what was refused, and which of it has been sent back since.

The topic is only ever appended to. A consumer that is started again reads what it had not acknowledged and may refuse
a record twice: letters of one origin (topic, partition, offset, timestamp) are one, the first. A letter counts as
redriven once a mark stands behind it: an empty record whose header ``gpl-redriven`` names it. Readers are in no
consumer group and commit nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from kafka import TopicPartition

from streams import dead_letters
from streams.dead_letters import Headers, Original
from streams.kafka import consumer
from streams.log_view import TopicMissingError
from streams.settings import KafkaSettings
from streams.topics import full_name

REDRIVEN = "gpl-redriven"
"""Header of a mark: id of the letter that was sent back."""


@dataclass(frozen=True, slots=True)
class Letter:
    """One dead letter. ``id``: its offset in the dead letters; ``written_ms``: when it was appended.

    ``redrives``: how often the record had been sent back before it was refused this time; ``redriven``: it has been
    sent back since. ``size``: bytes of the original value, None for a null value.
    """

    id: str
    written_ms: int
    original: Original
    error: str
    reason: str
    message: str
    redrives: int
    redriven: bool
    size: int | None


@dataclass(frozen=True, slots=True)
class Filter:
    """Which letters are meant. ``topic``: full name of the origin. Times are of writing, Kafka milliseconds."""

    topic: str | None = None
    reason: str | None = None
    since_ms: int | None = None
    until_ms: int | None = None
    ids: frozenset[str] = frozenset()

    def takes(self, letter: Letter) -> bool:
        """Whether the letter meets every condition that is set."""
        return (
            (self.topic is None or letter.original.topic == self.topic)
            and (self.reason is None or letter.reason == self.reason)
            and (self.since_ms is None or letter.written_ms >= self.since_ms)
            and (self.until_ms is None or letter.written_ms < self.until_ms)
            and (not self.ids or letter.id in self.ids)
        )


def letter_of(record: Any) -> Letter | None:
    """A record of the dead letters with its original whole; None for a mark or a record that nobody of us wrote."""
    headers = dict(record.headers)
    if dead_letters.ORIGIN_TOPIC not in headers:
        return None

    def text(name: str, default: str = "") -> str:
        value = headers.get(name)
        return default if value is None else value.decode(errors="replace")

    original = Original(
        text(dead_letters.ORIGIN_TOPIC),
        int(text(dead_letters.ORIGIN_PARTITION, "-1")),
        int(text(dead_letters.ORIGIN_OFFSET, "-1")),
        int(text(dead_letters.ORIGIN_TIMESTAMP, "0")),
        record.key,
        None if dead_letters.NULL in headers else record.value,
        dead_letters.original_headers(record.headers),
    )
    return Letter(
        id=_id(record),
        written_ms=record.timestamp,
        original=original,
        error=text(dead_letters.ERROR),
        reason=text(dead_letters.REASON),
        message=text(dead_letters.MESSAGE),
        redrives=int(text(dead_letters.REDRIVES, "0")),
        redriven=False,
        size=None if original.value is None else len(original.value),
    )


def index(kafka: KafkaSettings) -> list[Letter]:
    """Every letter, oldest first, without the originals' bytes. Raises TopicMissingError, kafka errors."""
    letters: dict[str, Letter] = {}
    seen: set[tuple[str, int, int, int]] = set()
    for record in _records(kafka):
        letter = letter_of(record)
        if letter is not None:
            origin = letter.original
            where = (origin.topic, origin.partition, origin.offset, origin.timestamp)
            if where not in seen:
                seen.add(where)
                letters[letter.id] = replace(letter, original=replace(origin, value=None))
        else:
            done = _marked(record.headers)
            if done in letters:
                letters[done] = replace(letters[done], redriven=True)
    return list(letters.values())


def whole(kafka: KafkaSettings, ids: frozenset[str]) -> Iterator[Letter]:
    """The letters of these ids with their originals' bytes, in the order of the log."""
    for record in _records(kafka):
        if _id(record) in ids and (letter := letter_of(record)) is not None:
            yield letter


def _id(record: Any) -> str:
    # One partition is what `gpl topics create` makes.
    return str(record.offset) if record.partition == 0 else f"{record.partition}:{record.offset}"


def _marked(headers: Headers) -> str | None:
    value = dict(headers).get(REDRIVEN)
    return None if value is None else value.decode(errors="replace")


def _records(kafka: KafkaSettings) -> Iterator[Any]:
    """Everything in the dead letters up to their end as of now."""
    topic = full_name(kafka, dead_letters.TOPIC)
    reader = consumer(kafka, max_poll_records=500)
    try:
        found = reader.partitions_for_topic(topic)
        if not found:
            raise TopicMissingError(f"topic {topic} does not exist; `gpl topics create` makes it")
        for tp in [TopicPartition(topic, p) for p in sorted(found)]:
            reader.assign([tp])
            reader.seek_to_beginning(tp)
            end = reader.end_offsets([tp])[tp]
            while reader.position(tp) < end:
                for records in reader.poll(timeout_ms=500).values():
                    yield from (record for record in records if record.offset < end)
    finally:
        reader.close()
