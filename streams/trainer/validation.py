"""Progressive validation (test, then train): every batch is scored by the models before they are trained on it.

Figures over a sliding window of requests, each counted at its first revision; a later one that exposes more items
counts for those, without a rank. Of exposed items, all and by slice (head and tail by exposures so far; new to the
model or known to it): AUC, GAUC (by user), log loss, ECE, and HR@10 over all candidates of the request, exposed and
unexposed ranked together: a clicked item in the top 10 is a hit, the mean is over clicked items. Of pseudo-labelled
ones (slice ``pseudo``): AUC, log loss and ECE against their calibrated labels.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gpl.arrays import sigmoid
from gpl.evaluation.metrics import auc, calibration_error, gauc, log_loss
from gpl.labels.matching import Floats, Ints
from gpl.preranker.batch import Batch
from streams.trainer.gate import Feed

TOP = 10
ALL, PSEUDO = "all", "pseudo"
PSEUDO_PAIRS = 20
"""Pseudo-labelled pairs a request that count: the first ones. A window has enough of them, and stays small."""

Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Evaluated:
    """R requests as the models saw them before training, M exposed items and K pseudo-labelled ones in all.

    ``users`` (R,), ``exposed`` and ``hidden`` (R,): how many of the flat entries are each request's. ``clicked``,
    ``tail``, ``new`` (M,). By model: ``logits`` (M,), ``rank`` (M,) among all candidates of the request, 1 is best, 0
    for items that were not clicked or had nothing to be ranked among, ``pseudo`` (K,), logits of pairs with ``label``
    (K,).
    """

    users: list[str]
    exposed: Ints
    hidden: Ints
    clicked: Bools
    tail: Bools
    new: Bools
    label: Floats
    logits: Mapping[str, Floats]
    rank: Mapping[str, Ints]
    pseudo: Mapping[str, Floats]

    def of(self, chosen: Bools) -> Evaluated:
        """Of some of the requests: ``chosen`` (R,)."""
        shown, hidden = np.repeat(chosen, self.exposed), np.repeat(chosen, self.hidden)
        return Evaluated(
            users=[self.users[i] for i in np.flatnonzero(chosen).tolist()],
            exposed=self.exposed[chosen],
            hidden=self.hidden[chosen],
            clicked=self.clicked[shown],
            tail=self.tail[shown],
            new=self.new[shown],
            label=self.label[hidden],
            logits={model: values[shown] for model, values in self.logits.items()},
            rank={model: values[shown] for model, values in self.rank.items()},
            pseudo={model: values[hidden] for model, values in self.pseudo.items()},
        )

    def with_corrections(self, first: Bools) -> Evaluated:
        """For figures and the gate: of later revisions, not ``first`` (R,), what they newly expose. Those pairs are not
        all of their request, so they have no rank."""
        ranked = np.repeat(first, self.exposed)
        return replace(self, rank={model: values * ranked for model, values in self.rank.items()}).of(
            first | (self.exposed > 0)
        )

    def split(self) -> Iterator[Evaluated]:
        """One by one."""
        for i in range(len(self.users)):
            yield self.of(np.arange(len(self.users)) == i)


def joined(parts: Sequence[Evaluated], models: Sequence[str]) -> Evaluated:
    """All requests of ``parts``, in order, as ``models`` saw them."""

    def flat(name: str, kind: type) -> NDArray[Any]:
        return np.concatenate([np.zeros(0, kind), *(getattr(part, name) for part in parts)], dtype=kind)

    def by_model(name: str, kind: type) -> dict[str, NDArray[Any]]:
        return {
            model: np.concatenate([np.zeros(0, kind), *(getattr(part, name)[model] for part in parts)], dtype=kind)
            for model in models
        }

    return Evaluated(
        users=[user for part in parts for user in part.users],
        exposed=flat("exposed", np.int64),
        hidden=flat("hidden", np.int64),
        clicked=flat("clicked", np.bool_),
        tail=flat("tail", np.bool_),
        new=flat("new", np.bool_),
        label=flat("label", np.float32),
        logits=by_model("logits", np.float32),
        rank=by_model("rank", np.int64),
        pseudo=by_model("pseudo", np.float32),
    )


def evaluate(users: list[str], batch: Batch, logits: Mapping[str, Floats], new: Bools, tail: Bools) -> Evaluated:
    """A batch of R requests by the ``logits`` (P,) that each model gave it; ``new``, ``tail``: of its exposed pairs."""
    requests, size = len(users), np.bincount(batch.request, minlength=len(users))
    position = np.arange(len(batch.request)) - np.repeat(np.cumsum(size) - size, size)
    shown = np.bincount(batch.request[batch.exposed], minlength=requests)
    # Exposed pairs come first in a request.
    hidden = ~batch.exposed & (position < shown[batch.request] + PSEUDO_PAIRS)
    clicked = batch.clicked[batch.exposed] > 0
    # Without pseudo-labels a record does not name the other candidates, so there is nothing to rank among.
    ranked = clicked & (size > shown)[batch.request[batch.exposed]]
    return Evaluated(
        users=users,
        exposed=shown,
        hidden=np.bincount(batch.request[hidden], minlength=requests),
        clicked=clicked,
        tail=tail,
        new=new,
        label=batch.label[hidden],
        logits={model: values[batch.exposed] for model, values in logits.items()},
        rank={
            model: _ranks(values, batch.request, position, size, np.flatnonzero(batch.exposed)[ranked], ranked)
            for model, values in logits.items()
        },
        pseudo={model: values[hidden] for model, values in logits.items()},
    )


def _ranks(values: Floats, request: Ints, position: Ints, size: Ints, pairs: Ints, at: Bools) -> Ints:
    """Rank of ``pairs`` among the pairs of their request, put where ``at`` says; 0 elsewhere."""
    found = np.zeros(len(at), np.int64)
    if len(pairs):
        grid = np.full((len(size), int(size.max())), -np.inf, np.float32)
        grid[request, position] = values
        # Ties count against the model, so that a constant scorer earns no hits.
        found[at] = np.count_nonzero(grid[request[pairs]] >= values[pairs, None], axis=1)
    return found


def tail_threshold(exposures: NDArray[np.int64]) -> float:
    """Items with at most this many exposures are the less popular half (the tail)."""
    return float(np.median(exposures)) if len(exposures) else 0.0


class ProgressiveWindow:
    """The newest ``capacity`` evaluated requests, as ``models`` scored them."""

    def __init__(self, capacity: int, models: Sequence[str]) -> None:
        self._parts: deque[Evaluated] = deque()
        self._capacity = capacity
        self._held = 0
        self._models = tuple(models)

    def __len__(self) -> int:
        return min(self._held, self._capacity)

    def add(self, evaluated: Evaluated) -> None:
        """Take in evaluated requests; the oldest leave."""
        self._parts.append(evaluated)
        self._held += len(evaluated.users)
        while self._held - len(self._parts[0].users) >= self._capacity:
            self._held -= len(self._parts.popleft().users)

    def summary(self, model: str) -> dict[str, float]:
        """auc, gauc, log_loss, ece, hr10 and hr10_tail of a model; a figure that is not defined is left out."""
        slices = self.slices(model)
        figures = slices.get(ALL, {})
        if "hr10" in slices.get("tail", {}):
            figures["hr10_tail"] = slices["tail"]["hr10"]
        return figures

    def slices(self, model: str, newest: int | None = None) -> dict[str, dict[str, float]]:
        """Figures by slice over the window, or over its ``newest`` requests."""
        held = self._newest(newest or self._capacity, [model])
        if not held.users:
            return {}
        index: dict[str, int] = {}
        users = np.repeat([index.setdefault(user, len(index)) for user in held.users], held.exposed)
        logits, rank = held.logits[model].astype(np.float64), held.rank[model]
        found = {}
        for name, rows in (
            (ALL, None),
            ("head", ~held.tail),
            ("tail", held.tail),
            ("new", held.new),
            ("known", ~held.new),
        ):
            chosen = slice(None) if rows is None else rows
            figures = _figures(held.clicked[chosen], logits[chosen], rank[chosen])
            if name == ALL:
                figures["gauc"] = gauc(held.clicked, logits, users)
            found[name] = figures
        found[PSEUDO] = _pseudo_figures(held.label.astype(np.float64), held.pseudo[model].astype(np.float64))
        return {
            name: {key: float(value) for key, value in figures.items() if math.isfinite(value)}
            for name, figures in found.items()
        }

    def feed(self, newest: int) -> Feed:
        """What the newest requests' labels were like."""
        held = self._newest(newest, ())
        return Feed(
            requests=len(held.users),
            exposures=len(held.clicked),
            clicks=int(np.count_nonzero(held.clicked)),
            of_one_user=max(Counter(held.users).values(), default=0),
        )

    def state(self) -> tuple[list[str], dict[str, Tensor]]:
        """For the checkpoint, oldest first: users by request, and all else as flat arrays."""
        held = self._newest(self._capacity, self._models)
        arrays = {name: getattr(held, name) for name in _FLAT}
        for name in _BY_MODEL:
            arrays |= {f"{name}.{model}": getattr(held, name)[model] for model in self._models}
        return held.users, {name: torch.from_numpy(array) for name, array in arrays.items()}

    def restore(self, users: list[str], tensors: Mapping[str, Tensor]) -> None:
        """Take over a saved window. Raises KeyError when it lacks one of the models."""
        flat: dict[str, Any] = {name: tensors[name].numpy().copy() for name in _FLAT}
        for name in _BY_MODEL:
            flat[name] = {model: tensors[f"{name}.{model}"].numpy().copy() for model in self._models}
        self._parts = deque([Evaluated(users=users, **flat)])
        self._held = len(users)

    def _newest(self, count: int, models: Sequence[str]) -> Evaluated:
        parts: deque[Evaluated] = deque()
        held = 0
        for part in reversed(self._parts):
            if held >= min(count, self._capacity):
                break
            parts.appendleft(part)
            held += len(part.users)
        every = joined(list(parts), models)
        excess = held - min(count, self._capacity)
        return every.of(np.arange(held) >= excess) if excess > 0 else every


