"""Dead letters: the original bytes under their original key, with where they came from and why they are here."""

from __future__ import annotations

TOPIC = "dead-letters"

_REASONS = {
    "ValidationError": "invalid",
    "DecodeError": "malformed",
    "UnicodeDecodeError": "malformed",
    "RecordTooLargeError": "too_large",
}


class Refused(ValueError):
    """A record that parses but cannot be used. ``reason`` is a short word for the metric, the message is for people."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def reason_of(error: Exception) -> str:
    """A short, bounded word for the metric's label: why the record was refused."""
    if isinstance(error, Refused):
        return error.reason
    return _REASONS.get(type(error).__name__, "error")


def headers(topic: str, partition: int, offset: int, error: Exception) -> list[tuple[str, bytes]]:
    """Kafka headers that tell a dead letter's origin and error."""
    return [
        ("gpl-topic", topic.encode()),
        ("gpl-partition", str(partition).encode()),
        ("gpl-offset", str(offset).encode()),
        ("gpl-error", type(error).__name__.encode()),
        ("gpl-reason", reason_of(error).encode()),
        ("gpl-message", str(error).encode()[:2000]),
    ]
