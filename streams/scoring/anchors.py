"""The users' anchors at the scorer."""

from __future__ import annotations

from typing import Any

from gpl.labels.labeller import PreparedAnchors
from streams.contracts import UserAnchors, decode
from streams.frame import Frame
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
