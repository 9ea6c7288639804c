"""The users' anchors at the scorer, and the anchor score that is the pre-ranker's cross input."""

from __future__ import annotations

from typing import Any

import numpy as np

from gpl.labels.labeller import PreparedAnchors
from gpl.labels.matching import Floats, Ints, softmax
from streams.contracts import UserAnchors, decode
from streams.frame import Frame
from streams.scoring.gather import gathered_product
from streams.settings import LabelSettings
from streams.views import labeller_config, prepared_anchors


class AnchorCache:
    """Handler for ``user-anchors``: the newest anchors of each user, ready to match as the labels role matches them."""

    def __init__(self, settings: LabelSettings, frame: Frame) -> None:
        self._config = labeller_config(settings)
        self._frame = frame
        self._by_user: dict[str, tuple[int, PreparedAnchors]] = {}

    def __len__(self) -> int:
        return len(self._by_user)

    def __call__(self, record: Any) -> None:
        if record.value is None:
            self._by_user.pop(record.key.decode(), None)
            return
        anchors = decode(UserAnchors, record.value)
        if (anchors.encoder, anchors.quantiser) != (self._frame.encoder, self._frame.quantiser):
            return
        held = self._by_user.get(anchors.user_id)
        if held is not None and held[0] > anchors.ts:
            return
        if not anchors.logprob:
            self._by_user.pop(anchors.user_id, None)
            return
        prepared = prepared_anchors(anchors, self._frame.dim, self._frame.levels, self._config)
        self._by_user[anchors.user_id] = (anchors.ts, prepared)

    def of(self, user_id: str) -> PreparedAnchors | None:
        held = self._by_user.get(user_id)
        return None if held is None else held[1]


def anchor_scores(prepared: PreparedAnchors, vectors: Floats, rows: Ints) -> Floats:
    """Raw anchor scores (n,) of the items in ``rows`` (n,) of ``vectors`` (N, d), unit rows.

    Those of ``labeller.score`` to about 1e-6. Labels are made in blocks of one shape, so that a score is the same bit
    for bit in any company. A server does not need that, and plain products cost half.
    """
    cos = gathered_product(vectors, rows, np.ascontiguousarray(prepared.vectors.T))
    np.clip(cos, -1.0, 1.0, out=cos)
    if prepared.config.matching == "max":
        # Column by column: numpy reduces a short last axis slowly.
        best: Floats = cos[:, 0].copy()
        for k in range(1, cos.shape[1]):
            np.maximum(best, cos[:, k], out=best)
        return best
    cos -= np.float32(1.0)
    cos /= np.float32(prepared.config.kernel_tau)
    scores: Floats = np.exp(cos, out=cos) @ softmax(prepared.logprobs).astype(np.float32)
    return np.minimum(scores, np.float32(1.0))
