"""From the raw anchor score to a click probability, so that actual and pseudo-labels share one scale.

Fitted on exposed feedback. Every calibration is monotone non-decreasing: it never turns the order of scores around.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from gpl.arrays import sigmoid
from gpl.labels.matching import Floats

Kind = Literal["platt", "isotonic", "none"]

_MAX_ITERATIONS = 100
_GRADIENT_TOLERANCE = 1e-10
_RIDGE = 1e-12  # keeps the Hessian invertible when scores hardly vary
_MIN_STEP = 1e-10


class Calibration(Protocol):
    """A monotone map from raw scores to labels in [0, 1]."""

    def apply(self, scores: Floats) -> Floats:
        """Labels of ``scores``, same shape, float32."""
        ...

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form; :func:`calibration_from_dict` reads it."""
        ...


@dataclass(frozen=True)
class NoCalibration:
    """The score mapped linearly from [-1, 1] to [0, 1]: ``(1 + s) / 2``. In force until there is feedback to fit on."""

    def apply(self, scores: Floats) -> Floats:
        labels: Floats = ((1.0 + np.asarray(scores, dtype=np.float32)) / 2.0).clip(0.0, 1.0)
        return labels

    def to_dict(self) -> dict[str, Any]:
        return {"kind": "none"}


@dataclass(frozen=True)
class Platt:
    """``sigmoid(slope * s + intercept)`` with ``slope >= 0`` (Platt 1999). ``fitted_on``: number of exposures."""

    slope: float
    intercept: float
    fitted_on: int = 0

    def __post_init__(self) -> None:
        if not (np.isfinite(self.slope) and self.slope >= 0):
            raise ValueError(f"slope: {self.slope}, expected a finite number, at least 0")
        if not np.isfinite(self.intercept):
            raise ValueError(f"intercept: {self.intercept}, expected a finite number")

    @classmethod
    def fit(cls, scores: npt.ArrayLike, clicks: npt.ArrayLike) -> Platt:
        """Maximum likelihood on exposed items: raw ``scores`` (n,) and ``clicks`` (n,) of 0 or 1.

        Targets are smoothed as in Platt 1999, so the fit is finite even when the classes are separable or one is
        missing; Newton's method with step halving follows Lin, Lin and Weng 2007. When higher scores were clicked
        less, the likelihood under ``slope >= 0`` is largest at slope 0 (it is concave), and the result is the base
        rate for every score: exposed feedback gives no evidence for the anchors.

        Raises ValueError for empty, non-finite or unequally long input and for clicks that are not 0 or 1.
        """
        s, y = _checked(scores, clicks)
        target = _smoothed(y)
        centre, spread = float(s.mean()), float(s.std())
        rate = float(target.mean())
        base = cls(0.0, float(np.log(rate / (1 - rate))), len(y))
        # In standard units the Hessian is well conditioned whatever the scale of the scores.
        if spread <= 1e-9 * max(1.0, abs(centre)):
            return base
        slope, intercept = _newton((s - centre) / spread, target, base.intercept)
        if slope <= 0:
            return base
        return cls(slope / spread, intercept - slope * centre / spread, len(y))

    def apply(self, scores: Floats) -> Floats:
        logits = self.slope * np.asarray(scores, dtype=np.float64) + self.intercept
        return sigmoid(logits).astype(np.float32)

    def to_dict(self) -> dict[str, Any]:
        return {
            "kind": "platt",
            "slope": self.slope,
            "intercept": self.intercept,
            "fitted_on": self.fitted_on,
        }


@dataclass(frozen=True)
class Isotonic:
    """The monotone map through ``labels`` at ``scores``: linear between these knots, constant outside.

    Both (m,), m >= 1; ``scores`` strictly ascending, ``labels`` non-decreasing within [0, 1].
    """

    scores: tuple[float, ...]
    labels: tuple[float, ...]
    fitted_on: int = 0

    def __post_init__(self) -> None:
        if not self.scores or len(self.labels) != len(self.scores):
            raise ValueError(f"labels: {len(self.labels)} for {len(self.scores)} scores, expected as many, at least 1")
        if not np.isfinite(self.scores).all() or not (np.diff(self.scores) > 0).all():
            raise ValueError("scores: expected finite and strictly ascending")
        if not (self.labels[0] >= 0 and self.labels[-1] <= 1 and (np.diff(self.labels) >= 0).all()):
            raise ValueError("labels: expected non-decreasing within [0, 1]")

    @classmethod
    def fit(cls, scores: npt.ArrayLike, clicks: npt.ArrayLike) -> Isotonic:
        """Least squares among all non-decreasing maps (pool adjacent violators; Zadrozny and Elkan 2002).

        Targets are smoothed as for :class:`Platt`, so no label is 0 or 1. Assumes no form, so it needs more feedback:
        below about a thousand clicks Platt is the safer choice. Raises ValueError as :meth:`Platt.fit`.
        """
        s, y = _checked(scores, clicks)
        from sklearn.isotonic import IsotonicRegression  # seconds to import; only a fit needs it

        fitted = IsotonicRegression(out_of_bounds="clip").fit(s, _smoothed(y))
        # Only the ends of each constant piece are kept.
        return cls(tuple(fitted.X_thresholds_.tolist()), tuple(fitted.y_thresholds_.tolist()), len(y))

    def apply(self, scores: Floats) -> Floats:
        return np.interp(np.asarray(scores, dtype=np.float64), self.scores, self.labels).astype(np.float32)

    def to_dict(self) -> dict[str, Any]:
        return {
            "kind": "isotonic",
            "scores": list(self.scores),
            "labels": list(self.labels),
            "fitted_on": self.fitted_on,
        }


