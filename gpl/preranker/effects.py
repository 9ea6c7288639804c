"""What is known of items whoever asks: how often each was a candidate, and its mean anchor score. (ours)

The losses take both out. A candidate of few users is rarely a negative, so softmax over a request's candidates would
teach p(i | u) / Q(i); with log Q(i) taken off the logits while training, what is learnt ranks by p (the log-odds
correction of Yi et al. 2019). And an item near to everybody's anchors says nothing of this user: its score counts as
the difference from its mean, so that pseudo-labels teach personal taste and leave how good items are to the clicks.

Q(i) is relative to the mean item,

    Q(i) = (c_i + 2) / (mean of c_j + 2 over the items j met so far, those forgotten not counted)

with ``c_i`` the candidacies of item i. To softmax a constant factor is nothing. Pointwise negatives teach
``logit - log Q`` itself: with a count alone, which only grows, they would fade as 1 / t. With the mean as the unit, as
`gpl.evaluation.baselines` has it, a negative of the mean item weighs as if uncorrected, at any time, and where clicks
are rare each item has the same mass of negatives, however often it is a candidate: with E exposures and C clicks its
logit tends to log(C / (E + w m)), w the negatives' weight, m the mean exposures of an item. (The number of requests as
the unit would be steady too, but multiply that mass by how many times a request's candidates go into the catalogue.)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gpl.arrays import add_at, check_shape, grown
from gpl.labels.matching import Floats
from gpl.preranker.batch import Batch

Array = npt.NDArray[np.float64]

_SHRINKAGE = 5.0  # scores of an average item that an item's own mean is mixed with
_SMOOTHING = 2.0  # added to the count of candidacies
_MIN_CAPACITY = 1024


@dataclass(frozen=True)
class PairEffects:
    """Of a batch's pairs, (P,) each: ``log_odds`` is log Q of the item, 0 for the mean one; ``mean_score`` its mean."""

    log_odds: Floats
    mean_score: Floats

    def pairs(self, chosen: npt.NDArray[np.bool_]) -> PairEffects:
        """Of some pairs, ``chosen`` (P,)."""
        return PairEffects(self.log_odds[chosen], self.mean_score[chosen])


class ItemEffects:
    """Counts by item row, over all batches observed. Deterministic."""

    def __init__(self) -> None:
        # Columns: candidacies, candidacies with a score, sum of scores.
        self._items: Array = np.zeros((_MIN_CAPACITY, 3))
        self._total: Array = np.zeros(3)
        # Of `_items`, kept so that a batch costs what it holds: whole numbers, so exact in any order.
        self._met, self._candidacies = 0, 0.0

    def observe(self, batch: Batch) -> PairEffects:
        """Take in a batch and tell what is known of its pairs then, the batch included."""
        row = batch.item_row[batch.item]
        self._items = grown(self._items, int(row.max(initial=-1)) + 1)
        known = ~np.isnan(batch.score)
        self._met += len(np.unique(row[self._items[row, 0] == 0]))
        self._candidacies += len(row)
        columns = np.stack([np.ones(len(row)), known, np.where(known, batch.score, 0.0)])
        add_at(self._items, row, columns)
        self._total += columns.sum(axis=1)
        candidacies, scored, sums = self._items[row].T
        mean = self._total[2] / max(self._total[1], 1.0)
        usual = self._candidacies / max(self._met, 1) + _SMOOTHING
        return PairEffects(
            np.log((candidacies + _SMOOTHING) / usual).astype(np.float32),
            ((sums + _SHRINKAGE * mean) / (scored + _SHRINKAGE)).astype(np.float32),
        )

    def forget(self, rows: npt.NDArray[np.int64]) -> None:
        """Make rows as they are before an item is first met."""
        gone = np.unique(rows[rows < len(self._items)])
        self._met -= int(np.count_nonzero(self._items[gone, 0]))
        self._candidacies -= float(self._items[gone, 0].sum())
        self._items[gone] = 0.0

    def state_arrays(self, rows: int) -> dict[str, Array]:
        """``items`` (rows, 3) and their ``total`` (3,), copies."""
        items = np.zeros((rows, 3))
        found = self._items[:rows]
        items[: len(found)] = found
        return {"items": items, "total": self._total.copy()}

    def load_state_arrays(self, state: Mapping[str, npt.NDArray[np.floating]]) -> None:
        """The inverse of :meth:`state_arrays`. Raises ValueError naming an array that is missing or misshapen."""
        check_shape("items", state, (None, 3))
        check_shape("total", state, (3,))
        items = np.array(state["items"], dtype=np.float64)
        self._items = grown(items, _MIN_CAPACITY)
        self._total = np.array(state["total"], dtype=np.float64)
        self._met = int(np.count_nonzero(items[:, 0]))
        self._candidacies = float(items[:, 0].sum())
