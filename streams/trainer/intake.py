"""What may be trained on: label records are decoded and checked here, and nothing unchecked goes further."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streams.contracts import Label, decode
from streams.dead_letters import Refused
from streams.trainer.columns import Columns, Flat
from streams.trainer.group import owner

_SCORE_LIMIT = 1.001  # a cosine of float32 unit vectors, rounded


def read(
    values: Sequence[bytes | None], ranks: Sequence[int] | None = None, latest: Sequence[int] | None = None
) -> list[Columns | ValueError]:
    """Values of ``gpl.labels`` in order, each as columns, or what is wrong with it: Refused, which names field and
    value, or msgspec.DecodeError.

    Many at once: the columns of all are made and checked together, and looked at one by one only when something in
    them is wrong. ``ranks``: whose share of the work each is, rank 0's by default. ``latest``: event times that labels
    may not be after, since the newest one decides which ids expire.
    """
    found: list[Label | ValueError] = []
    for n, value in enumerate(values):
        try:
            label = _decoded(value)
            if latest is not None and label.ts > latest[n]:
                raise Refused("future", f"ts: {label.ts}, at most {latest[n]} expected of a record of its time")
            found.append(label)
        except ValueError as error:  # msgspec's errors of decoding are ValueErrors too
            found.append(error)
    flat = _checked(found)
    if flat is None:
        found = [label if isinstance(label, ValueError) else _refusal(label) or label for label in found]
    labels = [label for label in found if isinstance(label, Label)]
    made = iter((flat or Flat.of(labels)).split(labels))
    every = [label if isinstance(label, ValueError) else next(made) for label in found]
    if ranks is None:
        return every
    return [
        replace(label, rank=rank) if isinstance(label, Columns) else label
        for label, rank in zip(every, ranks, strict=True)
    ]


def read_records(records: Sequence[Any], ranks: int, ahead_seconds: float) -> list[Columns | ValueError]:
    """``read`` for records (kafka ConsumerRecords): each is the share of the one of so many ``ranks`` that fetches its
    partition, and may tell of events so far ahead of its own time, as recalls and feedback may."""
    return read(
        [record.value for record in records],
        [owner(record.partition, ranks) for record in records],
        [record.timestamp + int(1000 * ahead_seconds) for record in records],
    )


def newest_source_at(records: Iterable[Any]) -> int | None:
    """``newest_at`` of the records (kafka ConsumerRecords) that name it; None when none does."""
    times = (newest_at(record.headers) for record in records)
    return max((at for at in times if at is not None), default=None)


def newest_at(headers: Sequence[tuple[str, bytes | None]] | None) -> int | None:
    """The ``gpl-newest-at`` header: Kafka time (wall milliseconds) of the newest source record of a label."""
    for name, data in headers or ():
        if name == "gpl-newest-at" and data is not None and data.isdigit() and len(data) < 16:
            return int(data)
    return None


def _decoded(value: bytes | None) -> Label:
    if value is None:
        raise Refused("invalid", "value: null; labels are never removed")
    return decode(Label, value)


def _checked(found: Iterable[Label | ValueError]) -> Flat | None:
    """The columns of all labels when all are sound, by the rules of ``_check``; None when any is not."""
    labels = [label for label in found if isinstance(label, Label)]
    if not all(map(_sound, labels)):
        return None
    try:
        flat = Flat.of(labels)
    except OverflowError:
        return None
    # With types of their own, or they would have others where there is no label at all.
    sizes = np.fromiter(chain.from_iterable(map(_sizes, labels)), np.int64)
    exposed = np.repeat(np.tile(np.array([True, False]), len(labels)), sizes)
    sound = (
        _all_within(flat.score, _SCORE_LIMIT, -_SCORE_LIMIT, exposed)
        and _all_within(flat.clicked, 1)
        and _all_within(flat.label, 1)
        and _all_within(flat.confidence, 1)
    )
    return flat if sound else None


def _sound(label: Label) -> bool:
    """All but the values of the columns."""
    shown, hidden = label.exposed, label.unexposed
    m, n = _sizes(label)
    items = set(shown.item)
    items.update(hidden.item)
    return bool(
        label.revision >= 0
        and len(shown.clicked) == len(shown.score) == m
        and len(hidden.score) == len(hidden.label) == len(hidden.confidence) == n
        and len(items) == m + n
    )


def _sizes(label: Label) -> tuple[int, int]:
    return len(label.exposed.item), len(label.unexposed.item)


def _all_within(
    values: NDArray[np.float64], high: float, low: float = 0, may_lack: NDArray[np.bool_] | None = None
) -> bool:
    """``may_lack``: where NaN stands for a value that there is not."""
    within = (values >= low) & (values <= high)
    if may_lack is not None:
        within |= np.isnan(values) & may_lack
    return bool(within.all())


def _refusal(label: Label) -> Refused | None:
    try:
        _check(label)
    except Refused as error:
        return error
    return None


def _check(label: Label) -> None:
    if label.revision < 0:
        raise Refused("invalid", f"revision: {label.revision}, at least 0 expected")
    exposed, unexposed = label.exposed, label.unexposed
    _parallel("exposed", exposed.item, clicked=exposed.clicked, score=exposed.score)
    _parallel(
        "unexposed", unexposed.item, score=unexposed.score, label=unexposed.label, confidence=unexposed.confidence
    )
    items = exposed.item + unexposed.item
    if len(set(items)) != len(items):
        raise Refused("invalid", "exposed.item, unexposed.item: an item stands twice; each has one label a request")
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
