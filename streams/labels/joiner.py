"""Joins what was recalled with what was exposed, in event time. Pure: no Kafka, no clock.

One joiner holds one partition. A request closes when the watermark passes ``recall.ts + window``; its feedback is

- every feedback with its request_id and user, and ``recall.ts <= ts <= recall.ts + window``;
- every feedback of the user without request_id whose item was among the candidates, in the same window, unless a
  later request of the user (by ts, then request_id) holds the item and covers the time too.

Nothing of this depends on arrival order. Closed requests are kept for the retention, so that what arrives late is
joined too and asks for a correction. Offsets are released once nothing retained depends on them.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field

from streams.contracts import Feedback, Recall


@dataclass(slots=True)
class Source:
    """A record's place in the log: offset in its partition, Kafka timestamp in wall ms."""

    offset: int
    kafka_ms: int


@dataclass(slots=True)
class Request:
    """A recall and the feedback that names it, open or closed."""

    recall: Recall
    source: Source
    feedback: list[tuple[Feedback, Source]] = field(default_factory=list)
    closed: bool = False


@dataclass(frozen=True, slots=True)
class Joined:
    """A request as it stands: what a label is computed from.

    ``exposed``: item -> clicked, in order of first exposure.
    """

    recall: Recall
    exposed: dict[str, bool]
    recall_offset: int
    feedback_offsets: list[int]
    newest_kafka_ms: int


@dataclass(frozen=True, slots=True)
class Released:
    """Offsets that a restart need not read again."""

    recalls: list[int]
    feedback: list[int]


