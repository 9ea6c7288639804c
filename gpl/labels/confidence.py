"""Confidence of a pseudo-label and its three factors, each in [0, 1]. Named by the paper, formulas ours (method.md)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from gpl.labels.matching import Floats, softmax


def dispersion_factor(vectors: Floats, logprobs: Floats) -> float:
    """How tightly the anchors agree; one value a user.

    ``1 - D``, ``D = sum_{j<k} p_j p_k (1 - cos(a_j, a_k)) / sum_{j<k} p_j p_k``, clipped to [0, 1], with
    ``p = softmax(logprobs)``. ``vectors`` (K, d) unit rows, ``logprobs`` (K,). One anchor: 1.
    """
    p = softmax(logprobs)
    anchors = _rows("vectors", vectors, len(p))
    pairs = np.triu(np.outer(p, p), k=1)
    total = pairs.sum()
    # Zero with one anchor, or when all others are too improbable to be represented beside it.
    if total == 0.0:
        return 1.0
    dispersion = float((pairs * (1.0 - anchors @ anchors.T)).sum() / total)
    return min(1.0, max(0.0, 1.0 - dispersion))


def history_factor(vectors: Floats, history: Floats) -> Floats:
    """How near each anchor (K, d) is to what the user really chose (H, d): ``max(0, max_i cos(a_k, h_i))``, (K,).

    Unit rows. No history: zeros.
    """
    anchors = _rows("vectors", vectors, len(vectors))
    past = np.asarray(history, dtype=np.float64)
    if past.size == 0:
        return np.zeros(len(anchors), dtype=np.float32)
    if past.ndim != 2 or past.shape[1] != anchors.shape[1]:
        raise ValueError(f"history: shape {past.shape}, expected (H, {anchors.shape[1]})")
    nearest: Floats = (anchors @ past.T).max(axis=1).clip(0.0, 1.0).astype(np.float32)
    return nearest


def generation_factor(logprobs: Floats, levels: int) -> Floats:
    """Geometric mean token probability of each anchor's own beam: ``exp(l_k / levels)``, (K,).

    ``logprobs`` (K,): natural log of the whole beam's probability, at most 0, over ``levels`` tokens.
    """
    if levels < 1:
        raise ValueError(f"levels: {levels}, expected at least 1")
    values = np.asarray(logprobs, dtype=np.float64)
    if np.isnan(values).any() or (values > 1e-4).any():
        raise ValueError(f"logprobs: {logprobs!r}, expected logs of probabilities, at most 0")
    return np.exp(np.minimum(values, 0.0) / levels).astype(np.float32)


def confidence(factors: Sequence[float | Floats], count: int) -> Floats:
    """Confidence (count,) of a label by its best anchor: the geometric mean of ``factors``, each a number or (count,).

    A factor of 0 makes it 0; without factors it is 1. Their product would be far too sharp: see docs/method.md.
    """
    weight = np.ones(count, dtype=np.float64)
    for factor in factors:
        weight *= np.asarray(factor, dtype=np.float64)
    return (weight ** (1.0 / max(len(factors), 1))).astype(np.float32)


def _rows(name: str, vectors: Floats, count: int) -> npt.NDArray[np.float64]:
    rows = np.asarray(vectors, dtype=np.float64)
    if rows.ndim != 2 or len(rows) != count:
        raise ValueError(f"{name}: shape {rows.shape}, expected ({count}, d)")
    return rows
