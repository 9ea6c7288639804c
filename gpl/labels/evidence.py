"""Labels earn their weight: how much the anchor score tells about clicks beyond what user and item tell. (ours)

Per request with clicks and non-clicks among its exposed items,

    r_i = s_i - mean of s of item i over its earlier requests
    x   = sum_{i clicked} w_i r_i / sum_{i clicked} w_i  -  the same over the non-clicked
    w_i = n_i / (n_i + 1) * min(q / q_i, C),   q_i = (exposures of i + K q) / (n_i + K)

``s`` is the raw anchor score as of the recall, ``n_i`` in how many earlier requests item i was a candidate, ``q`` the
share of exposures over all items. Comparing within a request takes out whatever the user, the moment and the request
add. ``r`` is the score less what it says of the item to anybody (``s`` regressed on items: Frisch and Waugh 1933), so
that popular items, which are shown and clicked more, cannot pass for personal taste. The mean is not shrunk, as the
rest would be an item effect; the variance of ``r`` falls with ``1 + 1 / n_i``, and an item that is new says nothing.
``min(q / q_i, C)`` is a clipped inverse propensity, which lets rarely shown items speak for the many like them.
With anchors that know nothing of their user ``x`` has the mean 0, whatever the exposure policy.

The sum of x over N requests is judged by a bound that holds at all times at once, since the stream looks after every
batch (normal mixture, Howard et al. 2021, eq. 14), on variance V clustered by user, as one user's anchors serve many
requests; x in units of the standard deviation of r:

    low    = mean(x) - sqrt(2 (V + rho) log(sqrt((V + rho) / rho) / (2 alpha) + 1)) / N
    weight = min(1, max(0, low) / full_effect)

so no evidence gives exactly 0, and more than ``full_effect`` for certain gives 1. ``Phi(effect / sqrt 2)`` is the
probability that a clicked item stands above a non-clicked one, for scores of normal distribution.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gpl.arrays import add_at, check_shape, grown
from gpl.labels.matching import Floats, Ints

Array = npt.NDArray[np.float64]

_SHRINKAGE = 5.0  # K: candidacies of an average item that an item's own propensity is mixed with
_CLIP = 10.0  # C
_RHO = 40.0  # the bound is tightest at some 300 requests
_MIN_SPREAD = 1e-5  # scores are recorded with six digits; an item's score that varies less is the same for everybody
_MIN_USERS = 30  # fewer clusters have no usable variance


@dataclass(frozen=True)
class EvidenceConfig:
    """``alpha``: chance that useless anchors ever get a weight. ``full_effect``: standard deviations by which clicked
    items must for certain stand above non-clicked ones for the weight 1. ``half_life``: requests after which evidence
    counts half. ``user_buckets``: rows modulo this share their counts, which merges clusters. (Of items each has its
    own: what tells two with one mean apart would be taken for a taste of users.)"""

    alpha: float = 0.05
    full_effect: float = 0.25
    half_life: float = 100_000.0
    user_buckets: int = 8_192

    def __post_init__(self) -> None:
        if not 0 < self.alpha < 1:
            raise ValueError(f"alpha: {self.alpha}, expected within (0, 1)")
        for name in ("full_effect", "half_life", "user_buckets"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: {getattr(self, name)}, expected a positive number")


@dataclass(frozen=True)
class Reading:
    """``effect``: mean of x, in standard deviations; ``low``: its lower bound, -inf while there is too little data;
    ``weight`` in [0, 1]. ``requests``: that could be judged, discounted by age; ``users``: clusters among them."""

    effect: float
    low: float
    weight: float
    requests: float
    users: int

    @property
    def concordance(self) -> float:
        """``Phi(effect / sqrt 2)``: .5 means that the score tells nothing."""
        return 0.5 * (1.0 + math.erf(self.effect / 2.0))

    @property
    def sharpness(self) -> float:
        """Log-odds of a click that a standard deviation of the score is worth, at most 1; 1 where there is no weight.

        Where the scores of clicked and other items are normal with one variance and means ``effect`` standard
        deviations apart, the log-odds of a click rise by just ``effect`` a standard deviation (Fisher's linear
        discriminant), so of one request's candidates each is the clicked one with probability
        softmax(effect * z).
        """
        return min(1.0, self.effect) if self.weight > 0 else 1.0


class Evidence:
    """Accumulates over requests in the order in which they come. Deterministic; its state is a few arrays."""

    def __init__(self, config: EvidenceConfig | None = None) -> None:
        self.config = config or EvidenceConfig()
        # By row of the id table, with room to grow. Columns: candidacies, exposures, sum of scores.
        self._items: Array = np.zeros((1024, 3))
        self._rows = 0  # as far as any was seen
        # Columns: requests judged, sum of x.
        self._users: Array = np.zeros((self.config.user_buckets, 2))
        self._total: Array = np.zeros(3)  # the same columns over all items
        # Number of exposed residuals and the sum of their squares.
        self._residuals: Array = np.zeros(2)

    def observe(
        self,
        user_row: Ints,
        item_row: Ints,
        request: Ints,
        score: Floats,
        exposed: npt.NDArray[np.bool_],
        clicked: Floats,
    ) -> None:
        """Take in R requests with P pairs: ``user_row`` (R,), all others (P,), ``request`` indexes ``user_row``.

        ``clicked`` is 0 or 1 where exposed; pairs without a score (NaN) are passed over. Each request is judged with
        what earlier calls told of its items, then all are added to it.
        """
        known = ~np.isnan(score)
        request, shown = request[known], exposed[known]
        s = score[known].astype(np.float64)
        item = item_row[known]
        self._grow(int(item.max(initial=-1)) + 1)
        self._judge(user_row % self.config.user_buckets, item, request, s, shown, clicked[known] > 0)
        add_at(self._items, item, np.stack([np.ones(len(s)), shown, s]))
        self._total += np.array([len(s), np.count_nonzero(shown), s.sum()])

    def forget(self, item_row: Ints) -> None:
        """Rows (n,) that other items will have: what is known of them is of those before."""
        gone = item_row[item_row < len(self._items)]
        self._total -= self._items[gone].sum(axis=0)
        self._items[gone] = 0.0

    def read(self) -> Reading:
        """What the evidence says now."""
        count, total = float(self._users[:, 0].sum()), float(self._users[:, 1].sum())
        users = int(np.count_nonzero(self._users[:, 0]))
        spread = math.sqrt(self._residuals[1] / self._residuals[0]) if self._residuals[0] else 0.0
        if spread < _MIN_SPREAD or count == 0:
            return Reading(0.0, -math.inf, 0.0, float(count), users)
        mean = total / count
        variance = float(((self._users[:, 1] - mean * self._users[:, 0]) ** 2).sum()) / spread**2
        bound = (variance + _RHO) / _RHO
        radius = math.sqrt(2 * _RHO * bound * math.log(math.sqrt(bound) / (2 * self.config.alpha) + 1)) / count
        effect = float(mean / spread)
        low = effect - radius if users >= _MIN_USERS else -math.inf
        return Reading(effect, low, min(1.0, max(0.0, low) / self.config.full_effect), float(count), users)

    def state_arrays(self) -> dict[str, Array]:
        """All state, float64, by name; not copies. ``items`` has as many rows as were seen."""
        return {
            "items": self._items[: self._rows],
            "total": self._total,
            "users": self._users,
            "residuals": self._residuals,
        }

    def load_state_arrays(self, state: Mapping[str, npt.NDArray[np.floating]]) -> None:
        """The inverse of :meth:`state_arrays`. Raises ValueError naming an array that is missing or misshapen."""
        mine = self.state_arrays()
        for name, array in mine.items():
            check_shape(name, state, (None, 3) if name == "items" else array.shape)
        self._rows = 0
        self._grow(len(state["items"]))
        self._items[self._rows :] = 0.0
        for name, array in self.state_arrays().items():
            array[:] = state[name]

    def _grow(self, rows: int) -> None:
        self._rows = max(self._rows, rows)
        self._items = grown(self._items, self._rows)

    def _judge(
        self,
        user: Ints,
        item: Ints,
        request: Ints,
        score: Array,
        shown: npt.NDArray[np.bool_],
        clicked: npt.NDArray[np.bool_],
    ) -> None:
        shown = shown & (self._items[item, 0] > 0)
        item, request, score, clicked = item[shown], request[shown], score[shown], clicked[shown]
        seen, exposures, sums = self._items[item].T
        total, all_exposures, _ = self._total
        rate = (all_exposures + 1.0) / (total + 1.0)
        residual = score - sums / seen
        propensity = (exposures + _SHRINKAGE * rate) / (seen + _SHRINKAGE)
        weight = seen / (seen + 1.0) * np.minimum(rate / propensity, _CLIP)
        sides = []
        for side in (clicked, ~clicked):
            mass = np.bincount(request[side], weight[side], minlength=len(user))
            moment = np.bincount(request[side], (weight * residual)[side], minlength=len(user))
            sides.append((mass, moment))
        (mass_clicked, clicks), (mass_other, others) = sides
        judged = np.flatnonzero((mass_clicked > 0) & (mass_other > 0))
        x = clicks[judged] / mass_clicked[judged] - others[judged] / mass_other[judged]
        keep = 0.5 ** (len(judged) / self.config.half_life)
        self._users *= keep
        self._residuals *= keep
        self._users[:, 0] += np.bincount(user[judged], minlength=len(self._users))
        self._users[:, 1] += np.bincount(user[judged], x, minlength=len(self._users))
        self._residuals += np.array([len(residual), (residual**2).sum()])
