"""State as a view of compacted topics: read from the beginning, then kept current.

All state that must survive a process (item vectors, profiles, anchors, calibrations) is a compacted topic, and this is
the one way to read it. ``fetch`` blocks on the network and touches no state, so it may run in a thread;
``apply`` runs the handlers and belongs to the thread that owns the state.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any

import structlog
from kafka import TopicPartition
from kafka.errors import KafkaError, KafkaTimeoutError

from streams import metrics
from streams.kafka import consumer
from streams.settings import KafkaSettings
from streams.topics import full_name

log = structlog.get_logger()

FETCH_BYTES = 2**20
"""Fetched of a partition at a time. A batch over it comes whole and alone; responses of many MiB make the allocator ask
the system for fresh pages each time, a third of the time of reading."""

Handler = Callable[[Any], None]
"""Takes one kafka ConsumerRecord (topic, partition, offset, timestamp, key, value, headers)."""


class TopicMissingError(ValueError):
    """A topic that must be there is not."""


class LogView:
    """Follows whole topics, or chosen partitions of them, outside any consumer group.

    ``handlers``: topic name without prefix -> handler. Raises TopicMissingError when a topic does not exist.
    """

    def __init__(
        self,
        kafka: KafkaSettings,
        handlers: Mapping[str, Handler],
        partitions: Iterable[int] | None = None,
    ) -> None:
        self._handlers = {full_name(kafka, name): handler for name, handler in handlers.items()}
        self._prefix = full_name(kafka, "")
        self._consumer = consumer(kafka, max_poll_records=2000, max_partition_fetch_bytes=FETCH_BYTES)
        chosen = None if partitions is None else set(partitions)
        assignment = []
        for topic in self._handlers:
            found = self._consumer.partitions_for_topic(topic)
            if not found:
                raise TopicMissingError(f"topic {topic} does not exist; `gpl topics create` makes it")
            assignment += [TopicPartition(topic, p) for p in sorted(found) if chosen is None or p in chosen]
        self._consumer.assign(assignment)
        if assignment:
            self._consumer.seek_to_beginning(*assignment)
        self._assignment = assignment
        self.ready = False
        self._stopped = self._look_again = False
        # Caught up means: everything that was there when the view was opened has been applied.
        self._goal: dict[Any, int] = self._consumer.end_offsets(assignment) if assignment else {}
        self._applied: dict[Any, int] = dict(self._consumer.beginning_offsets(assignment)) if assignment else {}

    def fetch(self, timeout: float = 0.5) -> list[Any]:
        """Records that have come, waiting up to ``timeout`` seconds for the first. Safe to run in a thread."""
        if not self._assignment:
            return []
        batches = self._consumer.poll(timeout_ms=int(timeout * 1000))
        return [record for batch in batches.values() for record in batch]

    def apply(self, records: Iterable[Any]) -> None:
        """Run the handlers over fetched records, in order. A record that its handler cannot use is passed over."""
        for record in records:
            try:
                self._handlers[record.topic](record)
            except (ValueError, OverflowError) as error:  # msgspec's errors of decoding are ValueErrors too
                metrics.STATE_RECORDS_SKIPPED.labels(record.topic.removeprefix(self._prefix)).inc()
                log.error(
                    "record passed over",
                    topic=record.topic,
                    partition=record.partition,
                    offset=record.offset,
                    error=str(error),
                )
            self._applied[TopicPartition(record.topic, record.partition)] = record.offset + 1

    def caught_up(self) -> bool:
        """Whether all that was in the topics when the view was opened has been applied."""
        behind = [tp for tp, goal in self._goal.items() if self._applied[tp] < goal]
        # A compacted or aborted tail has no record at goal - 1; the consumer's position tells that it was passed.
        return all(self._consumer.position(tp) >= self._goal[tp] for tp in behind)

    def positions(self, name: str) -> dict[int, int]:
        """Next offset to apply, per partition of a topic."""
        return {tp.partition: at for tp, at in sorted(self._applied.items()) if tp.topic == self._prefix + name}

    def refresh_goal(self) -> None:
        """Set the goal of ``caught_up`` to the present end of the topics."""
        if self._assignment:
            self._goal = self._consumer.end_offsets(self._assignment)

    def warm_up(self, timeout: float = 120.0) -> None:
        """Fetch and apply until caught up. Raises KafkaTimeoutError after ``timeout`` seconds."""
        deadline = time.monotonic() + timeout
        while not self.caught_up():
            if time.monotonic() > deadline:
                raise KafkaTimeoutError(f"{sorted(self._handlers)} could not be read to their end in {timeout:.0f} s")
            self.apply(self.fetch(0.2))

    async def follow(self, applied: Callable[[], Awaitable[None]] | None = None) -> None:
        """Keep current until ``stop``, then close; ``applied`` runs after each round. Sets ``ready`` once caught up."""
        try:
            while not self._stopped:
                records = await asyncio.to_thread(self.fetch, 0.25)
                self.apply(records)
                if self._look_again:
                    self._look_again = False
                    try:
                        await asyncio.to_thread(self.refresh_goal)
                    except KafkaError as error:
                        log.warning("the end of the topics is not known", error=repr(error))
                        self._look_again = True
                if not self.ready and not self._look_again:
                    self.ready = self.caught_up()
                if applied is not None:
                    await applied()
        finally:
            self.close()

    def look_again(self) -> None:
        """Be not ``ready`` until ``follow`` has applied all that is in the topics by now."""
        self.ready, self._look_again = False, True

    def drop(self, name: str) -> None:
        """Follow a topic no longer. To be called by a handler or by ``applied``, not beside a fetch."""
        kept = [tp for tp in self._assignment if tp.topic != self._prefix + name]
        positions = {tp: self._consumer.position(tp) for tp in kept}
        self._consumer.assign(kept)
        for tp, position in positions.items():
            self._consumer.seek(tp, position)
        self._assignment = kept
        self._goal = {tp: goal for tp, goal in self._goal.items() if tp in kept}

    def stop(self) -> None:
        """Make ``follow`` return after its present round."""
        self._stopped = True

    def close(self) -> None:
        self._consumer.close()
