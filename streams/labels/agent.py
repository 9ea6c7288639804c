"""The labels role: joins recalls with feedback, labels what closes, publishes, and only then acknowledges.

State is rebuilt from the log. A recall or feedback is acknowledged when nothing retained depends on it, so a restart
reads again all that is open or correctable, and ``published`` tells which of those labels are in the log already.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from streams import metrics
from streams.contracts import Cause, Feedback, Recall, UserAnchors, decode, encode
from streams.dead_letters import Original
from streams.kafka import RecordTooLargeError
from streams.labels import published
from streams.labels.joiner import Joined, Joiner, Source
from streams.labels.record import AnchorSet, Lookup, Versions, anchor_set, corrected, digest, make_label
from streams.log_view import Handler
from streams.role import PartitionState, Role
from streams.settings import LabelSettings, Settings
from streams.topics import full_name
from streams.views import AnchorsView, CalibrationView, labeller_config
from streams.watermark import NEVER, Watermark

SOURCES = ("recalls", "feedback")
RECALL: Cause = "recall"
FEEDBACK: Cause = "feedback"
FORGET_EVERY = 60.0
"""Seconds between looks for anchors that nothing can ask for any more."""
CLOCK_SKEW_MS = 60_000
"""Producers' clocks are taken to agree within this."""


class Partition(PartitionState):
    """The state of one partition of recalls and feedback."""

    def __init__(self, labels: LabelSettings, now: float) -> None:
        super().__init__(SOURCES, now)
        self.joiner = Joiner(int(labels.window_seconds * 1000), int(labels.retention_seconds * 1000))
        self.watermark = Watermark(SOURCES, int(labels.allowed_lateness_seconds * 1000))
        # None until the labels already in the log have been read back.
        self.published: dict[str, tuple[int, bytes]] | None = None
        self.reading_back = False
        self.first_recall_ms: int | None = None
        # Recalls so large that their label may be over the cap.
        self.large: dict[str, Original] = {}
        # Closed requests that something changed, and what.
        self.touched: dict[str, Cause] = {}
        self._sent = 0
        self._outstanding: dict[int, None] = {}
        self._held: list[tuple[int, str, list[int]]] = []

    def sending(self) -> Callable[[], None]:
        """Note a label on its way; call the result once it is durable."""
        self._sent += 1
        number = self._sent
        self._outstanding[number] = None

        def confirmed() -> None:
            del self._outstanding[number]
            self._let_go()

        return confirmed

    def release(self, source: str, offsets: list[int]) -> None:
        """Acknowledge offsets as soon as every label sent before now is durable."""
        if offsets:
            self._held.append((self._sent, source, offsets))
            self._let_go()

    def _let_go(self) -> None:
        oldest = next(iter(self._outstanding), self._sent + 1)
        while self._held and self._held[0][0] < oldest:
            _, source, offsets = self._held.pop(0)
            for offset in offsets:
                self.acks[source].done(offset)


