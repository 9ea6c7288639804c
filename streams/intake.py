"""Batches of raw records out of Faust's consumer, and offsets back into it: the one place that reaches inside Faust.

Faust gives agents one event at a time, through conductor, channel, queue and stream, which costs some 100 us each: a
core does 7 to 10 thousand a second. Here the consumer hands over what a fetch brought, a batch a partition, and takes
the offsets to commit from whoever works on them. Faust keeps what it is good at: the group, rebalances, the consumer's
own thread with its heartbeats, the committing task, the producer, the life of all these services.

Six of its defects are worked around by the way:

- ``_new_offset`` commits past a message in flight (a test shows it): ``Intake.committable`` decides instead;
- a partition without a committed offset is not sought anywhere by ``perform_seek``: here to its beginning;
- what a fetch brings while a rebalance ends is thrown away, although it came from behind the new seek and the consumer
  has moved past it: ``_Consumer._begun`` waits;
- its producer is not idempotent, so a retry writes twice what a broker that died had taken: ``_Producer``;
- its producer goes on when the group has put the process out: ``streams.lease``;
- a commit carries no metadata: here it carries what the owner of the partition says (as Kafka Streams does with its
  stream time), and the next owner is given it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import structlog
from aiokafka.consumer.fetcher import OffsetResetStrategy
from aiokafka.errors import IllegalStateError, KafkaError
from aiokafka.structs import OffsetAndMetadata, TopicPartition
from faust.transport.drivers import aiokafka as driver
from faust.types import TP

from streams.lease import LOOK_AGAIN, Lease, drop_unsent, send_while_held

log = structlog.get_logger()

FETCH_MIN_BYTES = 256 * 1024
"""Records that trickle in are fetched together: one by one they cost more than what is done with them."""
FETCH_MAX_WAIT_MS = 50
"""But no record waits longer for others, nor for a fetch that waits and leaves out a partition that was just drained;
Faust's 1500 would be a label's delay on a quiet topic."""


class Intake(Protocol):
    """Who works on the records. All calls come from the event loop of the app."""

    def revoked(self) -> None:
        """A rebalance begins: from here on nothing of the old assignment may be sent or acknowledged."""

    def begin(self, committed: Mapping[TP, str]) -> None:
        """Reading begins at the committed offsets of these partitions. Values: the metadata that was committed."""

    async def received(self, tp: TP, records: Sequence[Any]) -> None:
        """Records of one partition, in order (aiokafka's ConsumerRecord: offset, timestamp in ms, key, value, headers).

        Nothing more is read until it returns. It may be cancelled at an await, when a rebalance begins.
        """

    def committable(self, tp: TP) -> tuple[int, str] | None:
        """Next offset to read after a restart, and metadata to go with it; None when there is none yet."""


class _Thread(driver.AIOKafkaConsumerThread):  # type: ignore[misc]
    """The consumer's thread: reads and writes the metadata of commits, and counts its own processor time."""

    cpu_seconds = 0.0
    epoch = 0
    """Counts the seeks to what was committed."""
    fetched_epoch = 0
    """Of the last fetch. Records of an epoch before the present one are stale: they will be fetched again."""

    def _create_worker_consumer(self, transport: Any) -> Any:
        consumer = super()._create_worker_consumer(transport)
        consumer._fetch_max_wait_ms = FETCH_MAX_WAIT_MS
        consumer._fetch_min_bytes = FETCH_MIN_BYTES
        consumer._isolation_level = "read_committed"  # as all other readers
        return consumer

    async def _fetch_records(self, *args: Any, **kwargs: Any) -> Any:
        records = await super()._fetch_records(*args, **kwargs)
        self.fetched_epoch = self.epoch
        self.cpu_seconds = time.thread_time()
        return records

    async def seek_with_metadata(self) -> tuple[int, dict[TP, tuple[int | None, str]]]:
        """Seek every assigned partition to its committed offset, else to its beginning.

        Returns the epoch that begins, and offset and metadata as they were committed.
        """
        found: tuple[int, dict[TP, tuple[int | None, str]]] = await self.call_thread(self._seek_with_metadata)
        return found

    async def _seek_with_metadata(self) -> tuple[int, dict[TP, tuple[int | None, str]]]:
        consumer = self._ensure_consumer()
        await self.transport.lease.keep_by(consumer._coordinator)
        assigned = sorted(consumer.assignment())
        # AIOKafkaConsumer.committed throws the metadata away.
        committed = await consumer._coordinator.fetch_committed_offsets(assigned)
        found: dict[TP, tuple[int | None, str]] = {}
        unknown = []
        # No await from here on: a fetch sees all of the seek or nothing of it.
        self.epoch += 1
        for tp in consumer.assignment() & set(assigned):
            offset, metadata = committed.get(tp, (-1, ""))
            if offset >= 0:
                consumer._fetcher.seek_to(tp, offset)
            else:
                unknown.append(tp)
            found[TP(tp.topic, tp.partition)] = (offset if offset >= 0 else None, metadata or "")
        if unknown:
            consumer._fetcher.request_offset_reset(unknown, OffsetResetStrategy.EARLIEST)
        return self.epoch, found

    async def _commit(self, offsets: Mapping[TP, tuple[int, str]]) -> bool:
        consumer = self._ensure_consumer()
        mine = {
            TopicPartition(tp.topic, tp.partition): OffsetAndMetadata(offset, metadata)
            for tp, (offset, metadata) in offsets.items()
            if tp in self.assignment()
        }
        try:
            if mine:
                await consumer.commit(mine)
        except (KafkaError, IllegalStateError) as error:
            # A rebalance came first, or the coordinator is away: what is uncommitted is committed next time, or read
            # again by whoever owns it then. Faust would crash the consumer on some of these.
            log.warning("commit failed", error=repr(error))
            return False
        return bool(mine)


class _Consumer(driver.Consumer):  # type: ignore[misc]
    """Faust's consumer, handing batches to an ``Intake``."""

    _thread: _Thread
    in_hand = False
    """Records are fetched that are not handed over yet: positions are ahead of what the intake has."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._intake: Intake = self.transport.intake
        self._epoch = 0
        self._known_committed: dict[TP, int] = {}

    def _new_consumer_thread(self) -> _Thread:
        return _Thread(self, loop=self.loop, beacon=self.beacon)

    def verify_event_path(self, now: float, tp: TP) -> None:
        """Faust looks for livelocks here, and its consumer ends when a partition has no position yet, as in a slow
        rebalance. Requests stay unacknowledged for their whole window on purpose, and streams/liveness.py watches."""

    async def on_partitions_revoked(self, revoked: set[TP]) -> None:
        # Before Faust flushes its producer: what was sent is durable before another worker reads the partition.
        self._intake.revoked()
        flushing = asyncio.ensure_future(self._hand_over(revoked))
        try:
            while not flushing.done():
                drop_if_put_out(self.app)
                await asyncio.wait({flushing}, timeout=LOOK_AGAIN)
        finally:
            flushing.cancel()
        self.transport.lease.end()
        await flushing

    async def _hand_over(self, revoked: set[TP]) -> None:
        await super().on_partitions_revoked(revoked)
        await flush(self.app)

    async def on_partitions_assigned(self, assigned: set[TP], generation_id: int = 0) -> None:
        await super().on_partitions_assigned(assigned, generation_id)
        if not assigned:
            self._intake.begin({})  # Faust seeks nothing then; a worker too many is ready all the same

    async def perform_seek(self) -> None:
        self._epoch, found = await self._thread.seek_with_metadata()
        self._known_committed = {tp: offset for tp, (offset, _) in found.items() if offset is not None}
        self._intake.begin({tp: metadata for tp, (_, metadata) in found.items()})

    async def _drain_messages(self, fetcher: Any) -> None:
        try:
            while not (self._stopped.is_set() or fetcher._stopped.is_set()):
                await asyncio.sleep(0)  # or fetches that return at once would never let anybody else run
                records, _ = await self._wait_next_records(timeout=1.0)
                self.in_hand = bool(records)
                epoch = self._thread.fetched_epoch
                if records and await self._begun(epoch, fetcher):
                    for tp, batch in records.items():
                        if not self.flow_active or self._thread.epoch != epoch:
                            break
                        mine = TP(tp.topic, tp.partition)
                        await self.wait_first(self._intake.received(mine, batch), self.suspend_flow.wait())
                self.in_hand = False
        except self.consumer_stopped_errors:
            if not self.app.should_stop:
                raise

    async def _begun(self, epoch: int, fetcher: Any) -> bool:
        """Wait until records that were fetched in ``epoch`` may be handed over; False when they will come again.

        A fetch outlives the rebalance that it was begun before. What it brings from behind the new seek comes once
        only, be the rest of the rebalance done here or not.
        """
        while not (self.flow_active and self._epoch == epoch):
            if self._thread.epoch != epoch or self._stopped.is_set() or fetcher._stopped.is_set():
                return False
            await asyncio.sleep(0.01)
        return True

    def _filter_tps_with_pending_acks(self, topics: Any = None) -> Iterable[TP]:
        assigned: set[TP] = self.assignment()
        return assigned

    def _new_offset(self, tp: TP) -> int | None:
        found = self._intake.committable(tp)
        return None if found is None else found[0]

    def _should_commit(self, tp: TP, offset: int) -> bool:
        return offset > self._known_committed.get(tp, -1)

    async def _commit(self, offsets: Mapping[TP, int]) -> bool:
        # Metadata as of now: newer than the offsets is right too, since it is about what is done. Partitions that have
        # gone while Faust flushed have none to give: their next owner is to find what was committed last.
        known = {tp: found[1] for tp in offsets if (found := self._intake.committable(tp)) is not None}
        done: bool = await self._thread.commit({tp: (offsets[tp], metadata) for tp, metadata in known.items()})
        if done:
            self._known_committed.update({tp: offsets[tp] for tp in known})
        return done


class _Producer(driver.Producer):  # type: ignore[misc]
    """Faust's producer, whose retries make no doubles (Faust asks for that with its own transactions only), and which
    sends for partitions that are its group's to write, or not at all."""

    def _settings_extra(self) -> Mapping[str, Any]:
        return {"acks": "all", "enable_idempotence": True}

    def _new_producer(self, transactional_id: str | None = None) -> Any:
        producer = super()._new_producer(transactional_id)
        send_while_held(producer, self.transport.lease)
        return producer


class BatchTransport(driver.Transport):  # type: ignore[misc]
    """A Faust transport whose consumer feeds ``intake``."""

    Consumer = _Consumer
    Producer = _Producer

    def __init__(self, urls: Any, app: Any, intake: Intake) -> None:
        super().__init__(urls, app)
        self.intake = intake
        self.lease = Lease(app.conf.broker_session_timeout)


def subscribe(app: Any, topic: Any, intake: Intake) -> None:
    """Let ``app`` (a Faust app) feed ``intake`` with the records of ``topic`` (a Faust topic, of one or more names)."""
    app.transport = BatchTransport(app.conf.broker_consumer, app, intake)
    app.topics.add(topic)


async def flush(app: Any) -> None:
    """Wait until nothing is left to send. Faust and aiokafka wait for what is there when they are asked: who waits for
    room meanwhile, with a record of partitions that go, would send it when they are another's."""
    if (producer := app.producer._producer) is not None:
        accumulator = producer._message_accumulator
        while accumulator._batches or accumulator._pending_batches:
            await producer.flush()
            await asyncio.sleep(0)


def drop_if_put_out(app: Any) -> None:
    """Where the partitions of ``app`` may be another's already, what was not sent yet is for their owner."""
    if not app.transport.lease.held() and app.producer._producer is not None:
        log.warning("put out of the group: what was not sent yet is for the next owner", group=app.conf.id)
        drop_unsent(app.producer._producer)


def send_the_rest(app: Any) -> None:
    """``app`` stops: what is left is sent whatever comes, or its producer would wait for a group that it has left."""
    drop_if_put_out(app)
    app.transport.lease.end(for_good=True)


def fetch_seconds(app: Any) -> float:
    """Processor time that the consumer's thread of ``app`` has taken: fetching, decompressing, checking."""
    seconds: float = app.consumer._thread.cpu_seconds
    return seconds
