"""The anchors role: anchor requests -> the generator, in batches -> ``user-anchors``.

Every request is answered, with no anchors where none of its positives is known: the profiles role waits for the
answer. A request is acknowledged once its answer is durable.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import numpy as np

from gpl.anchors.base import AnchorGenerator, Anchors, History, anchors_of
from gpl.catalogue import Catalogue
from gpl.codes.centroids import SidCentroids
from gpl.codes.trie import SidTrie
from streams import metrics
from streams.batch_role import BatchRole, Entry
from streams.contracts import AnchorRequest, UserAnchors, decode, encode
from streams.faust_app import REFUSALS
from streams.settings import Settings
from streams.views import vector_bytes


class AnchorsRole(BatchRole):
    """One worker of the anchors role. ``versions``: generator, quantiser and encoder in force."""

    def __init__(
        self,
        settings: Settings,
        generator: AnchorGenerator,
        catalogue: Catalogue,
        codebook_size: int,
        versions: tuple[str, str, str],
        catalogue_ready: Callable[[], bool],
        health: metrics.Health,
        on_failure: Callable[[BaseException], None],
    ) -> None:
        super().__init__("anchors", ("anchor-requests",), settings, health, on_failure)
        self.size, self.wait = settings.anchors.batch_size, settings.anchors.batch_wait_wall_seconds
        self._generator = generator
        self._catalogue = catalogue
        self._codebook_size = codebook_size
        self._versions = versions
        self._catalogue_ready = catalogue_ready
        self._codes: tuple[int, SidTrie, SidCentroids] | None = None

    def ready(self) -> bool:
        return self._catalogue_ready()

    async def work(self, batch: list[Entry]) -> None:
        requests: list[tuple[Entry, AnchorRequest]] = []
        for entry in batch:
            try:
                requests.append((entry, decode(AnchorRequest, entry.original.value or b"")))
            except REFUSALS as error:
                self.give_up(entry, error)
        # The catalogue belongs to the event loop's thread: all that is read of it is copied here.
        known = [self._catalogue.lookup(request.positives) for _, request in requests]
        histories = [History(self._catalogue.sids[self._catalogue.rows(ids)], vectors) for ids, vectors in known]
        started = time.perf_counter()
        answers: list[Anchors | None] = [None] * len(histories)
        if any(len(history) for history in histories):
            answers = await asyncio.to_thread(self._generate, histories, *self._trie_and_centroids())
        metrics.ANCHOR_SECONDS.observe(time.perf_counter() - started)
        for (entry, request), (used, _), anchors in zip(requests, known, answers, strict=True):
            record = encode(self._record(request, used, anchors))
            metrics.ANCHORS_REFRESHED.labels(request.reason).inc()
            key = request.user_id.encode()
            await self.publisher.send("user-anchors", key, record, then=entry.done, partition=entry.number)

    def _trie_and_centroids(self) -> tuple[SidTrie, SidCentroids]:
        """Of the catalogue as it is now."""
        if self._codes is None or self._codes[0] != self._catalogue.generation:
            rows = self._catalogue.rows(self._catalogue.ids())
            sids, vectors = self._catalogue.sids[rows], self._catalogue.vectors[rows]
            self._codes = (
                self._catalogue.generation,
                SidTrie(sids, self._codebook_size, vectors),
                SidCentroids(sids, vectors),
            )
        return self._codes[1], self._codes[2]

    def _generate(self, histories: list[History], trie: SidTrie, centroids: SidCentroids) -> list[Anchors | None]:
        """Anchors of each history; None for an empty one."""
        given = [history for history in histories if len(history)]
        beams = iter(self._generator.generate(given, trie, self.settings.generator.beams))
        return [anchors_of(next(beams), centroids, history) if len(history) else None for history in histories]

    def _record(self, request: AnchorRequest, used: list[str], anchors: Anchors | None) -> UserAnchors:
        generator, quantiser, encoder = self._versions
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
