"""Mean and spread of numbers that come in batches."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

_MIN_SPREAD = 1e-6  # of anchor scores, so that nearly equal ones are not blown up


class Moments(NamedTuple):
    """``squares``: sum of squared deviations from the mean (Welford)."""

    n: float = 0.0
    mean: float = 0.0
    squares: float = 0.0

    def including(self, values: npt.NDArray[np.floating[Any]]) -> Moments:
        """With a batch more; NaN is skipped."""
        known = values[~np.isnan(values)].astype(np.float64)
        if len(known) == 0:
            return self
        added, own = len(known), float(known.mean())
        total, delta = self.n + added, own - self.mean
        squares = self.squares + (float(((known - own) ** 2).sum()) + delta**2 * self.n * added / total)
        return Moments(total, self.mean + delta * added / total, squares)

    @property
    def spread(self) -> float:
        """Standard deviation, not below a millionth; 1 where nothing differs."""
        return max((self.squares / self.n) ** 0.5, _MIN_SPREAD) if self.squares > 0 else 1.0