class Joiner:
    """One partition. Feedback counts for ``window_ms`` after its recall, and corrects ``retention_ms`` longer."""

    def __init__(self, window_ms: int, retention_ms: int) -> None:
        self._window = window_ms
        self._retention = retention_ms
        self._requests: dict[str, Request] = {}
        self._by_user: dict[str, dict[str, Request]] = {}
        self._closing: list[tuple[int, str]] = []
        self._forgetting: list[tuple[int, str]] = []
        # Feedback: held by event_id until nothing can use it; what has no request_id is also found by user.
        self._events: dict[str, tuple[Feedback, Source]] = {}
        self._expiring: list[tuple[int, str]] = []
        self._early: dict[str, list[tuple[Feedback, Source]]] = {}
        self._anonymous: dict[str, list[tuple[Feedback, Source]]] = {}
        self._joined_events: set[str] = set()
        self._done_recalls: list[int] = []
        self._done_feedback: list[int] = []
        # Counted since the caller last set them to 0.
        self.duplicate_recalls = 0
        self.duplicate_feedback = 0
        self.orphans = 0
        self.late = 0

    def __len__(self) -> int:
        """Requests whose window is not over."""
        return len(self._closing)

    @property
    def retained(self) -> int:
        """Requests in memory, open and closed."""
        return len(self._requests)

    def add_recall(self, recall: Recall, source: Source) -> list[str]:
        """Open a request. A request_id seen before is a duplicate: the first in the log stands.

        Returns the closed requests that may lose feedback without request_id to this one (it came late).
        """
        if recall.request_id in self._requests:
            self.duplicate_recalls += 1
            self._done_recalls.append(source.offset)
            return []
        request = Request(recall, source, self._early.pop(recall.request_id, []))
        self._requests[recall.request_id] = request
        self._by_user.setdefault(recall.user_id, {})[recall.request_id] = request
        heapq.heappush(self._closing, (recall.ts + self._window, recall.request_id))
        if recall.user_id not in self._anonymous:
            return []
        mine = self._by_user[recall.user_id].values()
        return [r.recall.request_id for r in mine if r.closed and r.recall.ts + self._window >= recall.ts]

    def add_feedback(self, feedback: Feedback, source: Source) -> list[str]:
        """Take one feedback. Returns the closed requests that it may change (it came late)."""
        if feedback.event_id in self._events:
            self.duplicate_feedback += 1
            self._done_feedback.append(source.offset)
            return []
        entry = (feedback, source)
        self._events[feedback.event_id] = entry
        heapq.heappush(self._expiring, (feedback.ts + self._window + self._retention, feedback.event_id))
        if feedback.request_id is not None:
            request = self._requests.get(feedback.request_id)
            if request is None:
                self._early.setdefault(feedback.request_id, []).append(entry)
                return []
            request.feedback.append(entry)
            touched = [request] if self._counts(request, feedback) else []
        else:
            self._anonymous.setdefault(feedback.user_id, []).append(entry)
            owner = self._owner(feedback)
            touched = [owner] if owner is not None else []
        late = [request.recall.request_id for request in touched if request.closed]
        self.late += len(late)
        return late

    def close(self, watermark: int) -> list[Joined]:
        """Requests whose window the watermark has passed, by closing time, then request_id."""
        due = []
        while self._closing and self._closing[0][0] <= watermark:
            closes_at, request_id = heapq.heappop(self._closing)
            request = self._requests[request_id]
            request.closed = True
            heapq.heappush(self._forgetting, (closes_at + self._retention, request_id))
            due.append(self._join(request))
        return due

    def closed_since(self, user_id: str, ts: int) -> list[str]:
        """Closed requests of the user with recall.ts >= ts: those that anchors in force from ``ts`` on may change."""
        requests = self._by_user.get(user_id, {}).values()
        return [r.recall.request_id for r in requests if r.closed and r.recall.ts >= ts]

    def closed_after(self, ts: int) -> list[str]:
        """Closed requests with recall.ts >= ts."""
        return [r.recall.request_id for r in self._requests.values() if r.closed and r.recall.ts >= ts]

    def rejoin(self, request_id: str) -> Joined:
        """A retained request as it stands now. Raises KeyError when it is not retained."""
        return self._join(self._requests[request_id])

    def forget(self, watermark: int) -> tuple[list[str], Released]:
        """Let go of what nothing can change any more: the request ids forgotten and the offsets released."""
        forgotten = []
        while self._forgetting and self._forgetting[0][0] <= watermark:
            _, request_id = heapq.heappop(self._forgetting)
            request = self._requests.pop(request_id)
            mine = self._by_user[request.recall.user_id]
            del mine[request_id]
            if not mine:
                del self._by_user[request.recall.user_id]
            forgotten.append(request_id)
            self._done_recalls.append(request.source.offset)
        while self._expiring and self._expiring[0][0] <= watermark:
            _, event_id = heapq.heappop(self._expiring)
            feedback, source = self._events.pop(event_id)
            self._drop(feedback, event_id)
            self._done_feedback.append(source.offset)
        released = Released(self._done_recalls, self._done_feedback)
        self._done_recalls, self._done_feedback = [], []
        return forgotten, released

    def _drop(self, feedback: Feedback, event_id: str) -> None:
        if feedback.request_id is None:
            entries = self._anonymous[feedback.user_id]
            entries[:] = [entry for entry in entries if entry[0].event_id != event_id]
            if not entries:
                del self._anonymous[feedback.user_id]
        else:
            early = self._early.get(feedback.request_id)
            if early is not None:
                early[:] = [entry for entry in early if entry[0].event_id != event_id]
                if not early:
                    del self._early[feedback.request_id]
        if event_id in self._joined_events:
            self._joined_events.discard(event_id)
        else:
            self.orphans += 1

    def _counts(self, request: Request, feedback: Feedback) -> bool:
        recall = request.recall
        return recall.user_id == feedback.user_id and recall.ts <= feedback.ts <= recall.ts + self._window

    def _owner(self, feedback: Feedback) -> Request | None:
        """The request that feedback without request_id belongs to."""
        holders = [
            request
            for request in self._by_user.get(feedback.user_id, {}).values()
            if self._counts(request, feedback) and feedback.item_id in request.recall.candidates
        ]
        return max(holders, key=lambda r: (r.recall.ts, r.recall.request_id), default=None)

    def _join(self, request: Request) -> Joined:
        recall = request.recall
        entries = [entry for entry in request.feedback if self._counts(request, entry[0])]
        entries += [entry for entry in self._anonymous.get(recall.user_id, ()) if self._owner(entry[0]) is request]
        # The order in which things happened, not the one in which they arrived.
        entries.sort(key=lambda entry: (entry[0].ts, entry[0].event_id))
        exposed: dict[str, bool] = {}
        for feedback, _ in entries:
            exposed[feedback.item_id] = exposed.get(feedback.item_id, False) or feedback.kind == "click"
            self._joined_events.add(feedback.event_id)
        return Joined(
            recall=recall,
            exposed=exposed,
            recall_offset=request.source.offset,
            feedback_offsets=sorted(source.offset for _, source in entries),
            newest_kafka_ms=max([request.source.kafka_ms, *(source.kafka_ms for _, source in entries)]),
        )
