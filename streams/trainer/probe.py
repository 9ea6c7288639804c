"""The probe: recent requests that each published model was asked, so that the next can be compared with it.

Drawn anew at each publication and kept with the model, so the two that are compared are asked the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from gpl.labels.matching import Floats
from streams.models import Probe

REQUESTS = 64
ITEMS = 50
"""Of a probe; and the most items of each request."""
BINS = 10
_FLOOR = 1e-3  # of a bin's share, so that an empty one does not make the index infinite

Score = Callable[[str, Sequence[str], Sequence[str], Floats], tuple[Floats, NDArray[np.bool_]]]
"""Logits (n,) of a user with a history for items with their raw anchor scores (NaN: none), and which items are known
(n,)."""


class Asked(NamedTuple):
    """A request of a probe to come. ``score`` (n,): of its items, NaN for none."""

    user_id: str
    history: Sequence[str]
    items: Sequence[str]
    score: Floats


def of(requests: Iterable[Asked]) -> Probe:
    """A probe of these, not answered yet."""
    requests = list(requests)
    return Probe(
        users=[r.user_id for r in requests],
        history=[list(r.history) for r in requests],
        items=[list(r.items) for r in requests],
        score=[[None if s != s else s for s in r.score.tolist()] for r in requests],
        logits=[],
    )


def asked(probe: Probe) -> Iterator[Asked]:
    """The requests of a probe: the inverse of :func:`of`."""
    for user, history, items, raw in zip(probe.users, probe.history, probe.items, probe.score, strict=True):
        yield Asked(user, history, items, np.array([np.nan if s is None else s for s in raw], np.float32))


def answered(probe: Probe, score: Score) -> Probe:
    """The probe with a model's own logits; items that it does not know are left out."""
    users, histories, items, scores, logits = [], [], [], [], []
    for i, (values, known) in enumerate(_ask(probe, score)):
        kept = np.flatnonzero(known).tolist()
        if kept:
            users.append(probe.users[i])
            histories.append(probe.history[i])
            items.append([probe.items[i][j] for j in kept])
            scores.append([probe.score[i][j] for j in kept])
            logits.append(values[kept].tolist())
    return Probe(users, histories, items, scores, logits)


def compare(published: Probe, score: Score) -> dict[str, float]:
    """How another model answers a published model's probe; empty when it knows none of its items.

    ``psi`` of the scores; ``agreement``: mean Spearman correlation within requests of three items or more;
    ``finite``: 1, or 0 when an answer is no number, and then nothing else.
    """
    before: list[float] = []
    after: list[float] = []
    agreements = []
    for logits, (values, known) in zip(published.logits, _ask(published, score), strict=True):
        if not np.isfinite(values).all():
            return {"finite": 0.0}
        old, new = np.array(logits, np.float32)[known], values[known]
        before += old.tolist()
        after += new.tolist()
        if len(old) >= 3:
            agreements.append(_spearman(old, new))
    if not before:
        return {}
    found = {"finite": 1.0, "psi": psi(np.array(before, np.float32), np.array(after, np.float32))}
    if agreements:
        found["agreement"] = float(np.mean(agreements))
    return found


def psi(before: Floats, now: Floats) -> float:
    """Population stability index of two samples of scores, over ``BINS`` quantile bins of ``before``; 0 is the same.

    The usual reading: below 0.1 no change, above 0.25 a large one. NaN without data.
    """
    if not len(before) or not len(now):
        return float("nan")
    edges = np.quantile(before, np.arange(1, BINS) / BINS)
    p, q = (
        np.maximum(np.bincount(np.searchsorted(edges, values), minlength=BINS) / len(values), _FLOOR)
        for values in (before, now)
    )
    return float(((q - p) * np.log(q / p)).sum())


def _ask(probe: Probe, score: Score) -> Iterator[tuple[Floats, NDArray[np.bool_]]]:
    for request in asked(probe):
        yield score(*request)


def _spearman(a: Floats, b: Floats) -> float:
    """Rank correlation; 0 where one of them does not vary."""
    x, y = (_average_ranks(values) for values in (a, b))
    x, y = x - x.mean(), y - y.mean()
    spread = float(np.sqrt((x * x).sum() * (y * y).sum()))
    return float((x * y).sum()) / spread if spread > 0 else 0.0


def _average_ranks(values: Floats) -> NDArray[np.float64]:
    _, group, size = np.unique(values, return_inverse=True, return_counts=True)
    ranks: NDArray[np.float64] = (np.cumsum(size) - (size - 1) / 2)[group]
    return ranks
