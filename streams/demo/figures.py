"""The evaluation of a demo, from the trainer's journal: progressive validation of both models, over the whole stream.

Each request was ranked before it was trained on, so every figure is of data that the models had not seen.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from gpl.arrays import sigmoid
from gpl.evaluation.intervals import Interval, bootstrap_mean_ci, paired_difference_ci
from gpl.evaluation.metrics import auc, gauc, log_loss

TOP = 10
MODELS = {"gpl": "gpl", "exposed": "exposed_only"}
"""Names in the journal and in the report."""


class _Score(msgspec.Struct, tag="score", tag_field="kind"):
    user_id: str
    ts: int
    clicked: int
    score: dict[str, float]


class _Rank(msgspec.Struct, tag="rank", tag_field="kind"):
    user_id: str
    ts: int
    tail: bool
    n: int
    rank: dict[str, int]


@dataclass
class Evaluation:
    """Columns of the journal. Exposed items: ``users``, ``clicked``, ``logits``; clicked items: the others."""

    users: NDArray[np.str_]
    clicked: NDArray[np.int64]
    logits: dict[str, NDArray[np.float64]]
    hit_users: NDArray[np.str_]
    tail: NDArray[np.bool_]
    hits: dict[str, NDArray[np.float64]]
    candidates: float
    models: list[str] = field(default_factory=list)


def read(journal: Path) -> Evaluation:
    """The journal as columns, in the order of evaluation; empty when there is no journal."""
    scores: list[_Score] = []
    ranks: list[_Rank] = []
    for line in _lines(journal):
        if isinstance(line, _Score):
            scores.append(line)
        else:
            ranks.append(line)
    models = [name for name in MODELS if any(name in line.score for line in scores[:1])]
    return Evaluation(
        users=np.array([line.user_id for line in scores], dtype=np.str_),
        clicked=np.array([line.clicked for line in scores], dtype=np.int64),
        logits={name: np.array([line.score[name] for line in scores]) for name in models},
        hit_users=np.array([line.user_id for line in ranks], dtype=np.str_),
        tail=np.array([line.tail for line in ranks], dtype=np.bool_),
        hits={name: np.array([float(line.rank[name] <= TOP) for line in ranks]) for name in models},
        candidates=float(np.mean([line.n for line in ranks])) if ranks else 0.0,
        models=models,
    )


def _lines(journal: Path) -> Iterator[_Score | _Rank]:
    if not journal.is_file():
        return
    decoder: msgspec.json.Decoder[_Score | _Rank] = msgspec.json.Decoder(_Score | _Rank)
    with journal.open("rb") as handle:
        for line in handle:
            yield decoder.decode(line)


def progressive(evaluation: Evaluation) -> dict[str, dict[str, float | None]]:
    """AUC, GAUC (by user) and log loss on exposed items, by model; null where a figure is not defined."""
    figures = {}
    for name in evaluation.models:
        clicked, logits = evaluation.clicked, evaluation.logits[name]
        figures[MODELS[name]] = {
            "auc": _finite(auc(clicked, logits)),
            "gauc": _finite(gauc(clicked, logits, evaluation.users)),
            "log_loss": _finite(log_loss(clicked, sigmoid(logits))),
        }
    return figures


def hit_rates(evaluation: Evaluation, seed: int = 0) -> dict[str, dict[str, Any]]:
    """HR@10 over all candidates with 95% intervals, bootstrap clustered by user: [estimate, low, high].

    ``all`` clicked items and those of the ``tail``; ``difference`` is GPL minus exposed-only on the same clicks.
    """
    result: dict[str, dict[str, Any]] = {}
    for part, mask in (("all", np.ones(len(evaluation.tail), bool)), ("tail", evaluation.tail)):
        users = evaluation.hit_users[mask]
        figures: dict[str, Any] = {"clicks": int(mask.sum()), "users": len(np.unique(users))}
        hits = {name: values[mask] for name, values in evaluation.hits.items()}
        for name in MODELS:
            known = name in hits and len(users) > 0
            figures[MODELS[name]] = _interval(bootstrap_mean_ci(hits[name], users, seed)) if known else None
        both = all(name in hits for name in MODELS) and len(users) > 0
        figures["difference"] = (
            _interval(paired_difference_ci(hits["gpl"], hits["exposed"], users, seed)) if both else None
        )
        result[part] = figures
    return result


@dataclass(frozen=True)
class Curves:
    """Figures by windows of the stream. ``at``: share of the exposed items evaluated at the middle of each window."""

    at: list[float]
    auc: dict[str, list[float]]
    hr10: dict[str, list[float]]


def curves(evaluation: Evaluation, windows: int = 20) -> Curves:
    """AUC and HR@10 in equal successive parts of the stream, by model."""
    count = min(windows, len(evaluation.clicked) // 50, len(evaluation.tail) // 10)
    if count < 2:
        return Curves([], {}, {})
    at = [(i + 0.5) / count for i in range(count)]
    parts = np.array_split(np.arange(len(evaluation.clicked)), count)
    hit_parts = np.array_split(np.arange(len(evaluation.tail)), count)
    return Curves(
        at=at,
        auc={
            MODELS[name]: [float(auc(evaluation.clicked[part], logits[part])) for part in parts]
            for name, logits in evaluation.logits.items()
        },
        hr10={MODELS[name]: [float(hits[part].mean()) for part in hit_parts] for name, hits in evaluation.hits.items()},
    )


def _interval(interval: Interval) -> list[float | None]:
    return [_finite(value) for value in interval]


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
