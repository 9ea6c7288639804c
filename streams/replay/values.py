"""What a label record says of each item, and how far two records are apart."""

from __future__ import annotations

from typing import Literal, NamedTuple

from streams.contracts import Label

Kind = Literal["moved", "exposed", "unexposed", "clicked", "score", "appeared", "vanished"]


class Value(NamedTuple):
    """One item in one record. Of an exposed item ``label`` is its click and ``confidence`` None."""

    exposed: bool
    score: float | None
    label: float
    confidence: float | None


def values(label: Label) -> dict[str, Value]:
    """item -> what the record says of it."""
    shown, hidden = label.exposed, label.unexposed
    found = {
        item: Value(True, score, float(clicked), None)
        for item, score, clicked in zip(shown.item, shown.score, shown.clicked, strict=True)
    }
    columns = zip(hidden.item, hidden.score, hidden.label, hidden.confidence, strict=True)
    found.update((item, Value(False, score, label_, confidence)) for item, score, label_, confidence in columns)
    return found


def same(a: Label, b: Label) -> bool:
    """Whether two records say the same of every item."""
    return a.outcome == b.outcome and a.exposed == b.exposed and a.unexposed == b.unexposed


def move(a: Value | None, b: Value | None) -> float:
    """How far an item's label moved between two records: the larger of the moves of label and confidence.

    An item that is in one record only counts with its label there; one that became exposed with the distance of its
    click. Of an item exposed in both only the click is a label; its raw score may differ and move nothing.
    """
    if a is None or b is None:
        there = a if a is not None else b
        return 0.0 if there is None else there.label
    if a.exposed or b.exposed:
        return abs(a.label - b.label)
    return max(abs(a.label - b.label), abs((a.confidence or 0.0) - (b.confidence or 0.0)))


def distance(a: Value | None, b: Value | None) -> float:
    """0 only for what is equal: the move, or where nothing moved how far the raw scores are apart."""
    if a == b:
        return 0.0
    scores = [0.0 if value is None or value.score is None else value.score for value in (a, b)]
    return max(move(a, b) or abs(scores[0] - scores[1]), 1e-12)


def kind(a: Value | None, b: Value | None) -> Kind:
    """What happened to an item on the way from record ``a`` to record ``b``."""
    if a is None:
        return "appeared"
    if b is None:
        return "vanished"
    if a.exposed != b.exposed:
        return "exposed" if b.exposed else "unexposed"
    if a.exposed:
        return "clicked" if a.label != b.label else "score"
    return "moved"
