"""Pseudo-labels of a request's unexposed candidates: match, calibrate, weigh. The hot path of the labels role."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from gpl.labels.calibration import Calibration
from gpl.labels.confidence import confidence, dispersion_factor, generation_factor
from gpl.labels.matching import Floats, Ints, kernel, max_cosine

Matching = Literal["max", "kernel"]


@dataclass(frozen=True)
class Config:
    """What a label is made of. Confidence is the geometric mean of the factors that are on."""

    matching: Matching = "max"
    kernel_tau: float = 1.0
    dispersion: bool = True
    history: bool = True
    generation: bool = True

    def __post_init__(self) -> None:
        if self.matching not in ("max", "kernel"):
            raise ValueError(f"matching: {self.matching!r}, expected 'max' or 'kernel'")
        if not self.kernel_tau > 0:
            raise ValueError(f"kernel_tau: {self.kernel_tau}, expected a positive number")


@dataclass(frozen=True)
class PreparedAnchors:
    """A user's K anchors, ready to match: made once an anchors record, used for every request it is in force for."""

    vectors: Floats  # (K, d), unit rows
    logprobs: Floats  # (K,)
    weight: Floats  # (K,), confidence of a label whose best anchor is k, in [0, 1]
    config: Config

    @classmethod
    def build(
        cls, vectors: Floats, logprobs: Floats, history_factor: Floats, levels: int, config: Config
    ) -> PreparedAnchors:
        """``vectors`` (K, d) unit rows; ``logprobs``, ``history_factor`` (K,); ``levels``: tokens of a SID.

        Raises ValueError, naming the field, for no anchors, shapes that do not fit, and values out of range.
        """
        anchors = np.ascontiguousarray(vectors, dtype=np.float32)
        if anchors.ndim != 2 or len(anchors) == 0:
            raise ValueError(f"vectors: shape {anchors.shape}, expected (K, d) with K >= 1")
        norms = np.linalg.norm(anchors, axis=1)
        off = ~(np.abs(norms - 1.0) <= 1e-3)  # not <= also catches NaN
        if off.any():
            k = int(np.argmax(off))
            raise ValueError(f"vectors: row {k} has length {norms[k]}, expected 1")
        logs = np.asarray(logprobs, dtype=np.float32)
        past = np.asarray(history_factor, dtype=np.float32)
        for name, column in (("logprobs", logs), ("history_factor", past)):
            if column.shape != (len(anchors),):
                raise ValueError(f"{name}: shape {column.shape}, expected ({len(anchors)},)")
        outside = ~((past >= 0) & (past <= 1))
        if outside.any():
            raise ValueError(f"history_factor: {past[outside][0]}, expected within [0, 1]")
        factors: list[float | Floats] = []
        if config.dispersion:
            factors.append(dispersion_factor(anchors, logs))
        if config.history:
            factors.append(past)
        if config.generation:
            factors.append(generation_factor(logs, levels))
        return cls(anchors, logs, confidence(factors, len(anchors)), config)


@dataclass(frozen=True)
class Labelled:
    """Columns, one entry an item: raw ``score``, calibrated ``label``, ``confidence``, index of the ``best`` anchor."""

    score: Floats
    label: Floats
    confidence: Floats
    best: Ints


def score(prepared: PreparedAnchors, items: Floats) -> tuple[Floats, Ints]:
    """Raw anchor score (n,) and best anchor (n,) of ``items`` (n, d), unit rows.

    An item's score is the same, bit for bit, whatever else is in ``items`` (see :mod:`gpl.labels.matching`).
    """
    if prepared.config.matching == "max":
        return max_cosine(prepared.vectors, items)
    return kernel(prepared.vectors, prepared.logprobs, items, prepared.config.kernel_tau)


def label(prepared: PreparedAnchors, calibration: Calibration, items: Floats) -> Labelled:
    """Pseudo-labels of ``items`` (n, d), unit rows. Confidence is not yet normalised: that is a batch's business."""
    scores, best = score(prepared, items)
    return Labelled(scores, calibration.apply(scores), prepared.weight[best], best)
