"""The chosen requests of a partition with what they joined, in the order of their recalls, in bounded memory.

The joiner of the labels role runs over the walk. A request is given out once the watermark says that the labels role
has forgotten it: then it holds what the role's last revision held, every correction included.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from streams.contracts import Feedback, Recall
from streams.labels.joiner import Joined, Joiner, Source
from streams.replay.log import Log
from streams.replay.select import Selection
from streams.replay.walk import Step, Walk, horizon
from streams.settings import LabelSettings
from streams.watermark import END, NEVER


@dataclass(frozen=True, slots=True)
class Request:
    """A request of the log. ``joined``: under each of the settings asked for, in their order.

    ``kafka_ms``: when its recall was logged. ``over``: whether the log goes on until its window is over, under the last
    of the settings asked for: those in force, where others are asked for too.
    """

    partition: int
    offset: int
    kafka_ms: int
    recall: Recall
    joined: Sequence[Joined]
    over: bool


class _Variant:
    """A joiner under one set of settings."""

    def __init__(self, labels: LabelSettings) -> None:
        self.window_ms = int(labels.window_seconds * 1000)
        self.retention_ms = int(labels.retention_seconds * 1000)
        self.lateness_ms = int(labels.allowed_lateness_seconds * 1000)
        # Requests close here when they would be forgotten there.
        self.joiner = Joiner(self.window_ms, 0)

    def close(self, watermark: int) -> list[Joined]:
        due = self.joiner.close(watermark)
        self.joiner.forget(watermark)
        return due


class Requests:
    """Iterates over the chosen requests of a partition by recall offset. ``walk`` counts what was read for them.

    ``starts``: first offset to read, by topic; ``settings``: the first set decides the order of closing. What a request
    joins depends on the log and the settings, not on which others are chosen. ``tap`` is told of each step, and whether
    more of it is needed than its event time.
    """

    def __init__(
        self,
        log: Log,
        partition: int,
        selection: Selection,
        starts: Mapping[str, int],
        settings: Sequence[LabelSettings],
        tap: Callable[[Step, bool], None] | None = None,
    ) -> None:
        self._partition = partition
        self._tap = tap
        self._selection = selection
        self._variants = [_Variant(labels) for labels in settings]
        first = self._variants[0]
        until = max(
            horizon(labels, selection.to_ms) + variant.lateness_ms - first.lateness_ms
            for labels, variant in zip(settings, self._variants, strict=True)
        )
        # Later requests may own feedback without request_id, and no feedback counts after the last window.
        self._last_ms = selection.to_ms + max(variant.window_ms for variant in self._variants)
        self.walk = Walk(log, partition, starts, settings[0], until)
        self._waiting: dict[int, list[Joined | None]] = {}
        self._kafka_ms: dict[int, int] = {}

    @property
    def retained(self) -> int:
        """Requests in memory."""
        return max(variant.joiner.retained for variant in self._variants) + len(self._waiting)

    def __iter__(self) -> Iterator[Request]:
        watermark = NEVER
        for step in self.walk:
            needed = self._needed(step.record)
            if self._tap is not None:
                self._tap(step, needed)
            if needed and step.record is not None:
                self._feed(step.entry.offset, step.entry.kafka_ms, step.record)
            if step.watermark > watermark:
                watermark = step.watermark
                yield from self._close(watermark)
        # What the log leaves open is as it would be after the idle timeout.
        yield from self._close(END, watermark)

    def _needed(self, record: Recall | Feedback | None) -> bool:
        """Whether a chosen request may depend on a record."""
        selection = self._selection
        if record is None or not selection.from_ms <= record.ts <= self._last_ms:
            return False
        return selection.user in (None, record.user_id)

    def _feed(self, offset: int, kafka_ms: int, record: Recall | Feedback) -> None:
        source = Source(offset, kafka_ms)
        if isinstance(record, Feedback):
            for variant in self._variants:
                variant.joiner.add_feedback(record, source)
            return
        if any(variant.joiner.is_over(record.ts) for variant in self._variants):
            self.walk.refused["recalls"] += 1  # its feedback is let go already; the labels role refuses it as late
            return
        seen = [variant.joiner.duplicate_recalls for variant in self._variants]
        for variant in self._variants:
            variant.joiner.add_recall(record, source)
        repeated = any(v.joiner.duplicate_recalls > n for v, n in zip(self._variants, seen, strict=True))
        if not repeated and self._selection.recall(self._partition, offset, record):
            self._waiting[offset] = [None] * len(self._variants)
            self._kafka_ms[offset] = kafka_ms

    def _close(self, watermark: int, reached: int | None = None) -> Iterator[Request]:
        """``reached``: how far the watermark really came, where it is not ``watermark``."""
        first, last = self._variants[0], self._variants[-1]
        for at, variant in enumerate(self._variants):
            own = watermark
            if watermark != END:
                own += first.lateness_ms - variant.lateness_ms - variant.retention_ms
            for joined in variant.close(own):
                if joined.recall_offset in self._waiting:
                    self._waiting[joined.recall_offset][at] = joined
        reached = watermark if reached is None else reached
        while self._waiting:
            offset, found = next(iter(self._waiting.items()))
            whole = [joined for joined in found if joined is not None]
            if len(whole) < len(found):
                return
            del self._waiting[offset]
            kafka_ms = self._kafka_ms.pop(offset)
            if self._selection.joined(self._partition, whole[0].feedback_offsets):
                recall = whole[0].recall
                over = recall.ts + last.window_ms <= reached + first.lateness_ms - last.lateness_ms
                yield Request(self._partition, offset, kafka_ms, recall, whole, over)
