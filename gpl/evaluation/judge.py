"""Judging a scorer on everything: every candidate of every judged user, and the held-out exposures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gpl.evaluation.dataset import Bools, Floats, Ints
from gpl.evaluation.metrics import auc, gauc
from gpl.evaluation.world import World

Scores = Callable[[Ints], Floats]
"""Scores (len(users), n) of all items for users; higher is better, finite."""

CUTS = (3, 5, 10)
LIST = 10
"""Length of the lists that coverage, Gini and diversity are of."""
_BLOCK = 256


@dataclass(frozen=True)
class Outcome:
    """``per_user``: values (J,) in the order of ``users``, NaN where undefined for a user. ``world``: whole figures.

    ``curve`` (10, 2): expected hits at 10 and number of relevant items, by how often an item was exposed, the most
    exposed tenth of the items first.
    """

    users: Ints
    per_user: dict[str, npt.NDArray[np.float64]]
    world: dict[str, float]
    curve: npt.NDArray[np.float64]

    def mean(self, metric: str) -> float:
        """Mean over users where defined; of a whole-world figure, itself."""
        if metric in self.world:
            return self.world[metric]
        values = self.per_user[metric]
        return float(np.nanmean(values)) if not np.isnan(values).all() else float("nan")


class Judge:
    """Judges scorers on one world. ``users`` (J,): who is judged."""

    def __init__(self, world: World, users: Ints) -> None:
        self.world, self.users = world, users
        self.tail = world.tail
        rank = np.empty(world.n_items, dtype=np.int64)
        rank[np.argsort(-world.exposures, kind="stable")] = np.arange(world.n_items)
        self._tenth = rank * 10 // world.n_items
        self._held = [
            (row, int(user))
            for row, user in enumerate(world.held_out.user.tolist())
            if user in set(users.tolist()) and len(world.held_out.exposed[row])
        ]

    def goal(self, scores: Scores) -> float:
        """What settings and epochs are chosen by, quickly: the mean of HR@10 and tail HR@10, HR@10 alone where no user
        has anything relevant in the tail. By HR@10 alone the tail would be whatever a choice brings along."""
        found = self._ranks(scores, None, np.zeros((10, 2)))
        hits, tail = found["hr@10"], found["tail_hr@10"]
        means = [float(np.nanmean(values)) for values in (hits, tail) if not np.isnan(values).all()]
        return sum(means) / len(means)

    def judge(self, scores: Scores) -> Outcome:
        """All metrics.

        HR@k: for each relevant item of a user, whether fewer than k irrelevant candidates score higher (ties count as
        under random tie-breaking), averaged over the user's relevant items; ``tail_hr@10`` over those in the tail.
        NDCG@10 ranks all candidates together. ``auc``: probability that a relevant candidate scores above an irrelevant
        one. ``diversity``: 1 - mean cosine between the items of a user's top ten. ``coverage``: share of the catalogue
        in somebody's top ten; ``gini`` of how often each item is in one (0: all alike).
        """
        lists = np.full((len(self.users), LIST), -1, dtype=np.int64)
        curve = np.zeros((10, 2))
        per_user = self._ranks(scores, lists, curve)
        shown = np.bincount(lists[lists >= 0], minlength=self.world.n_items)
        figures = {"coverage": float((shown > 0).mean()), "gini": _gini(shown)}
        figures |= self._exposed(scores)
        return Outcome(self.users, per_user, figures, curve)

    def _ranks(
        self, scores: Scores, lists: Ints | None, curve: npt.NDArray[np.float64]
    ) -> dict[str, npt.NDArray[np.float64]]:
        names = [*(f"hr@{k}" for k in CUTS), "tail_hr@10"]
        if lists is not None:
            names += ["ndcg@10", "auc", "diversity"]
        found = {name: np.full(len(self.users), np.nan) for name in names}
        # Ties in top-ten lists fall at random, but the same for every method.
        jumble = np.random.default_rng(self.world.seed).permutation(self.world.n_items)
        for start in range(0, len(self.users), _BLOCK):
            block = self.users[start : start + _BLOCK]
            for row, (user, values) in enumerate(zip(block.tolist(), scores(block), strict=True), start):
                self._rank_user(row, user, values, jumble, found, lists, curve)
        return found

    def _rank_user(
        self,
        row: int,
        user: int,
        values: Floats,
        jumble: Ints,
        found: dict[str, npt.NDArray[np.float64]],
        lists: Ints | None,
        curve: npt.NDArray[np.float64],
    ) -> None:
        world = self.world
        candidate = world.candidates(user)
        relevant = world.relevant[user]
        good = values[relevant].astype(np.float64)
        candidate[relevant] = False
        bad = np.sort(values[candidate]).astype(np.float64)
        candidate[relevant] = True
        below = np.searchsorted(bad, good, side="left")
        above = len(bad) - np.searchsorted(bad, good, side="right")
        ties = len(bad) - below - above
        hits = {k: np.clip((k - above) / (ties + 1), 0.0, 1.0) for k in CUTS}
        for k in CUTS:
            found[f"hr@{k}"][row] = hits[k].mean()
        in_tail = self.tail[relevant]
        if in_tail.any():
            found["tail_hr@10"][row] = hits[10][in_tail].mean()
        if lists is None:
            return
        np.add.at(curve, self._tenth[relevant], np.stack([hits[10], np.ones(len(relevant))], axis=1))
        if len(bad):
            found["auc"][row] = (below + ties / 2).mean() / len(bad)
        top = _top(values, candidate, jumble)
        lists[row, : len(top)] = top
        gain = np.isin(top, relevant) / np.log2(np.arange(len(top)) + 2)
        ideal = (1 / np.log2(np.arange(min(LIST, len(relevant))) + 2)).sum()
        found["ndcg@10"][row] = gain.sum() / ideal
        if len(top) > 1:
            vectors = world.vectors[top].astype(np.float64)
            total = vectors.sum(axis=0)
            cosines = (total @ total - (vectors**2).sum()) / (len(top) * (len(top) - 1))
            found["diversity"][row] = 1.0 - cosines

    def _exposed(self, scores: Scores) -> dict[str, float]:
        """AUC over all held-out exposures of the judged users, and GAUC."""
        held = self.world.held_out
        clicks, predicted, users = [], [], []
        for start in range(0, len(self._held), _BLOCK):
            rows = self._held[start : start + _BLOCK]
            values = scores(np.array([user for _, user in rows], dtype=np.int64))
            for (row, user), mine in zip(rows, values, strict=True):
                clicks.append(held.clicked[held.exposed.offsets[row] : held.exposed.offsets[row + 1]])
                predicted.append(mine[held.exposed[row]])
                users.append(np.full(len(held.exposed[row]), user))
        if not clicks:
            return {"exposed_auc": float("nan"), "exposed_gauc": float("nan")}
        y, s, u = np.concatenate(clicks), np.concatenate(predicted), np.concatenate(users)
        return {"exposed_auc": auc(y, s), "exposed_gauc": gauc(y, s, u)}


def _top(values: Floats, candidate: Bools, jumble: Ints) -> Ints:
    """The ten best candidates, best first."""
    masked = np.where(candidate, values, -np.inf)[jumble]
    count = min(LIST, int(candidate.sum()))
    best = np.argpartition(-masked, count - 1)[:count] if count else np.zeros(0, dtype=np.int64)
    return jumble[best[np.argsort(-masked[best], kind="stable")]]


def _gini(counts: npt.NDArray[np.int64]) -> float:
    """Gini coefficient of counts (n,), at least one positive; NaN otherwise."""
    ordered = np.sort(counts).astype(np.float64)
    if ordered.sum() == 0:
        return float("nan")
    n = len(ordered)
    return float((2 * np.arange(1, n + 1) - n - 1) @ ordered / (n * ordered.sum()))