_FLAT = ("exposed", "hidden", "clicked", "tail", "new", "label")
_BY_MODEL = ("logits", "rank", "pseudo")


def _figures(clicked: Bools, logits: NDArray[np.float64], rank: Ints) -> dict[str, float]:
    if not len(clicked):
        return {}
    probability = sigmoid(logits)
    ranked = rank > 0
    figures = {
        "click_rate": float(clicked.mean()),
        "auc": auc(clicked, logits),
        "log_loss": log_loss(clicked, probability),
        "ece": calibration_error(clicked, probability),
    }
    if ranked.any():
        figures["hr10"] = float((rank[ranked] <= TOP).mean())
    return figures


def _pseudo_figures(label: NDArray[np.float64], logits: NDArray[np.float64]) -> dict[str, float]:
    """Against labels in [0, 1]. AUC: each pair counts as a click with weight ``label``, else with the rest."""
    if not len(label):
        return {}
    p = sigmoid(logits).clip(1e-7, 1 - 1e-7)
    edges = np.quantile(p, np.arange(1, 10) / 10, method="inverted_cdf")
    gap = np.bincount(np.searchsorted(edges, p), label - p, minlength=10)
    _, tie = np.unique(logits, return_inverse=True)
    positive, negative = np.bincount(tie, label), np.bincount(tie, 1 - label)
    pairs = positive.sum() * negative.sum()
    below = np.cumsum(negative) - negative / 2
    return {
        "auc": float((positive * below).sum() / pairs) if pairs > 0 else math.nan,
        "log_loss": float(-(label * np.log(p) + (1 - label) * np.log1p(-p)).mean()),
        "ece": float(np.abs(gap).sum() / len(label)),
    }
