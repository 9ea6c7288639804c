"""A worker that was cut off for longer than its session writes nothing more for partitions that are somebody else's.

A process that is stopped, starved or without a network is put out of its group, and does not know it when it goes on.
What it had sent, or sends next, would be said twice: the new owner has said it. Kafka fences such a producer inside
transactions only, which would make every label wait for a commit. So records leave the process only while the group is
known to count it as a member: for the session's length from when a heartbeat was sent that was answered. Else they
wait for the next one, or are dropped with the partitions. A request that is in the network by then is out of reach.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from aiokafka.errors import KafkaError

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

    def held(self) -> bool:
        """Whether what is sent now is sent by the owner. Also while there is nothing to own."""
        until = self._until
        return until is None or self._clock() < until

    def end(self) -> None:
        """Nothing is assigned any more."""
        self._until = None

    async def keep_by(self, coordinator: Any) -> None:
        """From now on each heartbeat of ``coordinator`` (an aiokafka GroupCoordinator) renews the lease; the first one
        goes out at once."""
        if not hasattr(coordinator, "renews"):
            heartbeat = coordinator._do_heartbeat

            async def renewing() -> bool:
                sent = self._clock()
                member: bool = await heartbeat()
                if member:
                    self._until = sent + self._seconds
                return member

            coordinator._do_heartbeat, coordinator.renews = renewing, self
        await coordinator._do_heartbeat()


def send_while_held(producer: Any, lease: Lease) -> None:
    """Let ``producer`` (an AIOKafkaProducer that was not started) hand nothing to the network while it is not held."""
    accumulator = producer._message_accumulator
    drain = accumulator.drain_by_nodes

    def drain_if_held(ignore_nodes: Any, muted_partitions: Any = frozenset()) -> Any:
        if lease.held():
            return drain(ignore_nodes, muted_partitions)
        nothing = drain(ignore_nodes, frozenset(accumulator._batches))
        asyncio.get_running_loop().call_later(LOOK_AGAIN, accumulator._wakeup, accumulator._waiter_future)
        return nothing

    accumulator.drain_by_nodes = drain_if_held


def drop_unsent(producer: Any) -> None:
    """Fail what ``producer`` has not handed to the network, by `Fenced`.

    What it had, and is to be sent again, has its sequence number already, by which the broker knows it.
    """
    batches = producer._message_accumulator._batches
    for tp, waiting in list(batches.items()):
        unsent = [batch for batch in waiting if batch.retry_count == 0]
        if len(unsent) == len(waiting):
            del batches[tp]
        else:
            batches[tp] = deque(batch for batch in waiting if batch.retry_count)
        for batch in unsent:
            batch.failure(Fenced())
            if batch._drain_waiter.done():
                batch._drain_waiter.exception()  # seen, whether or not a sender waited for room in it
