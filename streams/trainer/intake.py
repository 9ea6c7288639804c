"""What may be trained on: a label record is decoded and checked here, and nothing unchecked goes further."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from streams.contracts import Label, decode
from streams.dead_letters import Refused

_SCORE_LIMIT = 1.001  # a cosine of float32 unit vectors, rounded


def parse(value: bytes | None) -> Label:
    """One record of ``gpl.labels``. Raises Refused (names field and value) or msgspec.DecodeError."""
    if value is None:
        raise Refused("invalid", "value: null; labels are never removed")
    label = decode(Label, value)
    _check(label)
    return label


def parsed(records: Iterable[Any]) -> Iterator[tuple[Any, Label | Exception]]:
    """Kafka records in order, each with its label, or with what is wrong with it."""
    for record in records:
        try:
            yield record, parse(record.value)
        except ValueError as error:  # msgspec's errors of decoding are ValueErrors too
            yield record, error


def newest_of(records: Iterable[Any]) -> int | None:
    """The newest ``gpl-newest-at`` among records; None when none has one."""
    return max((at for record in records if (at := newest_at(record.headers)) is not None), default=None)


def newest_at(headers: Sequence[tuple[str, bytes]] | None) -> int | None:
    """The ``gpl-newest-at`` header: Kafka time (wall milliseconds) of the newest source record of a label."""
    for name, data in headers or ():
        if name == "gpl-newest-at" and data.isdigit():
            return int(data)
    return None


def _check(label: Label) -> None:
    if not label.request_id or not label.user_id:
        raise Refused("invalid", f"request_id, user_id: {label.request_id!r}, {label.user_id!r}; neither may be empty")
    if label.revision < 0:
        raise Refused("invalid", f"revision: {label.revision}, at least 0 expected")
    if label.ts < 0:
        raise Refused("invalid", f"ts: {label.ts}, at least 0 expected")
    exposed, unexposed = label.exposed, label.unexposed
    _parallel("exposed", exposed.item, clicked=exposed.clicked, score=exposed.score)
    _parallel(
        "unexposed", unexposed.item, score=unexposed.score, label=unexposed.label, confidence=unexposed.confidence
    )
    items = exposed.item + unexposed.item
    if len(set(items)) != len(items):
        raise Refused("invalid", "exposed.item, unexposed.item: an item stands twice; each has one label a request")
    if "" in items:
        raise Refused("invalid", "exposed.item, unexposed.item: an empty item id")
    _within("exposed.clicked", exposed.clicked, 0, 1)
    _within("exposed.score", [score for score in exposed.score if score is not None], -_SCORE_LIMIT, _SCORE_LIMIT)
    _within("unexposed.score", unexposed.score, -_SCORE_LIMIT, _SCORE_LIMIT)
    _within("unexposed.label", unexposed.label, 0, 1)
    _within("unexposed.confidence", unexposed.confidence, 0, 1)


def _parallel(group: str, items: Sequence[str], **columns: Sequence[Any]) -> None:
    for name, column in columns.items():
        if len(column) != len(items):
            raise Refused("invalid", f"{group}.{name}: {len(column)} entries for {len(items)} items; they are parallel")


def _within(name: str, values: Sequence[float], low: float, high: float) -> None:
    # JSON has no NaN, which would slip through here.
    if values and not (low <= min(values) and max(values) <= high):
        wrong = next(value for value in values if not low <= value <= high)
        raise Refused("invalid", f"{name}: {wrong}, between {low} and {high} expected")
