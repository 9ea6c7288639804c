"""Raw anchor scores, pseudo-labels and confidence of a world's pairs, by the product's own labeller."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gpl.evaluation.anchors import AnchorSets
from gpl.evaluation.dataset import Bools, Floats, Ints
from gpl.evaluation.pairs import Pairs
from gpl.labels import labeller
from gpl.labels.calibration import NoCalibration, Platt
from gpl.labels.labeller import Config, PreparedAnchors

_MIN_CALIBRATION = 50


@dataclass(frozen=True)
class PairLabels:
    """Parallel to a log's `Pairs`: raw ``score`` (NaN where there are no anchors or no content), calibrated ``label``,
    ``confidence`` (both 0 there)."""

    score: Floats
    label: Floats
    confidence: Floats


class Scorer:
    """Anchor scores of items (n, d) in the space that the anchors are of, with one configuration of the labeller.

    ``has_content`` (n,): which items have a vector.
    """

    def __init__(self, vectors: Floats, has_content: Bools, sets: AnchorSets, config: Config) -> None:
        self._vectors, self._has_content, self._sets, self._config = vectors, has_content, sets, config

    def matrix(self, cases: Ints) -> Floats:
        """(len(cases), n) scores of all items; NaN where a case has no anchors, or an item no content."""
        found = np.full((len(cases), len(self._vectors)), np.nan, dtype=np.float32)
        for row, case in zip(found, cases.tolist(), strict=True):
            if (prepared := self._prepared(case)) is not None:
                row[:] = np.where(self._has_content, labeller.score(prepared, self._vectors)[0], np.nan)
        return found

    def label(self, pairs: Pairs, cases: Ints) -> PairLabels:
        """``cases`` (R,) of the requests."""
        score, confidence = self._raw(pairs, cases)
        known = ~np.isnan(score)
        label = np.zeros_like(score)
        label[known] = _fitted(pairs, score).apply(score[known])
        return PairLabels(score, label, confidence)

    def calibration(self, pairs: Pairs, cases: Ints) -> Platt | NoCalibration:
        """Platt's, on all of the log's exposed feedback."""
        return _fitted(pairs, self._raw(pairs, cases)[0])

    def label_all(self, case: int, calibration: Platt | NoCalibration) -> labeller.Labelled | None:
        """Labels of all items; None where the case has no anchors."""
        prepared = self._prepared(case)
        return None if prepared is None else labeller.label(prepared, calibration, self._vectors)

    def _raw(self, pairs: Pairs, cases: Ints) -> tuple[Floats, Floats]:
        score = np.full(len(pairs.item), np.nan, dtype=np.float32)
        confidence = np.zeros(len(pairs.item), dtype=np.float32)
        for request, case in enumerate(cases.tolist()):
            if (prepared := self._prepared(case)) is not None:
                at = slice(int(pairs.offsets[request]), int(pairs.offsets[request + 1]))
                raw = labeller.label(prepared, NoCalibration(), self._vectors[pairs.item[at]])
                has = self._has_content[pairs.item[at]]
                score[at], confidence[at] = np.where(has, raw.score, np.nan), np.where(has, raw.confidence, 0.0)
        return score, confidence

    def _prepared(self, case: int) -> PreparedAnchors | None:
        anchors = self._sets.of(case)
        return None if anchors is None else PreparedAnchors.build(*anchors, self._sets.levels, self._config)


def _fitted(pairs: Pairs, score: Floats) -> Platt | NoCalibration:
    shown = pairs.exposed & ~np.isnan(score)
    clicks = int(pairs.clicked[shown].sum())
    if shown.sum() < _MIN_CALIBRATION or min(clicks, int(shown.sum()) - clicks) < _MIN_CALIBRATION // 10:
        return NoCalibration()
    return Platt.fit(score[shown], pairs.clicked[shown])
