"""Progressive validation (test, then train): every batch is scored by the models before they are trained on it.

Figures over a sliding window of requests, each counted once, at its first revision: AUC, GAUC (by user) and log loss on
exposed items, and HR@10 over all candidates of the request, exposed and unexposed ranked together. A clicked item in
the top 10 is a hit; the mean is over clicked items, also over those of the tail.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

from gpl.evaluation.metrics import auc, gauc, log_loss

TOP = 10


class Evaluated(msgspec.Struct, array_like=True, frozen=True):
    """One request as the models saw it before training. By model name: ``logits`` parallel to ``clicked`` (0 or 1 per
    exposed item), ``ranks`` parallel to ``tail`` (one entry per clicked item)."""

    user: str
    clicked: list[int]
    logits: dict[str, list[float]]
    tail: list[bool]
    ranks: dict[str, list[int]]


def ranks(scores: NDArray[np.float32], of: Sequence[int]) -> list[int]:
    """Rank, 1 is best, of the entries ``of`` among all ``scores`` (n,). Ties count against the model, so that a
    constant scorer earns no hits."""
    return [int(np.count_nonzero(scores >= scores[i])) for i in of]


def tail_threshold(exposures: NDArray[np.int64]) -> float:
    """Items with at most this many exposures are the less popular half (the tail)."""
    return float(np.median(exposures)) if len(exposures) else 0.0


class ProgressiveWindow:
    """The newest ``capacity`` evaluated requests."""

    def __init__(self, capacity: int) -> None:
        self._records: deque[Evaluated] = deque(maxlen=capacity)

    def __len__(self) -> int:
        return len(self._records)

    def add(self, records: Iterable[Evaluated]) -> None:
        """Take in evaluated requests; the oldest leave."""
        self._records.extend(records)

    def summary(self, model: str) -> dict[str, float]:
        """auc, gauc, log_loss, hr10, hr10_tail of a model; a figure that is not defined (no click yet) is left out."""
        records = [record for record in self._records if model in record.logits]
        clicked = np.array([c for record in records for c in record.clicked], np.int64)
        logits = np.array([x for record in records for x in record.logits[model]], np.float64)
        users = np.array([record.user for record in records for _ in record.clicked])
        hits = np.array([rank <= TOP for record in records for rank in record.ranks[model]], np.float64)
        tail = np.array([is_tail for record in records for is_tail in record.tail], bool)
        figures: dict[str, float] = {}
        if len(clicked):
            figures["auc"] = auc(clicked, logits)
            figures["gauc"] = gauc(clicked, logits, users)
            figures["log_loss"] = log_loss(clicked, 1 / (1 + np.exp(-logits.clip(-50, 50))))
        if len(hits):
            figures["hr10"] = float(hits.mean())
        if tail.any():
            figures["hr10_tail"] = float(hits[tail].mean())
        return {name: float(value) for name, value in figures.items() if math.isfinite(value)}

    def state(self) -> list[Evaluated]:
        """For the checkpoint, oldest first."""
        return list(self._records)

    def restore(self, records: Iterable[Evaluated]) -> None:
        """Take over a saved window."""
        self._records.clear()
        self._records.extend(records)
