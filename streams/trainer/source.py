"""The labels topic as a deterministic sequence of batches.

Partitions are merged by (Kafka timestamp, partition): of the records that are next in each partition, the oldest goes
first. So a backlog is trained in the order in which it was published, and the batches that a trainer cuts from a log
that lies ready depend on the log and the start positions alone, not on how fetches happened to interleave. A
smaller batch is cut only at the end of the log, after a short wait, so that nothing waits long in a quiet hour.
"""

from __future__ import annotations

import heapq
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import msgspec
import structlog
from kafka import TopicPartition
from kafka.errors import LogTruncationError, OffsetOutOfRangeError

from streams.dead_letters import Original
from streams.kafka import consumer
from streams.log_view import TopicMissingError
from streams.settings import KafkaSettings
from streams.topics import full_name
from streams.trainer.group import Alone, Group, owner

log = structlog.get_logger()

STALL_SECONDS = 10.0
"""Of polling: after it a partition that has records but gives none (no leader) is no longer waited for."""
BUFFER_BYTES = 256 * 2**20
"""Of values that wait for another partition; above it that partition counts as stalled too."""


class OffsetsGoneError(RuntimeError):
    """The log no longer holds the records that are next."""


def in_merge_order(records: Iterable[Any]) -> list[Any]:
    """Records of several partitions, each by ascending offset, merged by (Kafka timestamp, partition) of the heads."""
    by_partition: dict[int, deque[Any]] = {}
    for record in records:
        by_partition.setdefault(record.partition, deque()).append(record)
    heads = [(queue[0].timestamp, p) for p, queue in by_partition.items()]
    heapq.heapify(heads)
    merged = []
    while heads:
        _, p = heads[0]
        queue = by_partition[p]
        merged.append(queue.popleft())
        if queue:
            heapq.heapreplace(heads, (queue[0].timestamp, p))
        else:
            heapq.heappop(heads)
    return merged


def offsets_at(kafka: KafkaSettings, ts: int) -> dict[int, int]:
    """Offset of the first label record published at or after ``ts`` (Kafka time, milliseconds), per partition; its end
    where there is none. Raises ValueError when the topic is missing."""
    reader = consumer(kafka)
    try:
        topic = full_name(kafka, "labels")
        assignment = [TopicPartition(topic, p) for p in sorted(reader.partitions_for_topic(topic) or ())]
        if not assignment:
            raise TopicMissingError(f"topic {topic} does not exist; `gpl topics create` makes it")
        found, ends = reader.offsets_for_times(dict.fromkeys(assignment, ts)), reader.end_offsets(assignment)
        return {tp.partition: found[tp].offset if found.get(tp) else ends[tp] for tp in assignment}
    finally:
        reader.close()


class _Polled(msgspec.Struct, array_like=True):
    """What one rank's poll gave. ``ends``: of its partitions; ``at_end``: those read to there. ``now``, ``waited``:
    its clock, and seconds that the poll took."""

    records: list[Any]
    ends: dict[int, int]
    at_end: list[int]
    now: float
    waited: float


class _Shared(_Polled, array_like=True):
    records: list[Original]


