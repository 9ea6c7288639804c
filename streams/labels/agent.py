"""The labels role: joins recalls with feedback, labels what closes, publishes, and only then acknowledges.

State is rebuilt from the log. A recall or feedback is acknowledged when nothing retained depends on it, so a restart
reads again all that is open or correctable, and ``published`` tells which of those labels are in the log already.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable
from functools import partial
from typing import Any

from faust.types import TP

from streams import metrics
from streams.contracts import Cause, Feedback, Label, Recall, UserAnchors, decode, encode
from streams.dead_letters import Original, Refused
from streams.intake import fetch_seconds
from streams.kafka import RecordTooLargeError, check_size
from streams.labels import published
from streams.labels.backpressure import Backpressure
from streams.labels.joiner import Joined, Source
from streams.labels.partition import CLOCK_SKEW_MS, SOURCES, Partition
from streams.labels.record import AnchorSet, Lookup, Versions, anchor_set, corrected, digest_of, make_label
from streams.labels.store import open_store
from streams.log_view import Handler
from streams.role import Role
from streams.settings import Settings
from streams.topics import full_name
from streams.views import AnchorsView, CalibrationView, labeller_config
from streams.watermark import NEVER

RECALL: Cause = "recall"
FEEDBACK: Cause = "feedback"
FORGET_EVERY = 60.0
"""Seconds between looks for anchors that nothing can ask for any more."""
SLICE = 0.02
"""Seconds of labelling after which the event loop runs what else is due: sending, commits, the tick."""
CLOSE_AT_ONCE = 64
"""Requests closed at a time; each carries its candidates."""


Have = Callable[[Iterable[str], Callable[[], bool]], Awaitable[bool]]


class LabelsRole(Role[Partition]):
    """One worker of the labels role.

    ``lookup``: ids -> the known among them and their vectors; ``catalogue_ready``: whether vectors are loaded.
    ``have``: waits until ``lookup`` of these ids needs no server; False when it is not wanted any more.
    """

    judges_on_arrival = False

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
        have: Have | None = None,
    ) -> None:
        super().__init__("labels", SOURCES, settings, health, on_failure)
        labels = settings.labels
        self._labels = labels
        self._versions = versions
        self._dim = dim
        self._levels = levels
        self._lookup = lookup
        self._have = have
        self._catalogue_ready = catalogue_ready
        self._config = labeller_config(labels)
        self._idle_timeout = labels.idle_timeout_wall_seconds or labels.window_seconds + labels.allowed_lateness_seconds
        self._anchors: AnchorsView[AnchorSet] = AnchorsView(self._prepare)
        self._anchors_forgotten = 0.0
        self._anchors_kept_ms = int((labels.window_seconds + labels.retention_seconds) * 1000)
        self._store = open_store(labels)
        self._backpressure = Backpressure(labels, self._pause, self._read_on)
        self._stages = dict.fromkeys(("fetch", "decode", "join", "lookup", "match", "encode", "produce"), 0.0)
        self._told = dict(self._stages)
        self._slice_began = 0.0
        self.calibrations = CalibrationView(self._calibration_changed)
        """To be fed with the ``calibrations`` topic by whoever follows it for this process."""

    def new_partition(self, now: float) -> Partition:
        return Partition(self._labels, self._store, now)

    def assigned(self, numbers: list[int]) -> None:
        # Every partition begins anew from its committed offsets.
        self._store.clear()
        for partition in self.partitions.values():
            partition.resume()
        self._anchors = AnchorsView(self._prepare, self._anchors_changed)

    def state_handlers(self) -> dict[str, Handler]:
        return {"user-anchors": self._anchors}

    async def stop(self) -> None:
        await super().stop()
        self._store.close()

    def ready(self) -> bool:
        return self._catalogue_ready() and self.state_ready

    def _prepare(self, record: UserAnchors) -> AnchorSet:
        return anchor_set(record, self._versions.space, self._dim, self._levels, self._config)

    # --- what comes in ------------------------------------------------------------------------------------------

    async def take(self, number: int, partition: Partition, source: str, message: Any) -> None:
        began = time.thread_time()
        value, where = message.value or b"", Source(message.offset, message.timestamp)
        joiner = partition.joiner
        if source == "recalls":
            if partition.first_recall_ms is None:
                partition.first_recall_ms = message.timestamp
            recall = decode(Recall, value)
            decoded = time.thread_time()
            self.check_time(recall.ts, message)
            self.check_key(recall, message)
            partition.watermark.observe(source, recall.ts)
            if joiner.is_over(recall.ts):
                partition.over.append((recall.request_id, Original.of(message)))
                return  # accepted or refused when it is known whether it has its label
            # A label adds some 40 bytes a candidate to its recall. Only where that comes near the cap may the
            # original bytes be needed again, for a dead letter.
            large = len(value) + 40 * len(recall.candidates) > self.settings.kafka.max_record_bytes // 2
            if large and recall.request_id not in joiner:
                partition.large[recall.request_id] = Original.of(message)
            late, cause = joiner.add_recall(recall, where, value), RECALL
        else:
            feedback = decode(Feedback, value)
            decoded = time.thread_time()
            self.check_time(feedback.ts, message)
            self.check_key(feedback, message)
            late, cause = joiner.add_feedback(feedback, where), FEEDBACK
            partition.watermark.observe(source, feedback.ts)
        self.guard.accepted(message.topic, number)
        if late:
            partition.touched.update(dict.fromkeys(late, cause))
        self._stages["decode"] += decoded - began
        self._stages["join"] += time.thread_time() - decoded

    async def taken(self, number: int, partition: Partition, source: str, newest_kafka_ms: int) -> None:
        partition.read_to_ms[source] = newest_kafka_ms
        over = self._backpressure.apply(self.partitions)
        while over and not self.ready() and self.owns(number, partition):
            self.at_work()
            await asyncio.sleep(0.05)  # nothing can close yet, so nothing more is read
        await self._settle(number, partition, newest_kafka_ms)

    def _pause(self, number: int, source: str) -> None:
        self.app.consumer.pause_partitions({TP(full_name(self.settings.kafka, source), number)})

    def _read_on(self, number: int, source: str) -> None:
        self.app.consumer.resume_partitions({TP(full_name(self.settings.kafka, source), number)})

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
        partition.reached_end |= idle
        for source in idle:
            if self.quiet_for(partition, source, now) >= self._idle_timeout:
                partition.watermark.idle(source)
        if partition.lock.locked():
            return  # the intake is at it, and the tick has other partitions to look at
        # What is due by itself, and not since a source is idle, was due when the newest record came.
        timed_out = any(partition.watermark.is_idle(source) for source in SOURCES)
        newest_ms = max(partition.read_to_ms.values(), default=0)
        # However much is due: a tick that stays away is taken for a standstill. The next one goes on.
        await self._settle(number, partition, int(now * 1000) if timed_out else newest_ms, at_once=True)

    async def advanced(self, now: float) -> None:
        self._forget_anchors(now)
        self._backpressure.apply(self.partitions)
        self._stages["fetch"] = fetch_seconds(self.app)
        for stage, seconds in self._stages.items():
            metrics.LABEL_STAGE_SECONDS.labels(stage).inc(seconds - self._told[stage])
        self._told = dict(self._stages)

    def _forget_anchors(self, now: float) -> None:
        """Let go of anchors that no request asks for which is held, or would be taken yet. Event time may be far ahead
        of those, while a backlog is worked off: what tells is how far they were let go of."""
        if now - self._anchors_forgotten < FORGET_EVERY or not self.partitions:
            return
        self._anchors_forgotten = now
        horizons = {number: partition.joiner.horizon for number, partition in self.partitions.items()}
        self._anchors.forget_before(
            {number: at - self._anchors_kept_ms for number, at in horizons.items() if at != NEVER}
        )

    # --- what goes out ------------------------------------------------------------------------------------------

    async def _settle(self, number: int, partition: Partition, trigger_ms: int, at_once: bool = False) -> None:
        """Label what is due since ``trigger_ms``, correct what was touched, release what is over.

        ``at_once``: no more than ``CLOSE_AT_ONCE`` of each; the next call goes on. What was touched came just now then.
        """
        if not self.ready():
            return
        if partition.published is None:
            if partition.joiner.retained or partition.over:
                self._read_back(number, partition)
            return
        while partition.lock.locked():
            self.at_work()  # the other's steps tell whether it still works
            await asyncio.sleep(0.01)
        async with partition.lock:
            self._slice_began = time.monotonic()
            joiner, full = partition.joiner, True
            while full and self.owns(number, partition):
                began = time.thread_time()
                due = joiner.close(partition.watermark.value(), CLOSE_AT_ONCE)
                self._stages["join"] += time.thread_time() - began
                full = len(due) == CLOSE_AT_ONCE
                self.at_work()
                for joined in due:
                    await self._publish(number, partition, joined, None, trigger_ms)
                if at_once:
                    break
            await self._refuse_late(number, partition)
            repeating = partition.repeats()
            left, since = len(partition.touched), trigger_ms
            if at_once:
                left, since = min(left, CLOSE_AT_ONCE), int(self.clock() * 1000)
            while partition.touched and left and self.owns(number, partition):
                left -= 1
                request_id = next(iter(partition.touched))
                cause = partition.touched.pop(request_id)
                self.at_work()
                await self._publish(number, partition, joiner.rejoin(request_id), cause, since)
            # Nothing is over while something is still due: its feedback would go with it.
            if not (full or partition.touched or repeating) and self.owns(number, partition):
                self._forget(partition)

    async def _refuse_late(self, number: int, partition: Partition) -> None:
        """Recalls that came when all was over: to the dead letters, unless their labels are there."""
        late, partition.over = partition.over, []
        for request_id, original in late:
            if not self.owns(number, partition):
                return
            assert partition.published is not None
            done = partial(partition.acks["recalls"].done, original.offset)
            if request_id in partition.published.labels:
                metrics.DUPLICATES.labels("recalls").inc()
                self.guard.accepted(original.topic, number)
                done()
                continue
            metrics.LATE_RECALLS.inc()
            error = Refused("late", f"ts: window and retention were over at {partition.joiner.horizon}")
            await self.refuse(original, error, done)

    def _forget(self, partition: Partition) -> None:
        joiner = partition.joiner
        forgotten, released = joiner.forget(partition.over_at.at(self.clock(), partition.watermark.event_time))
        for request_id in forgotten:
            if partition.published is not None:
                partition.published.labels.pop(request_id, None)
            partition.large.pop(request_id, None)
            partition.too_large.discard(request_id)
            partition.touched.pop(request_id, None)
        partition.release(released)
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
            kafka = self.settings.kafka
            partition.published = await asyncio.to_thread(published.read_back, kafka, number, since, SOURCES)

        self.spawn(read())

    async def _publish(
        self, number: int, partition: Partition, joined: Joined, cause: Cause | None, trigger_ms: int
    ) -> None:
        recall, said = joined.recall, partition.published
        assert said is not None
        if self._have is not None:
            ids = [*joined.exposed, *recall.candidates]
            if not await self._have(ids, partial(self._still_wanted, number, partition)):
                return
        anchors = self._anchors.at(number, recall.user_id, recall.ts)
        calibration = self.calibrations.at(recall.ts)
        label = make_label(joined, number, anchors, calibration, self._lookup, self._versions, self._stages)
        began = time.thread_time()
        value = encode(label)
        mark = digest_of(value)
        before = said.labels.get(recall.request_id)
        if before is not None:
            if before.digest == mark:
                partition.differing.pop(recall.request_id, None)
                return
            if partition.repeats():
                # What made the label what it is may not have been read again yet.
                partition.differing[recall.request_id] = cause or "restart"
                return
            if (cause or "restart", before.outcome, label.outcome) == ("restart", "labelled", "no_anchors"):
                metrics.ANCHORS_LOST.inc()  # compacted away meanwhile; the label that they made is still right
                return
            label = corrected(label, before.revision + 1, cause or "restart")
            value = encode(label)
        encoded = time.thread_time()
        self._stages["encode"] += encoded - began
        key = recall.user_id.encode()
        try:
            check_size(self.settings.kafka, full_name(self.settings.kafka, "labels"), key, value)
        except RecordTooLargeError as error:
            await self._too_large(number, partition, joined, error)
            return
        # Between here and the send there is no await: a partition that is gone gets nothing from this worker.
        if not self.owns(number, partition):
            return
        said.labels[recall.request_id] = published.Said(label.revision, mark, label.outcome)
        confirmed = partition.sending()

        def durable() -> None:
            metrics.LABEL_DELAY.observe(max(0.0, self.clock() - trigger_ms / 1000))
            confirmed()

        headers = published.headers(label, mark, trigger_ms, joined.newest_kafka_ms)
        elsewhere = self._claimed()
        await self.publisher.send("labels", key, value, headers, durable, partition=number)
        self._count(label, before is not None, cause, anchors)
        # A send that waits for room lets others work, the producer with its compression among them.
        self._stages["produce"] += max(0.0, time.thread_time() - encoded - (self._claimed() - elsewhere))
        if time.monotonic() - self._slice_began > SLICE:
            await asyncio.sleep(0)
            self._slice_began = time.monotonic()

    def _still_wanted(self, number: int, partition: Partition) -> bool:
        self.at_work()  # to wait for an index that is away is no standstill
        return self.owns(number, partition)

    def _claimed(self) -> float:
        """Seconds of this thread that some stage has claimed."""
        return sum(self._stages.values()) - self._stages["fetch"]

    async def _too_large(self, number: int, partition: Partition, joined: Joined, error: RecordTooLargeError) -> None:
        """The recall of a label over the cap to the dead letters, once."""
        recall = joined.recall
        if recall.request_id in partition.too_large:
            return
        partition.too_large.add(recall.request_id)
        topic, key = full_name(self.settings.kafka, "recalls"), recall.user_id.encode()
        rebuilt = Original(topic, number, joined.recall_offset, joined.newest_kafka_ms, key, encode(recall))
        await self.refuse(partition.large.get(recall.request_id, rebuilt), error, partition.sending())

    @staticmethod
    def _count(label: Label, correction: bool, cause: Cause | None, anchors: AnchorSet | None) -> None:
        if correction:
            metrics.CORRECTIONS.labels(cause or "restart").inc()
        else:
            metrics.REQUESTS_CLOSED.labels(label.outcome).inc()
        if anchors is not None:
            metrics.ANCHOR_AGE.observe((label.ts - anchors.ts) / 1000)
        metrics.LABELS.labels("exposed").inc(len(label.exposed.item))
        metrics.LABELS.labels("unexposed").inc(len(label.unexposed.item))
        metrics.CANDIDATES.inc(label.provenance.candidates)
        metrics.UNKNOWN_CANDIDATES.inc(label.provenance.unknown)
