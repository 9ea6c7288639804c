"""Joins what was recalled with what was exposed, in event time. Pure: no Kafka, no clock.

One joiner holds one partition. A request closes when the watermark passes ``recall.ts + window``; its feedback is

- every feedback with its request_id and user, and ``recall.ts <= ts <= recall.ts + window``;
- every feedback of the user without request_id whose item was among the candidates, in the same window, unless a
  later request of the user (by ts, then request_id) holds the item and covers the time too.

Nothing of this depends on arrival order. Closed requests are kept for the retention, so that what arrives late is
joined too and asks for a correction. What is over for good lies behind the ``horizon``: a request or an event whose
window and retention the watermark has passed is let go and its offset released, and one that comes after that is
refused, so that a label is never made of a part of what there was.
"""

from __future__ import annotations

import heapq
from functools import lru_cache

import msgspec

from streams.contracts import Feedback, Recall, decode, encode
from streams.labels.store import MemoryStore, RecallStore
from streams.watermark import NEVER


class Source(msgspec.Struct, frozen=True, gc=False):
    """A record's place in the log: offset in its partition, Kafka timestamp in wall ms."""

    offset: int
    kafka_ms: int


class Entry(msgspec.Struct, frozen=True, gc=False):
    """One feedback as it is held."""

    feedback: Feedback
    source: Source


class Request(msgspec.Struct, eq=False):
    """A recall, less its candidates, which are in the store, and the feedback that names it, open or closed."""

    request_id: str
    user_id: str
    ts: int
    source: Source
    size: int
    feedback: list[Entry] = []
    closed: bool = False


class Joined(msgspec.Struct, frozen=True):
    """A request as it stands: what a label is computed from.

    ``exposed``: item -> clicked, in order of first exposure.
    """

    recall: Recall
    exposed: dict[str, bool]
    recall_offset: int
    feedback_offsets: list[int]
    newest_kafka_ms: int


class Released(msgspec.Struct, frozen=True):
    """Offsets that a restart need not read again."""

    recalls: list[int]
    feedback: list[int]


def _order(request: Request) -> tuple[int, str]:
    return request.ts, request.request_id


