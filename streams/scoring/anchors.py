"""The users' anchors at the scorer, and the anchor score that is the pre-ranker's cross input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from gpl.labels.labeller import PreparedAnchors
from gpl.labels.matching import Floats, Ints, softmax
from streams.contracts import UserAnchors, decode
from streams.frame import Frame
from streams.settings import LabelSettings
from streams.views import history_of, labeller_config, prepared_anchors

_BLOCK_BYTES = 256 << 10
"""Of rows gathered at a time: they stay in a core's second-level cache."""


@dataclass(frozen=True, slots=True)
class Held:
    """A user's anchors, in force from ``ts`` on, and the items that they were made of."""

    ts: int
    prepared: PreparedAnchors
    history: list[str]


class AnchorCache:
    """Handler for ``user-anchors``: the newest anchors of each user, ready to match as the labels role matches them."""

    def __init__(self, settings: LabelSettings, frame: Frame) -> None:
        self._config = labeller_config(settings)
        self._frame = frame
        self._by_user: dict[str, Held] = {}

    def __len__(self) -> int:
        return len(self._by_user)

    def __call__(self, record: Any) -> None:
        if record.value is None:
            self._by_user.pop(record.key.decode(), None)
            return
        anchors = decode(UserAnchors, record.value)
        if (anchors.encoder, anchors.quantiser) != self._frame.space:
            return
        held = self._by_user.get(anchors.user_id)
        if held is not None and held.ts > anchors.ts:
            return
        if not anchors.logprob:
            self._by_user.pop(anchors.user_id, None)
            return
        prepared = prepared_anchors(anchors, self._frame.dim, self._frame.levels, self._config)
        self._by_user[anchors.user_id] = Held(anchors.ts, prepared, history_of(anchors))

    def of(self, user_id: str) -> Held | None:
        return self._by_user.get(user_id)


def anchor_scores(prepared: PreparedAnchors, vectors: Floats, rows: Ints) -> Floats:
    """Raw anchor scores (n,) of the items in ``rows`` (n,) of ``vectors`` (N, d), unit rows.

    Those of ``labeller.score`` to about 1e-6. Labels are made in blocks of one shape, so that a score is the same bit
    for bit in any company. A server does not need that, and its products cost a quarter more.
    """
    cos = _cosines(np.ascontiguousarray(prepared.vectors.T), vectors, rows)
    if prepared.config.matching == "max":
        # Column by column: numpy reduces a short last axis slowly.
        best: Floats = cos[:, 0].copy()
        for k in range(1, cos.shape[1]):
            np.maximum(best, cos[:, k], out=best)
        return np.clip(best, -1.0, 1.0, out=best)
    np.clip(cos, -1.0, 1.0, out=cos)
    cos -= np.float32(1.0)
    cos /= np.float32(prepared.config.kernel_tau)
    scores: Floats = np.exp(cos, out=cos) @ softmax(prepared.logprobs).astype(np.float32)
    return np.minimum(scores, np.float32(1.0))


def _cosines(anchors: Floats, vectors: Floats, rows: Ints) -> Floats:
    """``vectors[rows] @ anchors``, (n, K), of (N, d) and (d, K).

    Block by block over one small buffer: a copy of all rows is megabytes that the allocator maps and unmaps at each
    call, which cost more than the product itself.
    """
    n, dim = len(rows), vectors.shape[1]
    size = max(_BLOCK_BYTES // (4 * dim), 1)
    buffer = np.empty((min(size, n), dim), np.float32)
    cos: Floats = np.empty((n, anchors.shape[1]), np.float32)
    for start in range(0, n, size):
        some = rows[start : start + size]
        # mode "clip" fills the buffer directly; the default goes by another copy.
        block = vectors.take(some, axis=0, out=buffer[: len(some)], mode="clip")
        np.matmul(block, anchors, out=cos[start : start + size])
    return cos
