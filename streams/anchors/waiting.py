"""Anchor requests that wait for the generator: one a user, the neediest first, none for ever.

Need, from the most: no anchors at all (cold); anchors that no longer explain the clicks (drift); anchors of other
versions; anchors that are merely old. Within a reason the larger miss goes first, then the earlier arrival. Of ten that
are taken one is the longest waiting instead, so that a flood of needy users starves nobody.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from streams.contracts import AnchorRequest
from streams.dead_letters import Original

_RANK = {"cold": 0, "drift": 1, "version": 2, "stale": 3}
OLDEST_EVERY = 10


@dataclass(eq=False, slots=True)
class Waiting:
    """One request. ``arrived``: monotonic seconds; ``done`` acknowledges it.

    ``failures``: calls of the generator that failed with it in the batch; ``alone``: those that had it alone, and
    ``answered_before``: how many requests the generator had answered when that first happened.
    """

    partition: int
    request: AnchorRequest
    original: Original
    arrived: float
    done: Callable[[], None]
    failures: int = 0
    alone: int = 0
    answered_before: int = 0

    def newer_than(self, other: Waiting) -> bool:
        """Whether this is the user's later request."""
        mine, theirs = self.request, other.request
        return (mine.ts, mine.sequence) > (theirs.ts, theirs.sequence)

    def need(self) -> tuple[int, int, float, float]:
        """Sorts the neediest first; what has made the generator fail comes after all that has not."""
        return (self.failures, _RANK[self.request.reason], -(self.request.miss or 0.0), self.arrived)


class WaitingRequests:
    """At most one request a user; a newer one supersedes the older, which is then done."""

    def __init__(self) -> None:
        self._by_user: dict[tuple[int, str], Waiting] = {}
        # Both hold entries that have been taken or superseded too; those are passed over.
        self._heap: list[tuple[tuple[int, int, float, float], int, Waiting]] = []
        self._arrivals: deque[Waiting] = deque()
        self._number = 0
        self._taken = 0

    def __len__(self) -> int:
        return len(self._by_user)

    def put(self, waiting: Waiting) -> bool:
        """Add a request. False when it and another of its user became one; the older of the two is done."""
        key = (waiting.partition, waiting.request.user_id)
        before = self._by_user.get(key)
        if before is not None and not waiting.newer_than(before):
            waiting.done()
            return False
        self._by_user[key] = waiting
        self._arrivals.append(waiting)
        self._push(waiting)
        if before is not None:
            before.done()
        return before is None

    def put_back(self, batch: Iterable[Waiting]) -> None:
        """Return requests that could not be served; one that was superseded meanwhile is done."""
        for waiting in batch:
            if self.put(waiting):
                # It waits since it arrived first.
                self._arrivals.pop()
                self._arrivals.appendleft(waiting)

    def take(self, n: int) -> list[Waiting]:
        """Up to ``n`` requests, now the caller's. One that has made the generator fail comes alone."""
        batch: list[Waiting] = []
        while len(batch) < n and self._by_user:
            oldest = self._taken % OLDEST_EVERY == OLDEST_EVERY - 1
            waiting = self._oldest() if oldest else self._neediest()
            if waiting.failures and batch:
                self._push(waiting)
                break
            del self._by_user[waiting.partition, waiting.request.user_id]
            self._taken += 1
            batch.append(waiting)
            if waiting.failures:
                break
        return batch

    def oldest_arrival(self) -> float | None:
        """When the longest waiting request arrived, monotonic seconds; None when none waits."""
        return self._oldest().arrived if self._by_user else None

    def clear(self) -> None:
        """Forget all, acknowledging nothing: the partitions are read again."""
        self._by_user.clear()
        self._heap.clear()
        self._arrivals.clear()

    def _push(self, waiting: Waiting) -> None:
        self._number += 1
        heapq.heappush(self._heap, (waiting.need(), self._number, waiting))
        if len(self._heap) > 2 * len(self._by_user) + 64:
            self._heap = [entry for entry in self._heap if self._waits(entry[2])]
            heapq.heapify(self._heap)

    def _waits(self, waiting: Waiting) -> bool:
        return self._by_user.get((waiting.partition, waiting.request.user_id)) is waiting

    def _neediest(self) -> Waiting:
        while True:
            waiting = heapq.heappop(self._heap)[2]
            if self._waits(waiting):
                return waiting

    def _oldest(self) -> Waiting:
        while not self._waits(self._arrivals[0]):
            self._arrivals.popleft()
        return self._arrivals[0]
