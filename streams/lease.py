"""A worker that was cut off for longer than its session writes nothing more for partitions that are somebody else's.

A process that is stopped, starved or without a network is put out of its group, and does not know it when it goes on.
What it had sent, or sends next, would be said twice: the new owner has said it. Kafka fences such a producer inside
transactions only, which would make every label wait for a commit. So records leave the process only while the group is
known to count it as a member: for the session's length from when a heartbeat was sent that was answered. Else they
wait for the next one, or are dropped with the partitions. A request that is in the network by then is out of reach.
The producer's own loop may be stopped between taking a batch and writing it, so both moments look.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from typing import Any

from aiokafka.errors import KafkaError, NodeNotReadyError
from aiokafka.producer.transaction_manager import NO_PRODUCER_EPOCH, NO_PRODUCER_ID, PidAndEpoch
from aiokafka.protocol.produce import ProduceRequest

LOOK_AGAIN = 0.05
"""Seconds until records that wait for the lease are looked at again."""


class Fenced(KafkaError):  # type: ignore[misc]
    """The record was not sent, and will not be: its partition may have another owner."""


class Lease:
    """How long what is assigned to a member of a group is certainly its own. Written and read by different threads."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._seconds = seconds
        self._clock = clock
        self._until: float | None = None
        self._over = False

    def held(self) -> bool:
        """Whether what is sent now is sent by the owner. Also while there is nothing to own."""
        until = self._until
        return until is None or self._over or self._clock() < until

    def end(self, for_good: bool = False) -> None:
        """Nothing is assigned any more; ``for_good``: nor will be, whatever heartbeat is still under way."""
        self._until = None
        self._over = for_good

    async def keep_by(self, coordinator: Any) -> None:
        """From now on each heartbeat of ``coordinator`` (an aiokafka GroupCoordinator) renews the lease, the first one
        at once, and it ends when the coordinator is told that it is no member."""
        if not hasattr(coordinator, "renews"):
            heartbeat, reset = coordinator._do_heartbeat, coordinator.reset_generation

            async def renewing() -> bool:
                sent = self._clock()
                member: bool = await heartbeat()
                if member:
                    self._until = sent + self._seconds
                return member

            def put_out() -> None:
                if self._until is not None:
                    self._until = self._clock()
                reset()

            coordinator._do_heartbeat, coordinator.reset_generation = renewing, put_out
            coordinator.renews = self
        self._until = self._clock()
        with contextlib.suppress(KafkaError):  # aiokafka's own heartbeats go on, and meet it too
            await coordinator._do_heartbeat()


def send_while_held(producer: Any, lease: Lease) -> None:
    """Let ``producer`` (an idempotent AIOKafkaProducer, not started) hand nothing to the network while it is not held,
    and nothing again that `drop_unsent` has met."""
    accumulator, client = producer._message_accumulator, producer.client
    drain, again, write = accumulator.drain_by_nodes, accumulator.reenqueue, client.send

    def drain_if_held(ignore_nodes: Any, muted_partitions: Any = frozenset()) -> Any:
        if lease.held():
            return drain(ignore_nodes, muted_partitions)
        nothing = drain(ignore_nodes, frozenset(accumulator._batches))
        asyncio.get_running_loop().call_later(LOOK_AGAIN, accumulator._wakeup, accumulator._waiter_future)
        return nothing

    def again_if_wanted(batch: Any) -> None:
        if hasattr(batch, "fenced"):
            _fail(batch)
        else:
            again(batch)

    async def write_if_held(node_id: int, request: Any, **options: Any) -> Any:
        if isinstance(request, ProduceRequest):
            await client.ready(node_id, **options)  # connects where it must: from here to the writing nothing waits
            if not lease.held():
                raise NodeNotReadyError("not known as a member")  # what is in it comes back, to wait or be dropped
        return await write(node_id, request, **options)

    accumulator.drain_by_nodes, accumulator.reenqueue = drain_if_held, again_if_wanted
    client.send = write_if_held


def drop_unsent(producer: Any) -> None:
    """Fail what ``producer`` has not handed to the network, by `Fenced`, and what comes back from there unwritten."""
    accumulator, transactions = producer._message_accumulator, producer._txn_manager
    under_way = [batch for batch in accumulator._pending_batches if not hasattr(batch, "fenced")]
    for batch in under_way:
        batch.fenced = True
    numbered = bool(under_way)
    for waiting in accumulator._batches.values():
        for batch in waiting:
            if batch.retry_count:  # under way before: it has left the pending ones, and its end takes it from there
                accumulator._pending_batches.add(batch)
                numbered = True
            _fail(batch)
    accumulator._batches.clear()
    if numbered:
        # The broker would find a gap where numbers were given to what it never gets: a new producer id begins anew.
        transactions._pid_and_epoch = PidAndEpoch(NO_PRODUCER_ID, NO_PRODUCER_EPOCH)
        transactions._pid_waiter = asyncio.get_running_loop().create_future()
        transactions._sequence_numbers.clear()


def _fail(batch: Any) -> None:
    batch.failure(Fenced())
    if batch._drain_waiter.done() and not batch._drain_waiter.cancelled():
        batch._drain_waiter.exception()  # seen, whether or not a sender waited for room in it
