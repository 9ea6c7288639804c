"""Anchor scores of pairs of user and item that were asked for before: users page, and refresh what they see."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import numpy as np

from gpl.catalogue import Catalogue
from gpl.labels.labeller import PreparedAnchors
from gpl.labels.matching import Floats, Ints
from streams.scoring.anchors import anchor_scores


@dataclass(frozen=True, slots=True)
class _Held:
    """What one user was scored on: ``scores`` (n,) of the catalogue's ``rows`` (n,) as they were at ``generation``."""

    anchors: PreparedAnchors
    generation: int
    rows: Ints
    scores: Floats

    @property
    def nbytes(self) -> int:
        return self.rows.nbytes + self.scores.nbytes


class AnchorScores:
    """Anchor scores, made or remembered; a remembered one is what would be made now (to float32's rounding).

    A score is forgotten when its item changes, when the user's anchors do, and when there is no more room: users who
    have not asked for longest go first. Models do not matter to it. Not thread-safe.
    """

    def __init__(self, max_bytes: int) -> None:
        """``max_bytes``: of scores remembered, 12 a pair; 0 remembers nothing."""
        self._max_bytes = max_bytes
        self._bytes = 0
        self._held: OrderedDict[str, _Held] = OrderedDict()
        self._by_row: Floats = np.zeros(0, np.float32)  # scratch, NaN wherever a call is not at work

    def of(self, user_id: str, anchors: PreparedAnchors, catalogue: Catalogue, rows: Ints) -> Floats:
        """Raw anchor scores (n,) of the items in ``rows`` (n,), each of which holds an item."""
        if not self._max_bytes:
            return anchor_scores(anchors, catalogue.vectors, rows)
        held = self._held.pop(user_id, None)
        if held is not None:
            self._bytes -= held.nbytes
        if held is None or held.anchors is not anchors:
            scores = anchor_scores(anchors, catalogue.vectors, rows)
            held = _Held(anchors, catalogue.generation, rows, scores)
        else:
            scores, held = self._completed(held, catalogue, rows)
        self._held[user_id] = held
        self._bytes += held.nbytes
        while self._bytes > self._max_bytes:
            self._bytes -= self._held.popitem(last=False)[1].nbytes
        return scores

    def _completed(self, held: _Held, catalogue: Catalogue, rows: Ints) -> tuple[Floats, _Held]:
        old_rows, old = held.rows, held.scores
        if held.generation != catalogue.generation:
            same = catalogue.changed[old_rows] <= held.generation
            old_rows, old = old_rows[same], old[same]
        if len(self._by_row) < len(catalogue.vectors):
            self._by_row = np.full(2 * len(catalogue.vectors), np.nan, np.float32)
        self._by_row[old_rows] = old
        scores = self._by_row[rows]
        self._by_row[old_rows] = np.nan
        missing = np.flatnonzero(np.isnan(scores))
        if len(missing):
            new_rows = rows[missing]
            new = anchor_scores(held.anchors, catalogue.vectors, new_rows)
            scores[missing] = new
            old_rows, old = np.concatenate([old_rows, new_rows]), np.concatenate([old, new])
        return scores, _Held(held.anchors, catalogue.generation, old_rows, old)
