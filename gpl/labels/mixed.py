"""Calibration that knows user and item: Platt's scaling with an intercept of each, kept online. (ours)

    logit P(click | u, i, s) = a + b z + m [no score] + alpha_u + beta_i,     z = (s - mean of s) / std of s

fitted on exposed feedback, so actual and pseudo-labels share one scale for each user and item, too. Platt's scaling
alone calls an item as good as its anchor score says; where feedback says more of the item than the score does (films
that everybody rates well or badly), such labels teach the pre-ranker that all items are alike. ``alpha`` and ``beta``
have normal priors around 0, so what was never exposed has the label of the average item with its score.

Each batch moves the parameters to the mode of their posterior, by Newton's method on one group of parameters after the
other, with the information so far as the precision of the prior: the diagonal Laplace approximation of Chapelle and Li
2011 ("An Empirical Evaluation of Thompson Sampling", algorithm 3). Information is held at a maximum, so that what is
long past yields to what changed.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from gpl.arrays import grown
from gpl.labels.matching import Floats, Ints

Array = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

_PRECISION = 0.3  # of the prior of an intercept: a standard deviation of 1.8 in log-odds
_FLAT = 1e-3  # of the prior of a, b and m
_MAX_INFORMATION = 2_500.0  # of 10,000 exposures at even odds
_SWEEPS = 4
_MAX_MOVE = 2.0  # log-odds a Newton step: from far away it would overshoot
_MIN_SPREAD = 1e-6
_CAPACITY = 1024


class MixedCalibration:
    """Labels of (user, item, score), from the exposed feedback observed so far. Deterministic; a few arrays of state.

    Row 0, the unknown user or item, has no intercept of its own.
    """

    def __init__(self) -> None:
        # Columns: value, information beyond the prior's precision.
        self._users: Array = np.zeros((_CAPACITY, 2))
        self._items: Array = np.zeros((_CAPACITY, 2))
        self._common: Array = np.zeros((3, 2))  # a, b, m
        self._moments: Array = np.zeros(3)  # of exposed scores: count, mean, sum of squares about it
        self._rows = [0, 0]  # of users and items, as far as any was seen
        self.exposures = 0
        """Exposed pairs observed."""

    def observe(
        self, user_row: Ints, item_row: Ints, request: Ints, score: Floats, exposed: Bools, clicked: Floats
    ) -> None:
        """Take in R requests with P pairs: ``user_row`` (R,), all others (P,), ``request`` indexes ``user_row``;
        ``clicked`` 0 or 1 where exposed, ``score`` NaN where there is none."""
        shown = np.flatnonzero(exposed)
        if len(shown) == 0:
            return
        self.exposures += len(shown)
        self._measure(score[shown])
        users, user = np.unique(user_row[request[shown]], return_inverse=True)
        items, item = np.unique(item_row[shown], return_inverse=True)
        self._users, self._items = grown(self._users, int(users[-1]) + 1), grown(self._items, int(items[-1]) + 1)
        self._rows = [max(self._rows[0], int(users[-1]) + 1), max(self._rows[1], int(items[-1]) + 1)]
        x, y = self._features(score[shown]), clicked[shown].astype(np.float64)
        sides = [_Side(self._users[users], user, users > 0), _Side(self._items[items], item, items > 0)]
        common = self._common[:, 0].copy()
        precision = np.diag(self._common[:, 1] + _FLAT)
        p = np.zeros(0)
        for _ in range(_SWEEPS):
            for side in sides:
                p = _sigmoid(x @ common + sides[0].of_pairs + sides[1].of_pairs)
                side.move(y, p)
            p = _sigmoid(x @ common + sides[0].of_pairs + sides[1].of_pairs)
            slope = x.T @ (y - p) - precision @ (common - self._common[:, 0])
            common += np.clip(np.linalg.solve(x.T @ (x * (p * (1 - p))[:, None]) + precision, slope), *_MOVES)
        p = _sigmoid(x @ common + sides[0].of_pairs + sides[1].of_pairs)
        information = p * (1 - p)
        self._users[users], self._items[items] = (side.after(information) for side in sides)
        self._common[:, 0] = common
        self._common[:, 1] = np.minimum(self._common[:, 1] + (x * x).T @ information, _MAX_INFORMATION)

    def label(self, user_row: Ints, item_row: Ints, request: Ints, score: Floats) -> Floats:
        """(P,) click probabilities of pairs, as in :meth:`observe`."""
        user, item = (
            np.where(rows < len(table), table[np.minimum(rows, len(table) - 1), 0], 0.0)
            for rows, table in ((user_row, self._users), (item_row, self._items))
        )
        logits = self._features(score) @ self._common[:, 0] + user[request] + item
        return _sigmoid(logits).astype(np.float32)

    def forget(self, user_row: Ints, item_row: Ints) -> None:
        """Rows (n,) and (m,) that others will have."""
        self._users[user_row[user_row < len(self._users)]] = 0.0
        self._items[item_row[item_row < len(self._items)]] = 0.0

    def state_arrays(self) -> dict[str, Array]:
        """All state, float64, by name; not copies. ``users`` and ``items`` have as many rows as were seen."""
        return {
            "users": self._users[: self._rows[0]],
            "items": self._items[: self._rows[1]],
            "common": self._common,
            "moments": self._moments,
            "exposures": np.array([float(self.exposures)]),
        }

    def load_state_arrays(self, state: Mapping[str, npt.NDArray[np.floating]]) -> None:
        """The inverse of :meth:`state_arrays`. Raises ValueError naming an array that is missing or misshapen."""
        shapes = {"users": (-1, 2), "items": (-1, 2), "common": (3, 2), "moments": (3,), "exposures": (1,)}
        for name, shape in shapes.items():
            if name not in state:
                raise ValueError(f"{name}: missing from the state")
            found = state[name].shape
            if len(found) != len(shape) or any(e not in (-1, f) for e, f in zip(shape, found, strict=True)):
                raise ValueError(f"{name}: shape {found}, expected {shape}, -1 being any number")
        copies = {name: np.array(state[name], dtype=np.float64) for name in shapes}
        self._rows = [len(copies["users"]), len(copies["items"])]
        self._users, self._items = grown(copies["users"], _CAPACITY), grown(copies["items"], _CAPACITY)
        self._common, self._moments = copies["common"], copies["moments"]
        self.exposures = int(copies["exposures"][0])

    def _measure(self, score: Floats) -> None:
        known = score[~np.isnan(score)].astype(np.float64)
        if len(known) == 0:
            return
        count, mean, squares = self._moments
        total, own = count + len(known), float(known.mean())
        squares += float(((known - own) ** 2).sum()) + (own - mean) ** 2 * count * len(known) / total
        self._moments = np.array([total, mean + (own - mean) * len(known) / total, squares])

    def _features(self, score: Floats) -> Array:
        """(P, 3): 1, the standard score (0 where there is none), and whether there is none."""
        count, mean, squares = self._moments
        spread = max((squares / count) ** 0.5, _MIN_SPREAD) if squares > 0 else 1.0
        missing = np.isnan(score)
        z = np.where(missing, 0.0, (score.astype(np.float64) - mean) / spread)
        return np.stack([np.ones(len(score)), z, missing.astype(np.float64)], axis=1)


class _Side:
    """Intercepts (n, 2) of a batch's users, or of its items; ``whose`` (E,) indexes them, ``own`` (n,): has one."""

    def __init__(self, before: Array, whose: Ints, own: Bools) -> None:
        self._before, self._whose, self._own = before, whose, own
        self._value = before[:, 0].copy()

    @property
    def of_pairs(self) -> Array:
        """(E,) each pair's intercept."""
        values: Array = self._value[self._whose]
        return values

    def move(self, y: Array, p: Array) -> None:
        """One step of Newton's method towards the mode; given the rest, intercepts are independent of each other."""
        precision = self._before[:, 1] + _PRECISION
        slope = self._sum(y - p) - precision * (self._value - self._before[:, 0])
        step = np.clip(slope / (self._sum(p * (1 - p)) + precision), *_MOVES)
        self._value += np.where(self._own, step, 0.0)

    def after(self, information: Array) -> Array:
        """(n, 2) as they are to be kept."""
        total = np.minimum(self._before[:, 1] + self._sum(information), _MAX_INFORMATION)
        return np.stack([self._value, np.where(self._own, total, 0.0)], axis=1)

    def _sum(self, values: Array) -> Array:
        return np.bincount(self._whose, values, minlength=len(self._before)).astype(np.float64)


_MOVES = (-_MAX_MOVE, _MAX_MOVE)


def _sigmoid(logits: Array) -> Array:
    e = np.exp(-np.abs(logits))
    return np.where(logits >= 0, 1.0, e) / (1.0 + e)