Fitted = Platt | Isotonic | NoCalibration


def fit_calibration(kind: Kind, scores: npt.ArrayLike, clicks: npt.ArrayLike) -> Fitted:
    """The calibration of this kind, fitted on exposed items. Raises ValueError as :meth:`Platt.fit`."""
    if kind == "platt":
        return Platt.fit(scores, clicks)
    return Isotonic.fit(scores, clicks) if kind == "isotonic" else NoCalibration()


def calibration_from_dict(data: Mapping[str, Any]) -> Fitted:
    """The calibration that ``to_dict`` wrote. Raises ValueError for an unknown kind or values that do not fit it."""
    kind = data.get("kind")
    fitted_on = int(data.get("fitted_on", 0))
    if kind == "none":
        return NoCalibration()
    if kind == "platt":
        return Platt(float(data["slope"]), float(data["intercept"]), fitted_on)
    if kind == "isotonic":
        return Isotonic(tuple(map(float, data["scores"])), tuple(map(float, data["labels"])), fitted_on)
    raise ValueError(f"kind: {kind!r}, expected 'platt', 'isotonic' or 'none'")


def _smoothed(clicks: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Platt's targets: (P + 1) / (P + 2) for a click, 1 / (N + 2) for none, of P clicks and N others."""
    positives = int(clicks.sum())
    return np.where(clicks == 1, (positives + 1) / (positives + 2), 1 / (len(clicks) - positives + 2))


def _checked(scores: npt.ArrayLike, clicks: npt.ArrayLike) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    s = np.asarray(scores, dtype=np.float64)
    y = np.asarray(clicks, dtype=np.float64)
    if s.ndim != 1 or s.size == 0:
        raise ValueError(f"scores: shape {s.shape}, expected (n,) with n >= 1")
    if not np.isfinite(s).all():
        raise ValueError(f"scores: {s[~np.isfinite(s)][0]} at {int(np.argmin(np.isfinite(s)))}, expected finite")
    if y.shape != s.shape:
        raise ValueError(f"clicks: shape {y.shape}, expected {s.shape}, parallel to scores")
    wrong = (y != 0) & (y != 1)
    if wrong.any():
        raise ValueError(f"clicks: {y[wrong][0]} at {int(np.argmax(wrong))}, expected 0 or 1")
    return s, y


def _newton(x: npt.NDArray[np.float64], target: npt.NDArray[np.float64], intercept: float) -> tuple[float, float]:
    """Slope and intercept that minimise the cross-entropy of ``sigmoid(slope * x + intercept)`` with ``target``."""
    slope = 0.0
    value = _cross_entropy(slope * x + intercept, target)
    for _ in range(_MAX_ITERATIONS):
        p = sigmoid(slope * x + intercept)
        error = p - target
        g_slope, g_intercept = float((error * x).mean()), float(error.mean())
        if max(abs(g_slope), abs(g_intercept)) < _GRADIENT_TOLERANCE:
            break
        w = p * (1 - p)
        h_ss = float((w * x * x).mean()) + _RIDGE
        h_si = float((w * x).mean())
        h_ii = float(w.mean()) + _RIDGE
        det = h_ss * h_ii - h_si * h_si
        d_slope = -(h_ii * g_slope - h_si * g_intercept) / det
        d_intercept = -(h_ss * g_intercept - h_si * g_slope) / det
        decrease = g_slope * d_slope + g_intercept * d_intercept
        step = 1.0
        while step >= _MIN_STEP:
            trial_slope, trial_intercept = slope + step * d_slope, intercept + step * d_intercept
            trial = _cross_entropy(trial_slope * x + trial_intercept, target)
            if trial <= value + 1e-4 * step * decrease:
                break
            step /= 2
        else:
            break  # no step decreases the loss any more: converged as far as the floats allow
        slope, intercept, value = trial_slope, trial_intercept, trial
    return slope, intercept


def _cross_entropy(logits: npt.NDArray[np.float64], target: npt.NDArray[np.float64]) -> float:
    return float((np.logaddexp(0.0, logits) - target * logits).mean())