class LabelSource:
    """Reads every partition of the labels topic from given positions, outside any consumer group.

    ``positions``: partition -> next offset; partitions that it does not name start at their earliest record. In a
    ``group`` each rank fetches its own partitions, and all ranks cut the same batches of what all have fetched.
    Raises ValueError when the topic is missing, when a position lies behind the end of its partition, or when there
    are more ranks than partitions; ``take`` raises OffsetsGoneError.
    """

    def __init__(
        self,
        kafka: KafkaSettings,
        positions: Mapping[int, int],
        clock: Callable[[], float] = time.monotonic,
        group: Group | None = None,
    ) -> None:
        topic = full_name(kafka, "labels")
        self._clock = clock
        self._group = group or Alone()
        # Without a reset: to go on elsewhere would skip labels, or train some twice, without a word.
        self._consumer = consumer(kafka, max_poll_records=200, auto_offset_reset="none")
        try:
            found = self._consumer.partitions_for_topic(topic)
            if not found:
                raise TopicMissingError(f"topic {topic} does not exist; `gpl topics create` makes it")
            if len(found) < self._group.ranks:
                raise ValueError(f"ranks: {self._group.ranks}, but {topic} has {len(found)} partitions to divide")
            mine = [p for p in sorted(found) if owner(p, self._group.ranks) == self._group.rank]
            self._assignment = {p: TopicPartition(topic, p) for p in mine}
            self._consumer.assign(list(self._assignment.values()))
            self._seek(positions)
        except BaseException:
            self._consumer.close()
            raise
        self._buffers: dict[int, deque[Any]] = {p: deque() for p in self.positions}
        self._pending: list[Any] = []
        self._blocked: dict[int, float] = {}  # partition that the others wait for -> seconds of polling so far
        self._stalled: set[int] = set()
        self._now = self._clock()
        self._idle = True

    def _seek(self, wanted: Mapping[int, int]) -> None:
        earliest = self._consumer.beginning_offsets(list(self._assignment.values()))
        ends = self._consumer.end_offsets(list(self._assignment.values()))
        mine: dict[int, tuple[int, int]] = {}
        for p, tp in self._assignment.items():
            position = wanted.get(p, earliest[tp])
            if position > ends[tp]:
                raise ValueError(
                    f"{tp.topic}, partition {p}: position {position} is behind its end {ends[tp]}; was the topic made "
                    "anew? Then start from other checkpoints"
                )
            if position < earliest[tp]:
                log.warning("labels_expired", partition=p, lost=earliest[tp] - position)
                position = earliest[tp]
            self._consumer.seek(tp, position)
            mine[p] = position, ends[tp]
        every: dict[int, tuple[int, int]] = {}
        for part in self._group.gather(msgspec.msgpack.encode(mine)):
            every |= msgspec.msgpack.decode(part, type=dict[int, tuple[int, int]])
        self.positions: dict[int, int] = {p: position for p, (position, _) in sorted(every.items())}
        self._ends = {p: end for p, (_, end) in every.items()}
        self._at_end = {p for p, (position, end) in every.items() if position >= end}

    def take(self, size: int, wait: float) -> list[Any]:
        """The next batch: ``size`` records in merge order, fewer at the end of the log after ``wait`` seconds.

        Empty when there is nothing to cut yet; blocks for about ``wait`` seconds at most. ``positions`` moves behind
        what was returned.
        """
        started = self._time()
        while True:
            self._merge(size)
            if len(self._pending) < size:
                self._fetch()
                self._merge(size)
            if len(self._pending) >= size:
                return self._cut()
            if self._time() - started >= wait:
                return self._cut() if self._drained() else []

    def lag(self) -> dict[int, int]:
        """Records behind the known end, per partition."""
        return {p: max(0, self._ends[p] - position) for p, position in self.positions.items()}

    def close(self) -> None:
        self._consumer.close()

    def _time(self) -> float:
        # In a group that of rank 0 as of the last exchange, so that all ranks decide the same.
        return self._clock() if self._group.ranks == 1 else self._now

    def _fetch(self) -> None:
        every = self._exchanged(self._poll())
        for polled in every:
            for record in polled.records:
                self._buffers[record.partition].append(record)
                self._stalled.discard(record.partition)
            self._ends |= polled.ends
        self._at_end = {p for polled in every for p in polled.at_end}
        self._now = every[0].now
        self._idle = not any(polled.records for polled in every)
        waited = max(polled.waited for polled in every)
        self._blocked = {p: self._blocked.get(p, 0.0) + waited for p in self._buffers if not self._ready(p)}
        if not self._blocked:
            return
        held = sum(len(record.value or b"") for buffer in self._buffers.values() for record in buffer)
        stalled = [p for p, seconds in self._blocked.items() if seconds > STALL_SECONDS or held > BUFFER_BYTES]
        if stalled:
            log.warning("labels_stalled", partitions=stalled, held_bytes=held)
            self._stalled.update(stalled)

    def _poll(self) -> _Polled:
        # Partitions that are ahead are not paused: in kafka-python 3.0.12 a partition that was paused with records in
        # hand can stay without records for ever after it is resumed.
        started = self._clock()
        # A rank must not wait for records that do not exist yet while others have some.
        waiting = self._idle or self._group.ranks == 1 or not self._at_end.issuperset(self._assignment)
        try:
            polled = self._consumer.poll(timeout_ms=50 if waiting else 0)
            # No high-water mark until the first fetch of the partition has come back.
            ends = {p: max(self._ends[p], self._consumer.highwater(tp) or 0) for p, tp in self._assignment.items()}
            at_end = [p for p, tp in self._assignment.items() if self._consumer.position(tp) >= ends[p]]
        except (OffsetOutOfRangeError, LogTruncationError) as error:
            raise OffsetsGoneError(
                f"{error}: retention has overtaken the trainer, or the topic was cut or made anew. Started again, the "
                "trainer says how many labels are lost and goes on behind them, or says what it would need"
            ) from error
        now = self._clock()
        return _Polled([record for records in polled.values() for record in records], ends, at_end, now, now - started)

    def _exchanged(self, mine: _Polled) -> list[_Polled]:
        """What all ranks have polled, in rank order."""
        if self._group.ranks == 1:
            return [mine]
        mine.records = [Original.of(record) for record in mine.records]
        return [msgspec.msgpack.decode(one, type=_Shared) for one in self._group.gather(msgspec.msgpack.encode(mine))]

    def _merge(self, size: int) -> None:
        while len(self._pending) < size and all(self._ready(p) for p in self._buffers):
            heads = [(buffer[0].timestamp, p) for p, buffer in self._buffers.items() if buffer]
            if not heads:
                return
            self._pending.append(self._buffers[min(heads)[1]].popleft())

    def _cut(self) -> list[Any]:
        # Records may have become pending at different times. In merge order, a batch follows from which it holds.
        batch, self._pending = in_merge_order(self._pending), []
        for record in batch:
            self.positions[record.partition] = record.offset + 1
        return batch

    def _ready(self, p: int) -> bool:
        """Whether the partition's next record is in the buffer, does not exist yet, or is no longer waited for."""
        return bool(self._buffers[p]) or p in self._stalled or p in self._at_end

    def _drained(self) -> bool:
        return all(not buffer and self._ready(p) for p, buffer in self._buffers.items())
