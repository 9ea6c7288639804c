"""Intervals of a study's figures, paired: two methods are compared on the same users of the same worlds."""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import stats

from gpl.evaluation.intervals import Interval

Array = npt.NDArray[np.float64]

RESAMPLES = 2000
_SEED = 0


class Comparison(NamedTuple):
    """First less second, and the same relative to the second. A relative interval's upper end is infinite where the
    second may be 0, and its estimate NaN where it is."""

    difference: Interval
    relative: Interval


def crossed_mean(values: Array, level: float = 0.95) -> Interval:
    """Mean of ``values`` (S, U), one row a seed, one column a user, NaN where undefined.

    Percentile bootstrap that resamples seeds and users independently (Owen 2007), so the interval covers both. With few
    seeds it is somewhat too narrow in that direction.
    """
    sums, sizes = _resampled(values)
    return _interval(float(np.nanmean(values)) if not np.isnan(values).all() else float("nan"), sums / sizes, level)


def crossed_comparison(first: Array, second: Array, level: float = 0.95) -> Comparison:
    """Comparison of two methods' values (S, U) on the cells where both are defined, as in `crossed_mean`."""
    both = ~(np.isnan(first) | np.isnan(second))
    a, b = np.where(both, first, np.nan), np.where(both, second, np.nan)
    if not both.any():
        nothing = Interval(float("nan"), float("nan"), float("nan"))
        return Comparison(nothing, nothing)
    (sums_a, sizes), (sums_b, _) = _resampled(a), _resampled(b)
    mean_a, mean_b = float(np.nanmean(a)), float(np.nanmean(b))
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = sums_a / sums_b - 1
    relative = mean_a / mean_b - 1 if mean_b else float("nan")
    return Comparison(
        _interval(mean_a - mean_b, (sums_a - sums_b) / sizes, level),
        _interval(relative, ratios, level),
    )


def seed_mean(values: Array, level: float = 0.95) -> Interval:
    """Mean of one figure a seed (S,), with Student's t interval over seeds; NaN ends for a single one."""
    x = values[~np.isnan(values)]
    if len(x) < 2:
        return Interval(float(x.mean()) if len(x) else float("nan"), float("nan"), float("nan"))
    radius = float(stats.t.ppf((1 + level) / 2, len(x) - 1) * x.std(ddof=1) / np.sqrt(len(x)))
    return Interval(float(x.mean()), float(x.mean()) - radius, float(x.mean()) + radius)


def seed_comparison(first: Array, second: Array, level: float = 0.95) -> Comparison:
    """Paired comparison of one figure a seed (S,), on seeds where both are defined; relative to the second's mean."""
    both = ~np.isnan(first - second)
    difference = seed_mean(first - second, level)
    base = float(second[both].mean()) if both.any() else float("nan")
    return Comparison(difference, Interval(*(x / base if base else float("nan") for x in difference)))


def _resampled(values: Array) -> tuple[Array, Array]:
    """Sums and counts of the defined cells under resampled seeds and users, (RESAMPLES,) each; the same draws for all
    matrices of one shape, so two of them are paired."""
    seeds, users = values.shape
    rng = np.random.default_rng(_SEED)
    by_seed = rng.multinomial(seeds, np.full(seeds, 1 / seeds), RESAMPLES).astype(np.float64)
    by_user = rng.multinomial(users, np.full(users, 1 / users), RESAMPLES).astype(np.float64)
    defined = ~np.isnan(values)
    filled = np.where(defined, values, 0.0)
    sums: Array = ((by_user @ filled.T) * by_seed).sum(axis=1)
    sizes: Array = ((by_user @ defined.T.astype(np.float64)) * by_seed).sum(axis=1)
    return sums, np.where(sizes > 0, sizes, np.nan)  # without a defined cell there is no mean


def _interval(estimate: float, drawn: Array, level: float) -> Interval:
    """Percentile interval. A ratio to nothing is infinite and stays, so an end may be; 0 / 0 says nothing."""
    drawn = drawn[~np.isnan(drawn)]
    if np.isnan(estimate) or len(drawn) < 2:
        return Interval(estimate, float("nan"), float("nan"))
    # Between a finite and an infinite resample there is nothing to interpolate.
    method: Literal["linear", "inverted_cdf"] = "linear" if np.isfinite(drawn).all() else "inverted_cdf"
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2], method=method)
    return Interval(estimate, float(low), float(high))
