"""From a generator's answer to its record. Pure: what runs over history is this too."""

from __future__ import annotations

import numpy as np

from gpl.anchors.base import Anchors
from streams.contracts import AnchorRequest, UserAnchors
from streams.views import vector_bytes


def anchors_record(
    request: AnchorRequest, used: list[str], anchors: Anchors | None, versions: tuple[str, str, str]
) -> UserAnchors:
    """The answer to a request. ``used``: its known positives; ``anchors``: None where none is known; ``versions``: of
    generator, quantiser and encoder."""
    generator, quantiser, encoder = versions
    return UserAnchors(
        user_id=request.user_id,
        ts=request.ts,
        version=request.sequence,
        sid=[] if anchors is None else anchors.sids.tolist(),
        logprob=[] if anchors is None else np.round(anchors.logprobs.astype(np.float64), 6).tolist(),
        vectors=b"" if anchors is None else vector_bytes(anchors.vectors),
        history_factor=[] if anchors is None else np.round(anchors.history_factor.astype(np.float64), 6).tolist(),
        history=used,
        generator=generator,
        quantiser=quantiser,
        encoder=encoder,
    )
