"""Progressive validation (test, then train): every batch is scored by the models before they are trained on it.

Figures over a sliding window of requests, each counted once, at its first revision. Of exposed items, all and by slice
(head and tail by exposures so far; new to the model or known to it): AUC, GAUC (by user), log loss, ECE, and HR@10 over
all candidates of the request, exposed and unexposed ranked together: a clicked item in the top 10 is a hit, the mean is
over clicked items. Of pseudo-labelled ones (slice ``pseudo``): AUC, log loss and ECE against their calibrated labels.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gpl.evaluation.metrics import auc, calibration_error, gauc, log_loss
from gpl.labels.matching import Floats
from streams.trainer.gate import Feed

TOP = 10
ALL, PSEUDO = "all", "pseudo"
PSEUDO_PAIRS = 20
"""Pseudo-labelled pairs a request that count: the first ones. A window has enough of them, and stays small."""

Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Evaluated:
    """One request as the models saw it before training, m exposed items and k pseudo-labelled ones.

    ``clicked``, ``tail``, ``new`` (m,). By model: ``logits`` (m,), ``rank`` (m,) among all candidates, 1 is best, 0 for
    items that were not clicked or had nothing to be ranked among, ``pseudo`` (k,), logits of pairs with ``label`` (k,).
    """

    user: str
    clicked: Bools
    tail: Bools
    new: Bools
    logits: Mapping[str, Floats]
    rank: Mapping[str, NDArray[np.int32]]
    label: Floats
    pseudo: Mapping[str, Floats]


def ranks(scores: Floats, of: NDArray[np.int64]) -> NDArray[np.int32]:
    """Rank, 1 is best, of the entries ``of`` among all ``scores`` (n,). Ties count against the model, so that a
    constant scorer earns no hits."""
    found: NDArray[np.int32] = np.count_nonzero(scores[None, :] >= scores[of, None], axis=1).astype(np.int32)
    return found


def tail_threshold(exposures: NDArray[np.int64]) -> float:
    """Items with at most this many exposures are the less popular half (the tail)."""
    return float(np.median(exposures)) if len(exposures) else 0.0


class ProgressiveWindow:
    """The newest ``capacity`` evaluated requests, as ``models`` scored them."""

    def __init__(self, capacity: int, models: Sequence[str]) -> None:
        self._records: deque[Evaluated] = deque(maxlen=capacity)
        self._models = tuple(models)

    def __len__(self) -> int:
        return len(self._records)

    def add(self, records: Iterable[Evaluated]) -> None:
        """Take in evaluated requests; the oldest leave."""
        self._records.extend(records)

    def summary(self, model: str) -> dict[str, float]:
        """auc, gauc, log_loss, ece, hr10 and hr10_tail of a model; a figure that is not defined is left out."""
        slices = self.slices(model)
        figures = slices.get(ALL, {})
        if "hr10" in slices.get("tail", {}):
            figures["hr10_tail"] = slices["tail"]["hr10"]
        return figures

    def slices(self, model: str, newest: int | None = None) -> dict[str, dict[str, float]]:
        """Figures by slice over the window, or over its ``newest`` requests."""
        records = list(self._records)[-newest if newest else 0 :]
        if not records:
            return {}
        clicked = np.concatenate([r.clicked for r in records])
        tail = np.concatenate([r.tail for r in records])
        new = np.concatenate([r.new for r in records])
        logits = np.concatenate([r.logits[model] for r in records]).astype(np.float64)
        rank = np.concatenate([r.rank[model] for r in records])
        index: dict[str, int] = {}
        of = [index.setdefault(r.user, len(index)) for r in records]
        users = np.repeat(of, [len(r.clicked) for r in records])
        found = {}
        for name, rows in ((ALL, None), ("head", ~tail), ("tail", tail), ("new", new), ("known", ~new)):
            chosen = slice(None) if rows is None else rows
            figures = _figures(clicked[chosen], logits[chosen], rank[chosen])
            if name == ALL:
                figures["gauc"] = gauc(clicked, logits, users)
            found[name] = figures
        found[PSEUDO] = _pseudo_figures(
            np.concatenate([r.label for r in records]).astype(np.float64),
            np.concatenate([r.pseudo[model] for r in records]).astype(np.float64),
        )
        return {
            name: {key: float(value) for key, value in figures.items() if math.isfinite(value)}
            for name, figures in found.items()
        }

    def feed(self, newest: int) -> Feed:
        """What the newest requests' labels were like."""
        records = list(self._records)[-newest:] if newest else []
        return Feed(
            requests=len(records),
            exposures=sum(len(r.clicked) for r in records),
            clicks=sum(int(np.count_nonzero(r.clicked)) for r in records),
            of_one_user=max(Counter(r.user for r in records).values(), default=0),
        )

    def state(self) -> tuple[list[str], dict[str, Tensor]]:
        """For the checkpoint, oldest first: users by request, and all else as flat arrays."""
        records = list(self._records)
        arrays: dict[str, NDArray[np.generic]] = {
            "exposed": np.array([len(r.clicked) for r in records], np.int64),
            "pseudo": np.array([len(r.label) for r in records], np.int64),
            "clicked": _flat([r.clicked for r in records], np.bool_),
            "tail": _flat([r.tail for r in records], np.bool_),
            "new": _flat([r.new for r in records], np.bool_),
            "label": _flat([r.label for r in records], np.float32),
        }
        for model in self._models:
            arrays[f"logits.{model}"] = _flat([r.logits[model] for r in records], np.float32)
            arrays[f"rank.{model}"] = _flat([r.rank[model] for r in records], np.int32)
            arrays[f"pseudo.{model}"] = _flat([r.pseudo[model] for r in records], np.float32)
        return [r.user for r in records], {name: torch.from_numpy(array) for name, array in arrays.items()}

    def restore(self, users: Sequence[str], tensors: Mapping[str, Tensor]) -> None:
        """Take over a saved window. Raises KeyError when it lacks one of the models."""
        exposed, pseudo = tensors["exposed"].tolist(), tensors["pseudo"].tolist()

        def parts(name: str, sizes: list[int]) -> list[NDArray[np.generic]]:
            return np.split(tensors[name].numpy(), np.cumsum(sizes)[:-1]) if sizes else []

        columns = {name: parts(name, exposed) for name in ("clicked", "tail", "new")}
        label = parts("label", pseudo)
        by_model = {
            name: {model: parts(f"{name}.{model}", sizes) for model in self._models}
            for name, sizes in (("logits", exposed), ("rank", exposed), ("pseudo", pseudo))
        }
        self._records.clear()
        for i, user in enumerate(users):
            of = {name: {model: rows[i] for model, rows in found.items()} for name, found in by_model.items()}
            rest = {name: rows[i] for name, rows in columns.items()}
            self._records.append(Evaluated(user=user, label=label[i], **rest, **of))  # type: ignore[arg-type]


def _flat(parts: Sequence[NDArray[Any]], kind: type) -> NDArray[np.generic]:
    return np.concatenate([np.zeros(0, kind), *parts], dtype=kind)


def _figures(clicked: Bools, logits: NDArray[np.float64], rank: NDArray[np.int32]) -> dict[str, float]:
    if not len(clicked):
        return {}
    probability = _sigmoid(logits)
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
    p = _sigmoid(logits).clip(1e-7, 1 - 1e-7)
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


def _sigmoid(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    probability: NDArray[np.float64] = 1 / (1 + np.exp(-logits.clip(-50, 50)))
    return probability
