"""The item vectors that a trainer trains with: as they stood at each step, the same on all ranks of a group.

Rank 0 reads their topic and passes on what has come: a compacted topic read twice need not give the same twice.
"""

from __future__ import annotations

import time
from contextlib import suppress
from typing import Any

import msgspec

from gpl.catalogue import Catalogue
from streams.dead_letters import Original
from streams.frame import Frame
from streams.log_view import LogView
from streams.settings import KafkaSettings
from streams.trainer.group import Group
from streams.views import CatalogueView

FOLLOW_SECONDS = 0.2
"""Between looks for item vectors that have come."""
_TOPIC = "item-vectors"
_AT_ONCE = 2000
"""In one message while the topic is read at the start."""


class _News(msgspec.Struct, array_like=True):
    """What a rank tells the others: whether it is to stop; rank 0 also which item vectors have come."""

    stop: bool
    vectors: list[Original]


_NEWS = msgspec.msgpack.Decoder(_News)


class ItemVectors:
    """Keeps a catalogue current. Raises TopicMissingError, KafkaTimeoutError when the topic cannot be read at first.

    ``positions``: next offsets that rank 0 has not yet read; ``moved``: those that differ from before the last call of
    ``settle``. On other ranks both are empty.
    """

    def __init__(self, kafka: KafkaSettings, frame: Frame, catalogue: Catalogue, group: Group) -> None:
        self._group = group
        self._put = CatalogueView(catalogue, frame.dim, frame.encoder, frame.quantiser)
        self._view = LogView(kafka, {_TOPIC: self._read}) if group.rank == 0 else None
        self._untold: list[Original] = []
        self._next_look = 0.0
        self.positions: dict[int, int] = {}
        self.moved: list[tuple[int, int]] = []
        try:
            if self._view is not None:
                self._view.warm_up()
                self.positions = self._view.positions(_TOPIC)
            while self._tell(False, _AT_ONCE).vectors:
                pass
        except BaseException:
            self.close()
            raise

    def follow(self, stop: bool = False) -> bool:
        """Take in what has come, the same on all ranks. Whether this rank or another is asked to ``stop``."""
        if self._view is not None and time.monotonic() >= self._next_look:
            self._next_look = time.monotonic() + FOLLOW_SECONDS
            if records := self._view.fetch(0):
                self._view.apply(records)
                positions = self._view.positions(_TOPIC)
                moved = {p: at for p, at in positions.items() if at != self.positions[p]}
                self.moved = sorted((dict(self.moved) | moved).items())
                self.positions = positions
        return self._tell(stop, None).stop

    def settle(self) -> None:
        """What has moved is written down."""
        self.moved = []

    def close(self) -> None:
        if self._view is not None:
            self._view.close()

    def _read(self, record: Any) -> None:
        if self._group.ranks > 1:
            self._untold.append(Original.of(record))
        self._put(record)

    def _tell(self, stop: bool, at_most: int | None) -> _News:
        """What is new on all ranks; those behind rank 0 take its item vectors in."""
        mine = _News(stop, self._untold[:at_most])
        if self._group.ranks == 1:
            return mine
        del self._untold[:at_most]
        every = [_NEWS.decode(one) for one in self._group.gather(msgspec.msgpack.encode(mine))]
        if self._group.rank > 0:
            for record in every[0].vectors:
                with suppress(ValueError):  # rank 0 says in its log what it passed over
                    self._put(record)
        return _News(any(one.stop for one in every), every[0].vectors)