class LabelsRole(Role[Partition]):
    """One worker of the labels role.

    ``lookup``: ids -> the known among them and their vectors; ``catalogue_ready``: whether vectors are loaded.
    """

    def __init__(
        self,
        settings: Settings,
        versions: Versions,
        dim: int,
        levels: int,
        lookup: Lookup,
        catalogue_ready: Callable[[], bool],
        health: metrics.Health,
        on_failure: Callable[[BaseException], None],
    ) -> None:
        super().__init__("labels", SOURCES, settings, health, on_failure)
        labels = settings.labels
        self._labels = labels
        self._versions = versions
        self._dim = dim
        self._levels = levels
        self._lookup = lookup
        self._catalogue_ready = catalogue_ready
        self._config = labeller_config(labels)
        self._idle_timeout = labels.idle_timeout_wall_seconds or labels.window_seconds + labels.allowed_lateness_seconds
        self._anchors: AnchorsView[AnchorSet] = AnchorsView(self._prepare)
        self._anchors_forgotten = 0.0
        self._anchors_kept_ms = int((labels.window_seconds + labels.retention_seconds + 86_400) * 1000)
        self.calibrations = CalibrationView(self._calibration_changed)
        """To be fed with the ``calibrations`` topic by whoever follows it for this process."""

    def new_partition(self, now: float) -> Partition:
        return Partition(self._labels, now)

    def assigned(self, numbers: list[int]) -> None:
        self._anchors = AnchorsView(self._prepare, self._anchors_changed)

    def state_handlers(self) -> dict[str, Handler]:
        return {"user-anchors": self._anchors}

    def ready(self) -> bool:
        return self._catalogue_ready() and self.state_ready

    def _prepare(self, record: UserAnchors) -> AnchorSet:
        return anchor_set(record, self._dim, self._levels, self._config)

    # --- what comes in ------------------------------------------------------------------------------------------

    async def take(self, number: int, partition: Partition, source: str, message: Any) -> None:
        kafka_ms = int(message.timestamp * 1000)
        where = Source(message.offset, kafka_ms)
        if source == "recalls":
            if partition.first_recall_ms is None:
                partition.first_recall_ms = kafka_ms
            recall = decode(Recall, message.value or b"")
            self.check_time(recall.ts, message)
            # A label adds some 40 bytes a candidate to its recall. Only where that comes near the cap may the
            # original bytes be needed again, for a dead letter.
            if len(message.value) + 40 * len(recall.candidates) > self.settings.kafka.max_record_bytes // 2:
                partition.large[recall.request_id] = Original.of(message)
            late, cause = partition.joiner.add_recall(recall, where), RECALL
            partition.watermark.observe(source, recall.ts)
        else:
            feedback = decode(Feedback, message.value or b"")
            self.check_time(feedback.ts, message)
            late, cause = partition.joiner.add_feedback(feedback, where), FEEDBACK
            partition.watermark.observe(source, feedback.ts)
        partition.touched.update(dict.fromkeys(late, cause))
        await self._settle(number, partition, kafka_ms)

    def _anchors_changed(self, number: int, anchors: UserAnchors) -> None:
        partition = self.partitions.get(number)
        if partition is not None:
            for request_id in partition.joiner.closed_since(anchors.user_id, anchors.ts):
                partition.touched.setdefault(request_id, "anchors")

    def _calibration_changed(self, ts: int) -> None:
        for partition in self.partitions.values():
            for request_id in partition.joiner.closed_after(ts):
                partition.touched.setdefault(request_id, "calibration")

    async def advance(self, number: int, partition: Partition, now: float, idle: set[str]) -> None:
        for source in idle:
            if now - partition.last_arrival[source] >= self._idle_timeout:
                partition.watermark.idle(source)
        await self._settle(number, partition, int(now * 1000))
        self._forget_anchors(now)
        metrics.OPEN_REQUESTS.set(sum(len(p.joiner) for p in self.partitions.values()))

    def _forget_anchors(self, now: float) -> None:
        """Let go of anchors that only recalls later than all retention and a day could ask for."""
        if now - self._anchors_forgotten < FORGET_EVERY or not self.partitions:
            return
        self._anchors_forgotten = now
        oldest = min(partition.watermark.event_time for partition in self.partitions.values())
        if oldest != NEVER:
            self._anchors.forget_before(oldest - self._anchors_kept_ms)

    # --- what goes out ------------------------------------------------------------------------------------------

    async def _settle(self, number: int, partition: Partition, trigger_ms: int) -> None:
        """Label what is due, correct what was touched, release what is past."""
        if not self.ready():
            return
        if partition.published is None and partition.joiner.retained:
            self._read_back(number, partition)
            return
        async with partition.lock:
            if self.partitions.get(number) is not partition:
                return
            joiner = partition.joiner
            due: dict[str, tuple[Joined, Cause | None]] = {
                joined.recall.request_id: (joined, None) for joined in joiner.close(partition.watermark.value())
            }
            touched, partition.touched = partition.touched, {}
            for request_id, cause in touched.items():
                due.setdefault(request_id, (joiner.rejoin(request_id), cause))
            for joined, why in due.values():
                await self._publish(number, partition, joined, why, trigger_ms)
            self._forget(partition)

    def _forget(self, partition: Partition) -> None:
        joiner = partition.joiner
        forgotten, released = joiner.forget(partition.watermark.event_time)
        for request_id in forgotten:
            if partition.published is not None:
                partition.published.pop(request_id, None)
            partition.large.pop(request_id, None)
            partition.touched.pop(request_id, None)
        partition.release("recalls", released.recalls)
        partition.release("feedback", released.feedback)
        metrics.DUPLICATES.labels("recalls").inc(joiner.duplicate_recalls)
        metrics.DUPLICATES.labels("feedback").inc(joiner.duplicate_feedback)
        metrics.LATE_FEEDBACK.inc(joiner.late)
        metrics.ORPHAN_FEEDBACK.inc(joiner.orphans)
        joiner.duplicate_recalls = joiner.duplicate_feedback = joiner.late = joiner.orphans = 0

    def _read_back(self, number: int, partition: Partition) -> None:
        if partition.reading_back:
            return
        partition.reading_back = True
        # A label is appended after its recall; the margin covers producers whose clocks differ.
        since = max(0, (partition.first_recall_ms or 0) - CLOCK_SKEW_MS)

        async def read() -> None:
            partition.published = await asyncio.to_thread(published.read_back, self.settings.kafka, number, since)

        self.spawn(read())

    async def _publish(
        self, number: int, partition: Partition, joined: Joined, cause: Cause | None, trigger_ms: int
    ) -> None:
        recall = joined.recall
        anchors = self._anchors.at(recall.user_id, recall.ts)
        calibration = self.calibrations.at(recall.ts)
        label = make_label(joined, number, anchors, calibration, self._lookup, self._versions)
        mark = digest(label)
        assert partition.published is not None
        before = partition.published.get(recall.request_id)
        if before is not None:
            if before[1] == mark:
                return
            label = corrected(label, before[0] + 1, cause or "restart")
        partition.published[recall.request_id] = (label.revision, mark)
        headers = [
            (published.REQUEST_ID, recall.request_id.encode()),
            (published.REVISION, str(label.revision).encode()),
            (published.DIGEST, mark),
            (published.CLOSED_AT, str(trigger_ms).encode()),
            (published.NEWEST_AT, str(joined.newest_kafka_ms).encode()),
        ]
        confirmed = partition.sending()

        def durable() -> None:
            metrics.LABEL_DELAY.observe(max(0.0, self.clock() - trigger_ms / 1000))
            confirmed()

        key = recall.user_id.encode()
        try:
            await self.publisher.send("labels", key, encode(label), headers, durable, partition=number)
        except RecordTooLargeError as error:
            topic = full_name(self.settings.kafka, "recalls")
            rebuilt = Original(topic, number, joined.recall_offset, joined.newest_kafka_ms, key, encode(recall))
            await self.refuse(partition.large.get(recall.request_id, rebuilt), error, confirmed)
            return
        if before is None:
            metrics.REQUESTS_CLOSED.labels(label.outcome).inc()
        else:
            metrics.CORRECTIONS.labels(cause or "restart").inc()
        if anchors is not None:
            metrics.ANCHOR_AGE.observe((recall.ts - anchors.ts) / 1000)
        metrics.LABELS.labels("exposed").inc(len(label.exposed.item))
        metrics.LABELS.labels("unexposed").inc(len(label.unexposed.item))
        metrics.UNKNOWN_CANDIDATES.inc(label.provenance.unknown)
