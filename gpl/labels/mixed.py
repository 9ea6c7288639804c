"""Calibration that knows user and item: Platt's scaling with an intercept of each, kept online. (ours)

    logit P(click | u, i, s) = a + b z + alpha_u + beta_i,     z = (s - mean of s) / std of s,     b >= 0

fitted on exposed feedback; ``a``, ``b`` and the scale of ``s`` are of one source of scores, as another generator or
matching scores otherwise. A pair without a score has ``z`` = 0, and what has no scores is a source of its own. Platt's
scaling alone calls an item as good as its anchor score says; where feedback says more of the item than the score does
(films that everybody rates well or badly), such labels teach the pre-ranker that all items are alike. ``alpha`` and
``beta`` have normal priors around 0, so what was never exposed has the label of the average item with its score: the
label of the middle one, which lies below the mean of many where clicks are rare.

Each batch moves the parameters towards the mode of their posterior, by Newton's method on one group of parameters
after the other, with the information so far as the precision of the prior: the diagonal Laplace approximation of
Chapelle and Li 2011 ("An Empirical Evaluation of Thompson Sampling", algorithm 3). Information is held at a maximum,
so that what is long past yields to what changed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from gpl.arrays import check_shape, grown, sigmoid
from gpl.labels.matching import Floats, Ints
from gpl.moments import Moments

Array = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

MIN_EXPOSURES = 1_000
"""Exposed pairs with a score of a source below which there are no labels by it."""
SOURCES = 5
"""Kept: those used last, and what has no scores. Anchors of an old generator stay in force until their users come."""

_PRECISION = 0.1  # of the prior of an intercept: a standard deviation of 3.2 in log-odds
_COMMON = (1e-3, 1.0)  # of the priors of a and b
_MAX_INFORMATION = 500.0  # of 2,000 exposures at even odds, or 17,000 of which 3% are clicked
_SWEEPS = 4
_MOVES = (-2.0, 2.0)  # log-odds a Newton step: from far away it would overshoot
_CAPACITY = 1024
_WIDTHS = {"users": 2, "items": 2, "sources": 7}


class MixedCalibration:
    """Labels of (user, item, score), from the exposed feedback observed so far. Deterministic; a few arrays of state.

    Row 0, the unknown user or item, has no intercept of its own.
    """

    def __init__(self) -> None:
        # Columns: value, information beyond the prior's precision.
        self._users: Array = np.zeros((_CAPACITY, 2))
        self._items: Array = np.zeros((_CAPACITY, 2))
        self._rows = [0, 0]  # of users and items, as far as any was seen
        # (7,): a, b; information of each; of exposed scores their count, mean, and sum of squares about it. The source
        # used last comes last.
        self._sources: dict[str, Array] = {}

    def observe(
        self,
        user_row: Ints,
        item_row: Ints,
        request: Ints,
        score: Floats,
        sources: Sequence[str],
        exposed: Bools,
        clicked: Floats,
    ) -> None:
        """Take in R requests with P pairs: ``user_row`` and ``sources`` (R,), whose scores each has, "" without scores;
        all others (P,), ``request`` indexes requests; ``clicked`` 0 or 1 where exposed, ``score`` NaN where none."""
        shown = np.flatnonzero(exposed)
        if len(shown) == 0:
            return
        names, source = np.unique(np.array(sources)[request[shown]], return_inverse=True)
        of = [self._measured(str(name), score[shown[source == n]]) for n, name in enumerate(names)]
        users, user = np.unique(user_row[request[shown]], return_inverse=True)
        items, item = np.unique(item_row[shown], return_inverse=True)
        self._users, self._items = grown(self._users, int(users[-1]) + 1), grown(self._items, int(items[-1]) + 1)
        self._rows = [max(self._rows[0], int(users[-1]) + 1), max(self._rows[1], int(items[-1]) + 1)]
        x, y = np.zeros((len(shown), 2 * len(of))), clicked[shown].astype(np.float64)
        for n, one in enumerate(of):
            own = source == n
            x[own, 2 * n], x[own, 2 * n + 1] = 1.0, _standard(score[shown[own]], one)
        sides = [_Side(self._users[users], user, users > 0), _Side(self._items[items], item, items > 0)]
        before = np.concatenate([one[:2] for one in of])
        precision = np.concatenate([one[2:4] for one in of]) + np.tile(_COMMON, len(of))
        common = before.copy()

        def expected() -> Array:
            return sigmoid(x @ common + sides[0].of_pairs + sides[1].of_pairs)

        for _ in range(_SWEEPS):
            for side in sides:
                side.move(y, expected())
            p = expected()
            slope = x.T @ (y - p) - precision * (common - before)
            curvature = x.T @ (x * (p * (1 - p))[:, None]) + np.diag(precision)
            common += np.clip(np.linalg.solve(curvature, slope), *_MOVES)
            common[1::2] = np.maximum(common[1::2], 0.0)  # a higher score is never a lower label
        p = expected()
        information = p * (1 - p)
        self._users[users], self._items[items] = (side.after(information) for side in sides)
        gained = (x * x).T @ information
        for n, one in enumerate(of):
            one[:2] = common[2 * n : 2 * n + 2]
            one[2:4] = np.minimum(one[2:4] + gained[2 * n : 2 * n + 2], _MAX_INFORMATION)

    def label(self, user_row: Ints, item_row: Ints, request: Ints, score: Floats, sources: Sequence[str]) -> Floats:
        """(P,) click probabilities of pairs, as in :meth:`observe`; NaN where too little was exposed to tell: below
        `MIN_EXPOSURES` scores of the source, or none ("") of pairs without scores."""
        user, item = (
            np.where(rows < len(table), table[np.minimum(rows, len(table) - 1), 0], 0.0)
            for rows, table in ((user_row, self._users), (item_row, self._items))
        )
        logits = user[request] + item
        whose = np.array(sources)[request]
        for name in dict.fromkeys(sources):
            own = whose == name
            of = self._sources.get(name, np.zeros(7))
            enough = of[4] >= MIN_EXPOSURES or (not name and of[2] > 0)
            logits[own] += of[0] + of[1] * _standard(score[own], of) if enough else np.nan
        return sigmoid(logits).astype(np.float32)

    def forget(self, user_row: Ints, item_row: Ints) -> None:
        """Rows (n,) and (m,) that others will have."""
        self._users[user_row[user_row < len(self._users)]] = 0.0
        self._items[item_row[item_row < len(self._items)]] = 0.0

    def state(self) -> tuple[list[str], dict[str, Array]]:
        """The sources, and all other state, float64, by name: copies. ``users`` and ``items`` have as many rows as were
        seen."""
        return list(self._sources), {
            "users": self._users[: self._rows[0]].copy(),
            "items": self._items[: self._rows[1]].copy(),
            "sources": np.array(list(self._sources.values())).reshape(-1, 7),
        }

    def restore(self, sources: Sequence[str], state: Mapping[str, npt.NDArray[np.floating]]) -> None:
        """The inverse of :meth:`state`. Raises ValueError naming an array that is missing or misshapen."""
        for name, width in _WIDTHS.items():
            check_shape(name, state, (None, width))
        if len(state["sources"]) != len(sources):
            raise ValueError(f"sources: {len(state['sources'])} rows for {len(sources)} names")
        users, items, of = (np.array(state[name], dtype=np.float64) for name in _WIDTHS)
        self._rows = [len(users), len(items)]
        self._users, self._items = grown(users, _CAPACITY), grown(items, _CAPACITY)
        self._sources = dict(zip(sources, of, strict=True))

    def _measured(self, name: str, score: Floats) -> Array:
        """What is known of a source, these exposed scores included."""
        of = self._sources.pop(name, np.zeros(7))
        self._sources[name] = of
        while len(self._sources) > SOURCES:
            del self._sources[next(iter(self._sources))]
        of[4:] = tuple(Moments(*of[4:].tolist()).including(score))
        return of


def _standard(score: Floats, of: Array) -> Array:
    """Standard scores; 0 where there is none."""
    moments = Moments(*of[4:].tolist())
    z: Array = np.where(np.isnan(score), 0.0, (score.astype(np.float64) - moments.mean) / moments.spread)
    return z


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
