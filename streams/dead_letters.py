"""Dead letters: the original bytes and headers under the original key, with where they came from and why.

Every consumer writes the same format. The origin's own headers travel under ``gpl-original.``, in their order and
repeated as they were, so that nothing of ours can be taken for one of them; ``gpl-redrives`` counts how often a
record has been sent back to its topic and refused again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from streams.settings import DeadLetterSettings

TOPIC = "dead-letters"

ORIGIN_TOPIC = "gpl-topic"
ORIGIN_PARTITION = "gpl-partition"
ORIGIN_OFFSET = "gpl-offset"
ORIGIN_TIMESTAMP = "gpl-timestamp"
ERROR = "gpl-error"
REASON = "gpl-reason"
MESSAGE = "gpl-message"
REDRIVES = "gpl-redrives"
REDRIVEN_FROM = "gpl-redriven-from"
ORIGINAL = "gpl-original."
"""Put before the names of the headers that the original had."""
ORIGINAL_NULL = "gpl-original-null."
"""The same for a header without a value: not every client can write one."""

NULL = "gpl-null"
"""Says that the original had neither key nor value, where clients write no record without either."""

MESSAGE_BYTES = 2000

Headers = Sequence[tuple[str, bytes | None]]

Reason = Literal["malformed", "invalid", "too_large", "future", "late", "key", "item", "generator", "error"]

_REASONS: dict[str, Reason] = {
    "ValidationError": "invalid",
    "DecodeError": "malformed",
    "UnicodeDecodeError": "malformed",
    "RecordTooLargeError": "too_large",
}


class Refused(ValueError):
    """A record that parses but cannot be used. ``reason`` is a short word for the metric, the message is for people."""

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason: Reason = reason


class Halted(RuntimeError):
    """Too many records are refused: their source is taken for broken, and the next one is not acknowledged."""


@dataclass(frozen=True, slots=True)
class Original:
    """The parts of a record that its dead letter needs. ``timestamp``: Kafka's, milliseconds."""

    topic: str
    partition: int
    offset: int
    timestamp: int
    key: bytes | None
    value: bytes | None
    headers: tuple[tuple[str, bytes | None], ...] = ()

    @classmethod
    def of(cls, message: Any) -> Original:
        """Of a ConsumerRecord, aiokafka's or kafka-python's."""
        timestamp, pairs = message.timestamp or 0, tuple(message.headers or ())
        return cls(message.topic, message.partition, message.offset, timestamp, message.key, message.value, pairs)


def reason_of(error: Exception) -> Reason:
    """A short, bounded word for the metric's label: why the record was refused."""
    if isinstance(error, Refused):
        return error.reason
    return _REASONS.get(type(error).__name__, "error")


def headers(original: Original, error: Exception) -> list[tuple[str, bytes]]:
    """Kafka headers of the dead letter of ``original``."""
    told = [
        (ORIGIN_TOPIC, original.topic),
        (ORIGIN_PARTITION, str(original.partition)),
        (ORIGIN_OFFSET, str(original.offset)),
        (ORIGIN_TIMESTAMP, str(original.timestamp)),
        (ERROR, type(error).__name__),
        (REASON, reason_of(error)),
        (MESSAGE, str(error)),
        (REDRIVES, str(redrives(original.headers))),
    ]
    ours = [(name, text.encode(errors="replace")[:MESSAGE_BYTES]) for name, text in told]
    if original.key is None and original.value is None:
        ours.append((NULL, b""))
    return ours + [
        (ORIGINAL_NULL + name, b"") if value is None else (ORIGINAL + name, value) for name, value in original.headers
    ]


def value_of(original: Original) -> bytes | None:
    """The value of the dead letter of ``original``: the same bytes. Nothing at all is written as an empty value, which
    the header `NULL` tells from one."""
    return b"" if original.key is None and original.value is None else original.value


def original_headers(headers: Headers) -> tuple[tuple[str, bytes | None], ...]:
    """The headers that the original had, from those of its dead letter."""
    kept: list[tuple[str, bytes | None]] = []
    for name, value in headers:
        if name.startswith(ORIGINAL_NULL):
            kept.append((name.removeprefix(ORIGINAL_NULL), None))
        elif name.startswith(ORIGINAL):
            kept.append((name.removeprefix(ORIGINAL), value))
    return tuple(kept)


def redrives(headers: Headers) -> int:
    """How often a record with these headers has been sent back to its topic; 0 without a header that says so."""
    said = [value for name, value in headers if name == REDRIVES and value is not None]
    return int(said[-1]) if said and said[-1].isdigit() and len(said[-1]) < 10 else 0


class Guard:
    """Counts what one consumer accepts and refuses; raises Halted when that is no longer about single records.

    Consecutive refusals count per partition, the ratio per topic over the newest ``window`` records. To be told of
    records in their order; the one that is refused with Halted has no dead letter and must not be acknowledged.
    """

    def __init__(self, settings: DeadLetterSettings) -> None:
        self._settings = settings
        self._consecutive: dict[tuple[str, int], int] = {}
        self._recent: dict[str, deque[bool]] = {}
        self._refused: dict[str, int] = {}

    def accepted(self, topic: str, partition: int) -> None:
        """The record can be used."""
        self._consecutive[topic, partition] = 0
        self._note(topic, False)

    def refused(self, topic: str, partition: int, offset: int, error: Exception) -> None:
        """The record is about to become a dead letter. Raises Halted when it must not."""
        settings = self._settings
        where = f"{topic}, partition {partition}, offset {offset}: {error}"
        count = self._consecutive.get((topic, partition), 0) + 1
        if count > settings.max_consecutive:
            raise Halted(
                f"{settings.max_consecutive} records in a row were refused, dead_letters.max_consecutive allows no "
                f"more; the next is {where}"
            )
        self._consecutive[topic, partition] = count
        self._note(topic, True)
        recent, refused = self._recent[topic], self._refused[topic]
        full = len(recent) == settings.window_records
        if full and refused > settings.max_ratio * len(recent):
            raise Halted(
                f"{refused} of the last {len(recent)} records of {topic} were refused, dead_letters.max_ratio is "
                f"{settings.max_ratio}; the newest is {where}"
            )

    def _note(self, topic: str, refused: bool) -> None:
        recent = self._recent.setdefault(topic, deque())
        recent.append(refused)
        self._refused[topic] = self._refused.get(topic, 0) + refused
        if len(recent) > self._settings.window_records:
            self._refused[topic] -= recent.popleft()
