"""Keeps the frozen space current with the item stream: each item is encoded and coded once, then published.

Items -> vectors and SIDs -> ``item-vectors``, and before that into the index where it is a server that workers share.
An embedded index is not written here: its owner follows ``item-vectors``, like everybody.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable

import msgspec
import numpy as np
from numpy.typing import NDArray

from gpl.artefacts import Artefacts
from gpl.catalogue import ItemContent
from gpl.index.base import VectorIndex
from gpl.space import Encoder, raw_vectors
from streams import metrics
from streams.batch_role import BatchRole, Entry
from streams.contracts import Item, ItemVector, decode, encode
from streams.dead_letters import Refused
from streams.faust_app import REFUSALS
from streams.labels.outage import when_available
from streams.settings import Settings
from streams.views import vector_bytes


def content_hash(item: Item) -> str:
    """Hash of what is encoded: an item whose text and embedding did not change keeps its vector."""
    return hashlib.blake2b(msgspec.json.encode([item.text, item.embedding]), digest_size=12).hexdigest()


class CatalogueRole(BatchRole):
    """One worker over ``items``. ``known``: item_id -> content hash of what is published; a live view, which
    ``look_again`` makes not ready until it has what is published by then."""

    size = 256

    def __init__(
        self,
        settings: Settings,
        artefacts: Artefacts,
        encoder: Encoder | None,
        server_index: VectorIndex | None,
        known: dict[str, str],
        catalogue_ready: Callable[[], bool],
        look_again: Callable[[], None],
        health: metrics.Health,
        on_failure: Callable[[BaseException], None],
    ) -> None:
        artefacts.space.check_encoder(encoder)
        # A group of its own for each space: with a new one every item is read, encoded and published again.
        version = f"{artefacts.space.version}-{artefacts.quantiser.version}"
        super().__init__(f"catalogue-{version}", ("items",), settings, health, on_failure)
        self._artefacts = artefacts
        self._encoder = encoder
        self._index = server_index
        self._known = known
        # What this worker published itself and the view may not show yet; None for a removal.
        self._sent: dict[str, str | None] = {}
        self._catalogue_ready = catalogue_ready
        self._look_again = look_again

    def assigned(self, numbers: list[int]) -> None:
        self._sent = {}
        # The view may not show yet what an owner before published last: an item that goes back to what it was before
        # that would be taken for known.
        self._look_again()

    def ready(self) -> bool:
        return self._catalogue_ready()

    def _wanted(self) -> bool:
        """Whether the batch in hand is still this worker's to finish."""
        return not self._stopped and self.partitions is self._owned

    async def work(self, batch: list[Entry]) -> None:
        self._owned = self.partitions
        items: list[tuple[Entry, Item]] = []
        for entry in batch:
            key, value = entry.original.key, entry.original.value
            try:
                if value is None:
                    # What came before a removal goes out before it.
                    await self._encode_and_publish(items)
                    items = []
                    await self._remove(entry, key)
                    continue
                item = decode(Item, value)
                if key is not None and key != item.item_id.encode():
                    raise Refused("key", f"item_id: {item.item_id!r} came under the key {key!r}")
                content = content_hash(item)
                if self._sent.get(item.item_id, self._known.get(item.item_id)) == content:
                    entry.done()
                else:
                    self._sent[item.item_id] = content
                    items.append((entry, item))
            except REFUSALS as error:
                self.give_up(entry, error)
        await self._encode_and_publish(items)

    async def _remove(self, entry: Entry, key: bytes | None) -> None:
        if not key:
            raise Refused("key", "item_id: a removal needs the item's id as its key")
        self._sent[key.decode()] = None
        index, item_id = self._index, key.decode()
        if index is not None:
            await when_available(lambda: index.delete([item_id]), self._wanted)
        if not self._wanted():
            return
        await self.publisher.send("item-vectors", key, None, then=entry.done)

    async def _encode_and_publish(self, items: list[tuple[Entry, Item]]) -> None:
        if not items:
            return
        try:
            vectors = await asyncio.to_thread(self._vectors, [item for _, item in items])
        except ValueError as error:
            if len(items) == 1:
                entry, item = items[0]
                # The item stays as it was before; the same content again is refused again.
                self._sent.pop(item.item_id, None)
                self.give_up(entry, Refused("item", str(error)))
                return
            # One bad item must not take the batch with it.
            for pair in items:
                await self._encode_and_publish([pair])
            return
        sids = self._artefacts.quantiser.encode(vectors)
        index = self._index
        if index is not None:
            ids = [item.item_id for _, item in items]
            await when_available(lambda: index.upsert(ids, vectors, sids), self._wanted)
        for (entry, item), vector, sid in zip(items, vectors, sids, strict=True):
            if not self._wanted():
                return
            record = ItemVector(
                item_id=item.item_id,
                vector=vector_bytes(vector),
                sid=sid.tolist(),
                content=content_hash(item),
                encoder=self._artefacts.space.version,
                quantiser=self._artefacts.quantiser.version,
            )
            await self.publisher.send("item-vectors", item.item_id.encode(), encode(record), then=entry.done)

    def _vectors(self, items: list[Item]) -> NDArray[np.float32]:
        contents = [ItemContent(item.item_id, item.text, item.embedding) for item in items]
        raw = raw_vectors(contents, self._encoder, self._artefacts.space.raw_dim)
        return self._artefacts.space.project(raw, [item.item_id for item in items])