class Joiner:
    """One partition. Feedback counts for ``window_ms`` after its recall, and corrects ``retention_ms`` longer.

    ``store`` holds the recalls' bytes; by default they stay in memory. ``horizon``: the watermark up to which all
    was over when an earlier owner of the partition ended.
    """

    def __init__(
        self, window_ms: int, retention_ms: int, store: RecallStore | None = None, horizon: int = NEVER
    ) -> None:
        self._window = window_ms
        self._retention = retention_ms
        self._store: RecallStore = MemoryStore() if store is None else store
        self.horizon = horizon
        self._requests: dict[str, Request] = {}
        self._by_user: dict[str, dict[str, Request]] = {}
        self._closing: list[tuple[int, str]] = []
        self._forgetting: list[tuple[int, str]] = []
        # Feedback: held by event_id until nothing can use it; what has no request_id is also found by user.
        self._events: dict[str, Entry] = {}
        self._expiring: list[tuple[int, str]] = []
        self._early: dict[str, list[Entry]] = {}
        self._anonymous: dict[str, list[Entry]] = {}
        self._joined_events: set[str] = set()
        self._done_recalls: list[int] = []
        self._done_feedback: list[int] = []
        # Anonymous feedback asks for the same few requests of its user again and again.
        self._candidates = lru_cache(maxsize=64)(self._read_candidates)
        self.retained_bytes = 0
        """Bytes of the recalls that are held, in memory or on disk."""
        # Counted since the caller last set them to 0.
        self.duplicate_recalls = 0
        self.duplicate_feedback = 0
        self.orphans = 0
        self.late = 0

    def __len__(self) -> int:
        """Requests whose window is not over."""
        return len(self._closing)

    def __contains__(self, request_id: object) -> bool:
        return request_id in self._requests

    @property
    def retained(self) -> int:
        """Requests that are held, open and closed."""
        return len(self._requests)

    @property
    def events(self) -> int:
        """Feedback that is held."""
        return len(self._events)

    def is_over(self, ts: int) -> bool:
        """Whether window and retention of a recall, or an event, of this time are over: it comes too late."""
        return ts + self._window + self._retention <= self.horizon

    def add_recall(self, recall: Recall, source: Source, data: bytes | None = None) -> list[str]:
        """Open a request; ``data``: the record's bytes, where they are at hand.

        A request_id seen before is a duplicate: the first in the log stands. Returns the closed requests that may
        lose feedback without request_id to this one (it came late). Raises ValueError when it ``is_over``: its
        feedback may have been let go.
        """
        if self.is_over(recall.ts):
            raise ValueError(f"ts: {recall.ts}, window and retention were over at {self.horizon}")
        request_id = recall.request_id
        if request_id in self._requests:
            self.duplicate_recalls += 1
            self._done_recalls.append(source.offset)
            return []
        if data is None:
            data = encode(recall)
        self._store.put(request_id, data)
        early = self._early.pop(request_id, None) or []
        request = Request(request_id, recall.user_id, recall.ts, source, len(data), early)
        self.retained_bytes += request.size
        self._requests[request_id] = request
        self._by_user.setdefault(recall.user_id, {})[request_id] = request
        heapq.heappush(self._closing, (recall.ts + self._window, request_id))
        if recall.user_id not in self._anonymous:
            return []
        mine = self._by_user[recall.user_id].values()
        return [r.request_id for r in mine if r.closed and r.ts + self._window >= recall.ts]

    def add_feedback(self, feedback: Feedback, source: Source) -> list[str]:
        """Take one feedback. Returns the closed requests that it may change (it came late)."""
        event_id = feedback.event_id
        if event_id in self._events:
            self.duplicate_feedback += 1
            self._done_feedback.append(source.offset)
            return []
        if self.is_over(feedback.ts):
            self.orphans += 1
            self._done_feedback.append(source.offset)
            return []
        entry = Entry(feedback, source)
        self._events[event_id] = entry
        heapq.heappush(self._expiring, (feedback.ts + self._window + self._retention, event_id))
        if feedback.request_id is not None:
            request = self._requests.get(feedback.request_id)
            if request is None:
                self._early.setdefault(feedback.request_id, []).append(entry)
                return []
            request.feedback.append(entry)
            touched = request if request.closed and self._counts(request, feedback) else None
        else:
            self._anonymous.setdefault(feedback.user_id, []).append(entry)
            owner = self._owner(feedback)
            touched = owner if owner is not None and owner.closed else None
        if touched is None:
            return []
        self.late += 1
        return [touched.request_id]

    def close(self, watermark: int, at_most: int | None = None) -> list[Joined]:
        """Requests whose window the watermark has passed, by closing time, then request_id.

        ``at_most``: so many, and the others with the next call: closed requests carry all their candidates.
        """
        due: list[Joined] = []
        while self._closing and self._closing[0][0] <= watermark and len(due) != at_most:
            closes_at, request_id = heapq.heappop(self._closing)
            request = self._requests[request_id]
            request.closed = True
            heapq.heappush(self._forgetting, (closes_at + self._retention, request_id))
            due.append(self._join(request))
        return due

    def closed_since(self, user_id: str, ts: int) -> list[str]:
        """Closed requests of the user with recall.ts >= ts: those that anchors in force from ``ts`` on may change."""
        requests = self._by_user.get(user_id, {}).values()
        return [r.request_id for r in requests if r.closed and r.ts >= ts]

    def closed_after(self, ts: int) -> list[str]:
        """Closed requests with recall.ts >= ts."""
        return [r.request_id for r in self._requests.values() if r.closed and r.ts >= ts]

    def rejoin(self, request_id: str) -> Joined:
        """A retained request as it stands now. Raises KeyError when it is not retained."""
        return self._join(self._requests[request_id])

    def forget(self, watermark: int) -> tuple[list[str], Released]:
        """Move the horizon and let go of what lies behind it: the request ids forgotten and the offsets released."""
        self.horizon = max(self.horizon, watermark)
        forgotten = []
        while self._forgetting and self._forgetting[0][0] <= watermark:
            _, request_id = heapq.heappop(self._forgetting)
            request = self._requests.pop(request_id)
            self.retained_bytes -= request.size
            mine = self._by_user[request.user_id]
            del mine[request_id]
            if not mine:
                del self._by_user[request.user_id]
            forgotten.append(request_id)
            self._done_recalls.append(request.source.offset)
        self._store.remove(forgotten)
        while self._expiring and self._expiring[0][0] <= watermark:
            _, event_id = heapq.heappop(self._expiring)
            entry = self._events.pop(event_id)
            self._drop(entry.feedback, event_id)
            self._done_feedback.append(entry.source.offset)
        released = Released(self._done_recalls, self._done_feedback)
        self._done_recalls, self._done_feedback = [], []
        return forgotten, released

    def _drop(self, feedback: Feedback, event_id: str) -> None:
        if feedback.request_id is None:
            entries = self._anonymous[feedback.user_id]
            entries[:] = [entry for entry in entries if entry.feedback.event_id != event_id]
            if not entries:
                del self._anonymous[feedback.user_id]
        else:
            early = self._early.get(feedback.request_id)
            if early is not None:
                early[:] = [entry for entry in early if entry.feedback.event_id != event_id]
                if not early:
                    del self._early[feedback.request_id]
        if event_id in self._joined_events:
            self._joined_events.discard(event_id)
        else:
            self.orphans += 1

    def _counts(self, request: Request, feedback: Feedback) -> bool:
        return request.user_id == feedback.user_id and request.ts <= feedback.ts <= request.ts + self._window

    def _owner(self, feedback: Feedback) -> Request | None:
        """The request that feedback without request_id belongs to: the latest one that covers it and holds the item."""
        mine = [r for r in self._by_user.get(feedback.user_id, {}).values() if self._counts(r, feedback)]
        for request in sorted(mine, key=_order, reverse=True):
            if feedback.item_id in self._candidates(request.request_id, request.source.offset):
                return request
        return None

    def _anonymous_of(self, request: Request) -> list[Entry]:
        """Feedback without request_id that belongs to ``request``: the same as asking ``_owner`` of each, with every
        later request looked at once. Reading candidates is what costs, and a user may hold hundreds of requests."""
        entries = [e for e in self._anonymous.get(request.user_id, ()) if self._counts(request, e.feedback)]
        if not entries:
            return entries
        own = self._candidates(request.request_id, request.source.offset)
        entries = [e for e in entries if e.feedback.item_id in own]
        for later in self._by_user[request.user_id].values():
            if not entries:
                break
            if _order(later) <= _order(request):
                continue
            claimed = [e for e in entries if self._counts(later, e.feedback)]
            if claimed:
                held = self._candidates(later.request_id, later.source.offset)
                gone = {e.feedback.event_id for e in claimed if e.feedback.item_id in held}
                entries = [e for e in entries if e.feedback.event_id not in gone]
        return entries

    def _read_candidates(self, request_id: str, _offset: int) -> frozenset[str]:
        return frozenset(self._recall(request_id).candidates)

    def _recall(self, request_id: str) -> Recall:
        return decode(Recall, self._store.get(request_id))

    def _join(self, request: Request) -> Joined:
        entries = [entry for entry in request.feedback if self._counts(request, entry.feedback)]
        entries += self._anonymous_of(request)
        # The order in which things happened, not the one in which they arrived.
        entries.sort(key=lambda entry: (entry.feedback.ts, entry.feedback.event_id))
        exposed: dict[str, bool] = {}
        for entry in entries:
            feedback = entry.feedback
            exposed[feedback.item_id] = exposed.get(feedback.item_id, False) or feedback.kind == "click"
            self._joined_events.add(feedback.event_id)
        return Joined(
            recall=self._recall(request.request_id),
            exposed=exposed,
            recall_offset=request.source.offset,
            feedback_offsets=sorted(entry.source.offset for entry in entries),
            newest_kafka_ms=max([request.source.kafka_ms, *(entry.source.kafka_ms for entry in entries)]),
        )
