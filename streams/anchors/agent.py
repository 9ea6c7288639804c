"""The anchors role: anchor requests -> the generator, in batches -> ``user-anchors``.

Every request is answered, with no anchors where none of its positives is known: the profiles role waits for the
answer. A request is acknowledged once its answer is durable, or a newer request of its user took its place. What the
budget or an open circuit breaker defers waits in memory and unacknowledged in the log, while the last good anchors
serve. The role reads back what it has answered, so that a request that comes twice is answered once.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import msgspec
import structlog

from gpl.anchors.base import AnchorGenerator, Anchors, History, anchors_of
from gpl.catalogue import Catalogue
from gpl.codes.trie import SidTrie
from streams import metrics
from streams.anchors.budget import Budget, CircuitBreaker
from streams.anchors.record import anchors_record
from streams.anchors.waiting import Waiting, WaitingRequests
from streams.contracts import AnchorRequest, decode, encode
from streams.dead_letters import Halted, Original, Refused
from streams.log_view import Handler
from streams.role import PartitionState, Role
from streams.settings import Settings

log = structlog.get_logger()

SOURCE = "anchor-requests"
POISON = 3
"""Failures of the generator over one request alone, others being answered meanwhile, that make it a dead letter."""
STUCK = 10
"""Times ``anchors.slow_wall_seconds`` that a call of the generator may take before its silence counts."""
_STATES = {"closed": 0, "half_open": 1, "open": 2}

T = TypeVar("T")


class Answered(msgspec.Struct):
    """The little of ``user-anchors`` that tells which requests have their answer."""

    user_id: str
    ts: int
    version: int


class Partition(PartitionState):
    """Of one partition of anchor requests: user -> (ts, sequence) of the newest request answered."""

    def __init__(self, now: float) -> None:
        super().__init__((SOURCE,), now)
        self.answered: dict[str, tuple[int, int]] = {}


class AnchorsRole(Role[Partition]):
    """One worker of the anchors role. ``versions``: generator, quantiser and encoder in force."""

    own_state = ("user-anchors",)

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
        super().__init__("anchors", (SOURCE,), settings, health, on_failure)
        self._generator = generator
        self._catalogue = catalogue
        self._codebook_size = codebook_size
        self._versions = versions
        self._catalogue_ready = catalogue_ready
        self._codes: tuple[int, SidTrie] | None = None
        limits = settings.anchors
        self._waiting = WaitingRequests()
        self._budget = Budget(limits.refreshes_per_minute, limits.batch_size)
        self._breaker = CircuitBreaker(limits.breaker_failures, limits.breaker_open_wall_seconds)
        self._refreshed = 0

    def new_partition(self, now: float) -> Partition:
        return Partition(now)

    def assigned(self, numbers: list[int]) -> None:
        self._waiting.clear()

    def state_handlers(self) -> dict[str, Handler]:
        partitions, decoder = self.partitions, msgspec.json.Decoder(Answered)

        def anchors_read(record: Any) -> None:
            if record.value is not None:
                said = decoder.decode(record.value)
                answered = partitions[record.partition].answered
                answered[said.user_id] = max(answered.get(said.user_id, (-1, -1)), (said.ts, said.version))

        return {"user-anchors": anchors_read}

    def ready(self) -> bool:
        return self._catalogue_ready() and self.state_ready

    async def start(self) -> None:
        await super().start()
        self.spawn(self._serve_forever())

    # --- what comes in ------------------------------------------------------------------------------------------

    async def take(self, number: int, partition: Partition, source: str, message: Any) -> None:
        request = decode(AnchorRequest, message.value or b"")
        acks, offset = partition.acks[source], message.offset
        now = time.monotonic()
        waiting = Waiting(number, request, Original.of(message), now, lambda: acks.done(offset))
        if not self._waiting.put(waiting):
            metrics.ANCHOR_REQUESTS_DROPPED.labels("superseded").inc()
        if self._breaker.state(now) == "open":
            metrics.ANCHOR_REQUESTS_DEFERRED.labels("breaker").inc()
        elif (available := self._budget.available(now)) is not None and len(self._waiting) > available:
            metrics.ANCHOR_REQUESTS_DEFERRED.labels("budget").inc()

    async def advance(self, number: int, partition: Partition, now: float, idle: set[str]) -> None:
        """Nothing here depends on event time."""

    # --- what goes out ------------------------------------------------------------------------------------------

    async def _serve_forever(self) -> None:
        while not self._stopped:
            self.health.beat("generator")
            batch = self._next_batch() if self.ready() and not self.halted else []
            if not batch:
                await asyncio.sleep(self.settings.anchors.batch_wait_wall_seconds)
                continue
            partitions = self.partitions
            try:
                await self._serve(batch, partitions)
            except Halted as why:
                self.halt(why)

    def _next_batch(self) -> list[Waiting]:
        """The neediest requests that the breaker and the budget let through; those that have their answer are done."""
        now = time.monotonic()
        state = self._breaker.state(now)
        oldest = self._waiting.oldest_arrival()
        metrics.ANCHOR_BREAKER.set(_STATES[state])
        metrics.ANCHOR_REQUESTS_WAITING.set(len(self._waiting))
        metrics.ANCHOR_REQUEST_OLDEST.set(0.0 if oldest is None else now - oldest)
        if state == "open" or oldest is None:
            return []
        size = 1 if state == "half_open" else self.settings.anchors.batch_size
        available = self._budget.available(now)
        batch = []
        for waiting in self._waiting.take(size if available is None else min(size, available)):
            request = waiting.request
            answered = self.partitions[waiting.partition].answered.get(request.user_id)
            if answered is not None and (request.ts, request.sequence) <= answered:
                metrics.ANCHOR_REQUESTS_DROPPED.labels("answered").inc()
                waiting.done()
            else:
                batch.append(waiting)
        return batch

    async def _serve(self, batch: list[Waiting], partitions: dict[int, Partition]) -> None:
        # The catalogue belongs to the event loop's thread: all that is read of it is copied here.
        known = [self._catalogue.lookup(waiting.request.positives) for waiting in batch]
        histories = [History(self._catalogue.sids[self._catalogue.rows(ids)], vectors) for ids, vectors in known]
        answers: list[Anchors | None] = [None] * len(histories)
        if wanted := sum(1 for history in histories if len(history)):
            self._budget.spend(wanted)
            started = time.monotonic()
            try:
                call = asyncio.to_thread(self._generate, histories, self._trie())
                limit = STUCK * self.settings.anchors.slow_wall_seconds
                answers = await awaited(call, lambda: self.health.beat("generator"), limit)
            except Exception as error:  # whatever a model raises: it may pass, and others are waiting
                await self._failed(batch, partitions, error)
                return
            self._judge(time.monotonic() - started)
            self._refreshed += wanted
        for waiting, (used, _), anchors in zip(batch, known, answers, strict=True):
            if self._stopped or self.partitions is not partitions:
                return  # a rebalance came first: the next owners answer
            request = waiting.request
            partitions[waiting.partition].answered[request.user_id] = (request.ts, request.sequence)
            metrics.ANCHORS_REFRESHED.labels(request.reason).inc()
            record, key = encode(anchors_record(request, used, anchors, self._versions)), request.user_id.encode()
            await self.publisher.send("user-anchors", key, record, then=waiting.done, partition=waiting.partition)

    def _judge(self, seconds: float) -> None:
        metrics.ANCHOR_SECONDS.observe(seconds)
        if seconds > self.settings.anchors.slow_wall_seconds:
            metrics.ANCHOR_FAILURES.labels("slow").inc()
            log.warning("generator is slow", seconds=round(seconds, 1))
            self._breaker.failed(time.monotonic())
        else:
            self._breaker.succeeded()

    async def _failed(self, batch: list[Waiting], partitions: dict[int, Partition], error: Exception) -> None:
        metrics.ANCHOR_FAILURES.labels("error").inc()
        log.error("generator failed", requests=len(batch), error=repr(error))
        self._breaker.failed(time.monotonic())
        if self.partitions is not partitions:
            return
        for waiting in batch:
            waiting.failures += 1
        if len(batch) == 1:
            first = batch[0]
            if not first.alone:
                first.answered_before = self._refreshed
            first.alone += 1
            if first.alone >= POISON and self._refreshed > first.answered_before:
                await self.refuse(first.original, Refused("generator", f"positives: {error!r}"), first.done)
                return
        self._waiting.put_back(batch)

    def _trie(self) -> SidTrie:
        """Of the catalogue as it is now."""
        if self._codes is None or self._codes[0] != self._catalogue.generation:
            rows = self._catalogue.rows(self._catalogue.ids())
            sids, vectors = self._catalogue.sids[rows], self._catalogue.vectors[rows]
            self._codes = self._catalogue.generation, SidTrie(sids, self._codebook_size, vectors)
        return self._codes[1]

    def _generate(self, histories: list[History], trie: SidTrie) -> list[Anchors | None]:
        """Anchors of each history; None for an empty one."""
        given = [history for history in histories if len(history)]
        beams = iter(self._generator.generate(given, trie, self.settings.generator.beams))
        return [anchors_of(next(beams), trie.centroids, history) if len(history) else None for history in histories]


async def awaited(call: Awaitable[T], beat: Callable[[], None], limit: float) -> T:
    """The outcome of a long call, with a ``beat`` a second for so many seconds: a model that needs long for a batch is
    no standstill, or its process would be ended over and over."""
    working, latest = asyncio.ensure_future(call), time.monotonic() + limit
    try:
        while not working.done() and time.monotonic() < latest:
            beat()
            await asyncio.wait({working}, timeout=1.0)
        return await working
    finally:
        working.cancel()
