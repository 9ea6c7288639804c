"""Bootstrap confidence intervals that respect that one user's outcomes go together."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

_CHUNK = 4_000_000  # resampled group indices held at a time


class Interval(NamedTuple):
    """A point estimate and the ends of its confidence interval."""

    estimate: float
    low: float
    high: float


def bootstrap_mean_ci(
    values: npt.ArrayLike,
    groups: npt.ArrayLike,
    seed: int,
    level: float = 0.95,
    resamples: int = 2000,
) -> Interval:
    """Mean of ``values`` (n,) with a percentile interval from resampling whole ``groups`` (n,), such as users.

    NaN values (an undefined metric) are left out. All NaN without data; a single group has no spread to resample and
    gives NaN ends. Raises ValueError for unequally long input, ``level`` outside (0, 1) or ``resamples`` below 1.
    """
    x, g = np.asarray(values, dtype=np.float64), np.asarray(groups)
    if x.ndim != 1 or g.shape != x.shape:
        raise ValueError(f"groups: shape {g.shape}, values: shape {x.shape}, expected (n,) twice")
    if not 0 < level < 1:
        raise ValueError(f"level: {level}, expected within (0, 1)")
    if resamples < 1:
        raise ValueError(f"resamples: {resamples}, expected at least 1")
    defined = ~np.isnan(x)
    x, g = x[defined], g[defined]
    if len(x) == 0:
        return Interval(float("nan"), float("nan"), float("nan"))
    _, group = np.unique(g, return_inverse=True)
    sums, sizes = np.bincount(group, x), np.bincount(group).astype(np.float64)
    estimate = float(sums.sum() / sizes.sum())
    if len(sums) == 1:
        return Interval(estimate, float("nan"), float("nan"))
    rng = np.random.default_rng(seed)
    step = max(1, _CHUNK // len(sums))
    means = []
    for start in range(0, resamples, step):
        drawn = rng.integers(0, len(sums), (min(step, resamples - start), len(sums)))
        means.append(sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1))
    tail = (1 - level) / 2
    low, high = np.quantile(np.concatenate(means), [tail, 1 - tail])
    return Interval(estimate, float(low), float(high))


def paired_difference_ci(
    first: npt.ArrayLike,
    second: npt.ArrayLike,
    groups: npt.ArrayLike,
    seed: int,
    level: float = 0.95,
    resamples: int = 2000,
) -> Interval:
    """Mean of ``first - second`` (n,), the same cases under two methods, resampling the same groups for both.

    Cases where either is NaN are left out.
    """
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if a.shape != b.shape:
        raise ValueError(f"second: shape {b.shape}, expected {a.shape}, parallel to first")
    return bootstrap_mean_ci(a - b, groups, seed, level, resamples)
