"""What the labels role knows of one partition: the joiner, what is published, and what waits to be acknowledged."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from streams.contracts import Cause
from streams.dead_letters import Original
from streams.labels.joiner import Joiner, Released
from streams.labels.published import Published
from streams.labels.store import RecallStore
from streams.role import PartitionState
from streams.settings import LabelSettings
from streams.watermark import NEVER, Delayed, Watermark

SOURCES = ("recalls", "feedback")
CLOCK_SKEW_MS = 60_000
"""Producers' clocks are taken to agree within this."""


class Partition(PartitionState):
    """The state of one partition of recalls and feedback. It begins with ``resume``."""

    def __init__(self, labels: LabelSettings, store: RecallStore, now: float) -> None:
        super().__init__(SOURCES, now)
        self._window, self._retention = int(labels.window_seconds * 1000), int(labels.retention_seconds * 1000)
        self._store = store
        self.joiner = Joiner(self._window, self._retention, store)
        self.watermark = Watermark(SOURCES, int(labels.allowed_lateness_seconds * 1000))
        # What is over is let go some wall time later. While a backlog is worked off, event time runs ahead of those
        # who make the anchors, and their corrections must still find the requests.
        self.over_at = Delayed(labels.retention_wall_seconds)
        # None until the labels already in the log have been read back.
        self.published: Published | None = None
        self.reading_back = False
        self.first_recall_ms: int | None = None
        # Kafka time of the newest record read, by source.
        self.read_to_ms: dict[str, int] = {}
        # Sources that were read to what was their end at some moment.
        self.reached_end: set[str] = set()
        # Whether the records are read again that an owner before this one had read.
        self.repeating = True
        # Recalls that came when all was over, until it is known whether they have their label.
        self.over: list[tuple[str, Original]] = []
        # Recalls so large that their label may be over the cap.
        self.large: dict[str, Original] = {}
        # Those whose label was over it: one dead letter each, whatever else changes them.
        self.too_large: set[str] = set()
        # Closed requests that something changed, and what; and those that differ from the log while repeating.
        self.touched: dict[str, Cause] = {}
        self.differing: dict[str, Cause] = {}
        # All that was over at this watermark is durable: what is committed beside the offsets.
        self.horizon = NEVER
        self._sent = 0
        self._outstanding: dict[int, None] = {}
        self._held: deque[tuple[int, Released, int]] = deque()

    def resume(self) -> None:
        """Take up the horizon that was committed.

        Offsets are committed in order, a source at a time, so some of what was over is read again, and some of it,
        its feedback perhaps, is not. Behind the horizon nothing is looked at again.
        """
        self.horizon = max((int(said) for said in self.metadata.values() if said.isdigit()), default=NEVER)
        self.joiner = Joiner(self._window, self._retention, self._store, self.horizon)

    def to_commit(self) -> str:
        return "" if self.horizon == NEVER else str(self.horizon)

    def repeats(self) -> bool:
        """Whether an earlier owner may have read more than was read again until now."""
        if self.repeating and self.published is not None:
            newest = self.published.newest_ms + CLOCK_SKEW_MS
            self.repeating = any(
                source not in self.reached_end
                and self.next_offset.get(source, 0) < self.published.ends[source]
                and self.read_to_ms.get(source, NEVER) <= newest
                for source in SOURCES
            )
            if not self.repeating:
                self.published.keep([self.joiner, {request_id for request_id, _ in self.over}])
                self.touched.update(self.differing)
                self.differing = {}
        return self.repeating

    def sending(self) -> Callable[[], None]:
        """Note a label on its way; call the result once it is durable."""
        self._sent += 1
        number = self._sent
        self._outstanding[number] = None

        def confirmed() -> None:
            del self._outstanding[number]
            self._let_go()

        return confirmed

    def release(self, released: Released) -> None:
        """Acknowledge offsets as soon as every label sent before now is durable."""
        self._held.append((self._sent, released, self.joiner.horizon))
        self._let_go()

    def _let_go(self) -> None:
        oldest = next(iter(self._outstanding), self._sent + 1)
        while self._held and self._held[0][0] < oldest:
            _, released, self.horizon = self._held.popleft()
            for offset in released.recalls:
                self.acks["recalls"].done(offset)
            for offset in released.feedback:
                self.acks["feedback"].done(offset)
