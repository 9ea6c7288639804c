"""From a study's results to what is reported: means, intervals, comparisons, targets. As plain JSON values.

``docs/evaluation.md`` documents the document.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np

from gpl.evaluation.bench import code_digest
from gpl.evaluation.intervals import Interval
from gpl.evaluation.statistics import Comparison, crossed_comparison, crossed_mean, seed_comparison, seed_mean
from gpl.evaluation.study import MethodResult, SetResult, StudyConfig, settings_of

SCHEMA = 1
PER_USER = ("hr@3", "hr@5", "hr@10", "tail_hr@10", "ndcg@10", "auc", "diversity")
WHOLE = ("exposed_auc", "exposed_gauc", "coverage", "gini")
COMPARED = ("hr@10", "tail_hr@10", "ndcg@10", "auc", "exposed_auc", "exposed_gauc")

GAIN = {"hr@10": 0.05, "tail_hr@10": 0.15}
"""Least relative gain that GPL should have over each rival, its interval above 0."""
AUC_LOSS = 0.002
"""Most relative loss of AUC on exposed items."""
SUBJECT = "gpl"


def summarise(config: StudyConfig, results: Sequence[SetResult]) -> dict[str, Any]:
    """The whole document."""
    return {
        "schema": SCHEMA,
        "settings": settings_of(config),
        "versions": _versions(),
        "sets": [_set(result) for result in results],
    }


def _set(result: SetResult) -> dict[str, Any]:
    methods = {name: _method(found) for name, found in result.methods.items()}
    subject = result.methods.get(SUBJECT)
    comparisons: dict[str, Any] = {}
    if subject is not None:
        comparisons = {
            name: {metric: _comparison(compare(subject, other, metric)) for metric in COMPARED}
            for name, other in result.methods.items()
            if name != SUBJECT
        }
    return {
        "name": result.name,
        "description": result.description,
        "facts": result.facts,
        "methods": methods,
        "gpl_against": comparisons,
        "targets": _targets(result) if subject is not None else [],
    }


def compare(first: MethodResult, second: MethodResult, metric: str) -> Comparison:
    """Paired, on the same users and seeds (whole-world figures: on the same seeds)."""
    if metric in first.per_user:
        return crossed_comparison(first.per_user[metric], second.per_user[metric])
    return seed_comparison(first.world[metric], second.world[metric])


def _method(found: MethodResult) -> dict[str, Any]:
    metrics = {name: _interval(crossed_mean(found.per_user[name])) for name in PER_USER}
    metrics |= {name: _interval(seed_mean(found.world[name])) for name in WHOLE}
    curve = found.curve.sum(axis=0)
    return {
        "title": found.method.title,
        "group": found.method.group,
        "settings": found.settings,
        "seconds": float(found.seconds.mean()),
        "metrics": metrics,
        "hr@10_by_popularity": [_number(hits / count if count else math.nan) for hits, count in curve.tolist()],
        "reliability": found.reliability,
    }


def _targets(result: SetResult) -> list[dict[str, Any]]:
    """What GPL should reach, and whether it does. A rival is the best of its kind by the test users' HR@10, which
    favours it. EASE is no pre-ranker (its user side is the whole history), so the best one beside it is shown too.
    """
    methods, subject = result.methods, result.methods[SUBJECT]
    without = [m for m in methods.values() if m.method.group == "no pseudo-labels"]
    kinds = {
        "best without pseudo-labels": without,
        "best pre-ranker without pseudo-labels": [m for m in without if m.method.name != "ease"],
        "best anchor score alone": [m for m in methods.values() if m.method.name.startswith("anchor-")],
        "mean-history labels": [m for m in methods.values() if m.method.name == "mean-labels"],
    }
    found = []
    for kind, rivals in kinds.items():
        if not rivals:
            continue
        for metric, least in GAIN.items():
            rival = max(rivals, key=lambda m: _mean(m, "hr@10"))
            relative = compare(subject, rival, metric).relative
            met = relative.estimate >= least and relative.low > 0
            wanted = f"at least {least:+.0%}, interval above 0"
            found.append(_target(f"{metric} against {kind}", rival.method.name, wanted, relative, met))
        if kind == "best pre-ranker without pseudo-labels":
            rival = max(rivals, key=lambda m: _mean(m, "hr@10"))
            relative = compare(subject, rival, "exposed_auc").relative
            if not math.isnan(relative.estimate):
                met = relative.estimate >= -AUC_LOSS
                wanted = f"at least {-AUC_LOSS:+.1%}"
                found.append(_target(f"exposed AUC against {kind}", rival.method.name, wanted, relative, met))
    for label, name, plain in (
        ("no harm: HR@10 against its own loss without pseudo-labels", SUBJECT, "no-labels"),
        ("no harm: tail HR@10 against its own loss without pseudo-labels", SUBJECT, "no-labels"),
        ("no harm: HR@10 with anchors of other users", "shuffled", "shuffled-0"),
        ("no harm: HR@10 with random anchors", "random", "random-0"),
    ):
        if name in methods and plain in methods:
            metric = "tail_hr@10" if "tail" in label else "hr@10"
            compared = compare(methods[name], methods[plain], metric)
            # Where nobody hits anything, there is no relation, but no harm either.
            met = compared.difference.high >= 0
            found.append(_target(label, plain, "interval not below 0", compared.relative, met))
    return found


def _target(what: str, rival: str, wanted: str, relative: Interval, met: bool) -> dict[str, Any]:
    return {"what": what, "rival": rival, "wanted": wanted, "relative": _interval(relative), "met": bool(met)}


def _mean(found: MethodResult, metric: str) -> float:
    values = found.per_user.get(metric, found.world.get(metric))
    assert values is not None
    return float(np.nanmean(values)) if not np.isnan(values).all() else -math.inf


def _comparison(found: Comparison) -> dict[str, Any]:
    return {"difference": _interval(found.difference), "relative": _interval(found.relative)}


def _interval(found: Interval) -> list[float | None]:
    return [_number(x) for x in found]


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "code": code_digest(".")}
    for package in ("gpl-streams", "torch", "numpy", "scipy", "sentence-transformers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found
