"""Metrics of click models and rankings. NaN stands for "undefined", as AUC is on one class."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def auc(clicks: npt.ArrayLike, scores: npt.ArrayLike) -> float:
    """Area under the ROC curve, ties counted one half; NaN when a class is missing.

    ``clicks`` (n,) are 0 or 1, ``scores`` (n,) anything that orders. Raises ValueError for other input.
    """
    y, s = _columns(clicks=clicks, scores=scores)
    positives = float(y.sum())
    negatives = len(y) - positives
    if positives == 0 or negatives == 0:
        return float("nan")
    # Mann-Whitney: the average rank of a tied group is its last rank less half its surplus.
    _, group, size = np.unique(s, return_inverse=True, return_counts=True)
    rank = (np.cumsum(size) - (size - 1) / 2)[group]
    return float((rank[y == 1].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def gauc(clicks: npt.ArrayLike, scores: npt.ArrayLike, users: npt.ArrayLike) -> float:
    """Mean of the users' AUCs weighted by their impressions (Zhou et al. 2018). ``users`` (n,), any comparable type.

    Users with only one class have no AUC and are left out; NaN when none is left.
    """
    y, s = _columns(clicks=clicks, scores=scores)
    user = np.asarray(users)
    if user.shape != y.shape:
        raise ValueError(f"users: shape {user.shape}, expected {y.shape}, parallel to clicks")
    if len(y) == 0:
        return float("nan")
    _, group = np.unique(user, return_inverse=True)
    order = np.lexsort((s, group))
    g, x, click = group[order], s[order], y[order]
    new_user = np.r_[True, g[1:] != g[:-1]]
    tie = np.cumsum(new_user | np.r_[True, x[1:] != x[:-1]]) - 1
    # Average rank of each tie among its user's scores, from where the user and the tie begin.
    tie_start, tie_size = np.flatnonzero(np.r_[True, tie[1:] != tie[:-1]]), np.bincount(tie)
    rank = tie_start[tie] - np.flatnonzero(new_user)[g] + (tie_size[tie] + 1) / 2
    n, positives = np.bincount(g).astype(np.float64), np.bincount(g, click)
    both = (positives > 0) & (positives < n)
    if not both.any():
        return float("nan")
    n, positives, ranks = n[both], positives[both], np.bincount(g, rank * click)[both]
    each = (ranks - positives * (positives + 1) / 2) / (positives * (n - positives))
    return float((each * n).sum() / n.sum())


def log_loss(clicks: npt.ArrayLike, probabilities: npt.ArrayLike) -> float:
    """Mean negative log-likelihood in nats; probabilities are kept 1e-7 away from 0 and 1. NaN without data."""
    y, p = _columns(clicks=clicks, probabilities=_probabilities(probabilities))
    if len(y) == 0:
        return float("nan")
    p = np.clip(p, 1e-7, 1 - 1e-7)
    return float(-(y * np.log(p) + (1 - y) * np.log1p(-p)).mean())


def calibration_error(clicks: npt.ArrayLike, probabilities: npt.ArrayLike, bins: int = 10) -> float:
    """Expected calibration error: mean of |click rate - mean prediction| over bins of equal mass. NaN without data.

    Bin edges are quantiles of the predictions, so equal predictions share a bin and order does not matter.
    """
    y, p = _columns(clicks=clicks, probabilities=_probabilities(probabilities))
    if bins < 1:
        raise ValueError(f"bins: {bins}, expected at least 1")
    if len(y) == 0:
        return float("nan")
    inner = np.quantile(p, np.arange(1, bins) / bins, method="inverted_cdf")
    bin_of = np.searchsorted(inner, p, side="left")
    gap = np.bincount(bin_of, y - p, minlength=bins)
    return float(np.abs(gap).sum() / len(y))


def _columns(clicks: npt.ArrayLike, **other: npt.ArrayLike) -> tuple[Array, Array]:
    ((name, values),) = other.items()
    y, x = np.asarray(clicks, dtype=np.float64), np.asarray(values, dtype=np.float64)
    if y.ndim != 1 or x.shape != y.shape:
        raise ValueError(f"{name}: shape {x.shape}, clicks: shape {y.shape}, expected (n,) twice")
    if not ((y == 0) | (y == 1)).all():
        raise ValueError(f"clicks: {y[(y != 0) & (y != 1)][0]}, expected 0 or 1")
    if np.isnan(x).any():
        raise ValueError(f"{name}: nan at {int(np.argmax(np.isnan(x)))}")
    return y, x


def _probabilities(values: npt.ArrayLike) -> Array:
    p = np.asarray(values, dtype=np.float64)
    outside = (p < 0) | (p > 1)
    if outside.any():
        raise ValueError(f"probabilities: {p[outside][0]}, expected within [0, 1]")
    return p
