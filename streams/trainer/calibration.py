"""The calibration refitted from labels: raw anchor scores of exposed items against their clicks, over a sliding window.

Labels carry the raw score beside the calibrated label, so this needs nothing but ``gpl.labels``.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from gpl.labels.calibration import NoCalibration, Platt
from gpl.labels.matching import Floats

CAPACITY = 20_000
"""Exposed items with a score that the fit looks back on."""
MIN_EXPOSURES = 1_000
"""Below it nothing is fitted."""


class CalibrationWindow:
    """The newest ``CAPACITY`` exposed items with a raw score, and whether each was clicked."""

    def __init__(self) -> None:
        self._score = np.zeros(0, np.float32)
        self._clicked = np.zeros(0, np.float32)

    def add(self, score: Floats, clicked: Floats) -> None:
        """Take in exposed items (n,); those without a score (NaN) are left out."""
        known = ~np.isnan(score)
        self._score = np.concatenate([self._score, score[known]])[-CAPACITY:]
        self._clicked = np.concatenate([self._clicked, clicked[known]])[-CAPACITY:]

    def fit(self) -> Platt | NoCalibration:
        """Platt's scaling over the window; no calibration while there is too little to fit on."""
        if len(self._score) < MIN_EXPOSURES:
            return NoCalibration()
        return Platt.fit(self._score, self._clicked)

    def state(self) -> dict[str, Tensor]:
        """For the checkpoint."""
        return {"score": torch.from_numpy(self._score.copy()), "clicked": torch.from_numpy(self._clicked.copy())}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over a saved window."""
        self._score, self._clicked = tensors["score"].numpy().copy(), tensors["clicked"].numpy().copy()
