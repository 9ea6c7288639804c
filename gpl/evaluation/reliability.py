"""Whether confidence means anything: how often what the labels call good is good, by confidence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from gpl.evaluation.bench import Bench
from gpl.evaluation.generative import SOURCE, Parts, mixed_calibration

BINS = 10
TOP = 20
"""A user's candidates with the highest anchor score: those that pseudo-labels call good."""


def reliability(bench: Bench, settings: Mapping[str, Any]) -> list[dict[str, float]]:
    """Bins of equal size over the test users' ``TOP`` candidates each, least confident first: ``confidence`` and
    ``label`` (means; labels as the pointwise loss learns them), ``relevant`` (share that truly is), ``pairs``. Empty
    where nobody has anchors."""
    parts = Parts(**settings)
    world, scorer, pairs = bench.world, bench.scorer(parts.spec, parts.labelling), bench.pairs("recalled")
    calibration = scorer.calibration(pairs, bench.cases.log)
    mixed = None
    if parts.pseudo == "pointwise":
        mixed = mixed_calibration(pairs, bench.labels(parts.spec, parts.labelling, "recalled")[0].score)
    rows = []
    for user in bench.test.users.tolist():
        labelled = scorer.label_all(int(bench.cases.final[user]), calibration)
        if labelled is not None:
            items = np.flatnonzero(world.candidates(user) & world.has_content)
            best = items[np.argsort(-labelled.score[items], kind="stable")[:TOP]]
            good = np.isin(best, world.relevant[user])
            label = labelled.label[best]
            if mixed is not None:
                own = mixed.label(
                    np.array([user + 1]), best + 1, np.zeros(len(best), np.int64), labelled.score[best], [SOURCE]
                )
                label = np.where(np.isnan(own), label, own)
            rows.append(np.stack([labelled.confidence[best], label, good]))
    if not rows:
        return []
    confidence, label, relevant = np.concatenate(rows, axis=1)
    return [
        {
            "confidence": float(confidence[at].mean()),
            "label": float(label[at].mean()),
            "relevant": float(relevant[at].mean()),
            "pairs": len(at),
        }
        for at in np.array_split(np.argsort(confidence, kind="stable"), BINS)
        if len(at)
    ]
