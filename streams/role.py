"""What the Faust roles have in common: partitions that come and go, raw records in, a tick, liveness by progress.

A role subclasses ``Role`` with its own ``PartitionState``. State is dropped at every rebalance and rebuilt from the
log, since Faust then reads every partition, kept ones too, from its committed offset.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Generic, TypeVar

import structlog
from aiokafka.errors import KafkaError as ConsumerError
from faust.types import TP
from kafka import TopicPartition
from kafka.errors import KafkaError

from streams import metrics
from streams.contracts import Feedback, Recall, under_its_user
from streams.dead_letters import Guard, Halted, Original, Refused
from streams.faust_app import REFUSALS, OrderedAcks, Publisher, make_app, raw_topic
from streams.intake import flush, send_the_rest, subscribe
from streams.liveness import GroupWatch
from streams.log_view import Handler, LogView
from streams.settings import Settings
from streams.topics import full_name

log = structlog.get_logger()

WATCH = 5.0
"""Seconds between two looks at what the broker says of this consumer."""
FLUSH = 10.0
"""Seconds that a stop waits for a broker that does not take what was sent."""
QUIET = 1.0
"""Seconds without a record after which the consumer is asked how far it is."""
TICK = 0.1
"""Seconds between looks at idle partitions and finished warm-ups."""
STANDSTILL = 1.0
"""Seconds between two looks in which the process was stopped, or starved; what came meanwhile is not fetched yet."""


class PartitionState:
    """What is known of one partition number of the role's source topics."""

    def __init__(self, sources: Iterable[str], now: float) -> None:
        names = list(sources)
        self.acks = {source: OrderedAcks() for source in names}
        self.next_offset: dict[str, int] = {}
        self.last_arrival: dict[str, float] = dict.fromkeys(names, now)
        self.paused: str | None = None
        """The source that is not read at present, for want of memory."""
        # What the owner before committed with its offsets, by source.
        self.metadata: dict[str, str] = {}
        # One coroutine at a time works on a partition.
        self.lock = asyncio.Lock()

    def to_commit(self) -> str:
        """What the next owner is to know beside the offsets."""
        return ""

    def revoke(self) -> None:
        """Another worker, or another generation of this one, owns the partition now."""
        for acks in self.acks.values():
            acks.revoke()


P = TypeVar("P", bound=PartitionState)


class Role(Generic[P]):
    """A consumer group over one or more co-partitioned topics. ``on_failure`` stops the process."""

    writes_dead_letters = True
    """Of the roles that read a topic, one writes its dead letters; the others pass a bad record over."""
    judges_on_arrival = True
    """``take`` knows whether a record can be used. A role that finds out later tells its guard itself."""

    def __init__(
        self,
        name: str,
        sources: tuple[str, ...],
        settings: Settings,
        health: metrics.Health,
        on_failure: Callable[[BaseException], None],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.name = name
        self.settings = settings
        self.health = health
        self.clock = clock
        self.app = make_app(settings.kafka, name)
        self.publisher = Publisher(self.app, settings.kafka, on_failure)
        self.guard = Guard(settings.dead_letters)
        self.halted = False
        self.state_ready = False
        """The state topics have been read to what was their end when the partitions were assigned."""
        self._state: LogView | None = None
        self.partitions: dict[int, P] = {}
        self._on_failure = on_failure
        self._sources = {full_name(settings.kafka, source): source for source in sources}
        self._tasks: set[asyncio.Task[None]] = set()
        self._stopped = False
        # From here on: a process that answers before its roles have begun is not ready, and may stall as it begins.
        health.wait_for(name)
        health.beat(name)
        self._ticked = self._awake_since = clock()
        self._worked = time.process_time()
        self._stepped = self._received = self._ticked
        self._busy_since: float | None = None
        self._batch: asyncio.Task[Any] | None = None
        subscribe(self.app, raw_topic(self.app, settings.kafka, *sources), self)

    own_state: tuple[str, ...] = ()
    """State topics that only this role writes: once they are read, what comes on them is known here already."""

    # --- what a role defines ------------------------------------------------------------------------------------

    def new_partition(self, now: float) -> P:
        """Fresh state for a partition that was just assigned."""
        raise NotImplementedError

    def assigned(self, numbers: list[int]) -> None:
        """The role now owns these partitions; their state is fresh."""

    def state_handlers(self) -> dict[str, Handler]:
        """State topic -> handler of its records in the partitions just assigned. None by default."""
        return {}

    def ready(self) -> bool:
        """Whether what the role needs from elsewhere is loaded."""
        raise NotImplementedError

    async def take(self, number: int, partition: P, source: str, message: Any) -> None:
        """One record. Raises one of ``REFUSALS`` for a record that belongs in the dead letters."""
        raise NotImplementedError

    async def taken(self, number: int, partition: P, source: str, newest_kafka_ms: int) -> None:
        """All records of a batch were taken: the moment for what is better done once than for each."""

    async def advance(self, number: int, partition: P, now: float, idle: set[str]) -> None:
        """Time has passed. ``idle``: sources at their end; for how long is told by `quiet_for`."""
        raise NotImplementedError

    async def advanced(self, now: float) -> None:
        """``advance`` was called for every partition."""

    def check_time(self, ts: int, message: Any) -> None:
        """Refuse an event from the future: one such event would move the watermark past everything."""
        ahead, allowed = (ts - message.timestamp) / 1000, self.settings.labels.max_ahead_seconds
        if ahead > allowed:
            raise Refused(
                "future", f"ts: {ts} is {ahead:.0f} s ahead of its Kafka timestamp, {allowed:.0f} s are allowed"
            )

    def check_key(self, record: Recall | Feedback, message: Any) -> None:
        """Refuse what is not under its user's key: it is in any partition, away from what it joins."""
        if not under_its_user(message.key, record):
            raise Refused("key", f"user_id: {record.user_id!r} came under the key {message.key!r}")

    async def refuse(self, original: Original, error: Exception, done: Callable[[], None]) -> None:
        """Give a record up to the dead letters; ``done`` acknowledges it. Raises Halted: it was one too many.

        A role that does not write the dead letters of its topic counts them all the same: it must not run past what
        the role that does has halted at.
        """
        self.guard.refused(original.topic, original.partition, original.offset, error)
        if self.writes_dead_letters:
            await self.publisher.dead_letter(original, error, done)
        else:
            done()

    def owns(self, number: int, partition: P) -> bool:
        """Whether ``partition`` is still this worker's to write for: to be asked before a send after an await."""
        return not self._stopped and self.partitions.get(number) is partition

    def halt(self, why: Halted) -> None:
        """Work no more and say so. What is unacknowledged is read again after a restart, so nothing is lost."""
        if not self.halted:
            self.halted = True
            self.health.halt(self.name, str(why))
            log.error("halted", role=self.name, why=str(why))

    # --- life ---------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Join the group and begin to work."""
        await self.app.start()
        self.spawn(self._tick_forever())
        self.spawn(self._watch_forever())

    async def stop(self) -> None:
        """Leave the group. What is unacknowledged is read again by the next owner."""
        self._stopped = True
        self._forget_state()
        for partition in self.partitions.values():
            async with partition.lock:
                partition.revoke()
        # What was sent is in the log before another worker reads it back.
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(flush(self.app), FLUSH)
        send_the_rest(self.app)
        await self.app.stop()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run a coroutine beside the role; its failure is the process's failure."""
        task = asyncio.ensure_future(work)
        self._tasks.add(task)

        def finished(done: asyncio.Task[None]) -> None:
            self._tasks.discard(done)
            if not self._stopped and not done.cancelled() and (error := done.exception()) is not None:
                self._on_failure(error)

        task.add_done_callback(finished)
        return task

    # --- what the intake calls ----------------------------------------------------------------------------------

    def revoked(self) -> None:
        for number, partition in self.partitions.items():
            partition.revoke()
            for source in self._sources.values():
                metrics.CONSUMER_LAG.remove(source, str(number))  # whoever reads it next tells
        self.partitions = {}
        self._forget_state()

    def begin(self, committed: Mapping[TP, str]) -> None:
        self.revoked()
        now = self.clock()
        numbers = sorted({tp.partition for tp in committed})
        self.guard = Guard(self.settings.dead_letters)  # what was not acknowledged is counted anew
        self.partitions = {number: self.new_partition(now) for number in numbers}
        for tp, metadata in committed.items():
            self.partitions[tp.partition].metadata[self._sources[tp.topic]] = metadata
        self.assigned(numbers)
        if handlers := self.state_handlers():
            self.spawn(self._follow_state(handlers, numbers))

    def committable(self, tp: TP) -> tuple[int, str] | None:
        partition = self.partitions.get(tp.partition)
        if partition is None:
            return None
        offset = partition.acks[self._sources[tp.topic]].committable
        return None if offset is None else (offset, partition.to_commit())

    async def received(self, tp: TP, records: Sequence[Any]) -> None:
        partition = self.partitions.get(tp.partition)
        if partition is None or self.halted:
            return  # halted: what is not taken stays in the log, and polling goes on or the group would let us go
        source = self._sources[tp.topic]
        self._received = self._busy_since = self.clock()
        self._batch = asyncio.current_task()
        try:
            await self._take_all(tp.partition, partition, source, records)
            await self.taken(tp.partition, partition, source, records[-1].timestamp)
        except Halted as why:
            self.halt(why)
        except Exception as error:
            self._on_failure(error)
            raise
        finally:
            self._busy_since = None

    def at_work(self) -> None:
        """A step of the batch in hand, or of the tick, is done: each by itself, a long one is no standstill."""
        if self._busy_since is not None and asyncio.current_task() is self._batch:
            self._busy_since = self.clock()
        else:
            self._stepped = self.clock()

    def working_since(self, then: float) -> bool:
        """Whether the tick, and the batch in hand if there is one, have made a step after ``then`` (of ``clock``)."""
        return max(self._ticked, self._stepped) > then and (self._busy_since is None or self._busy_since > then)

    async def _take_all(self, number: int, partition: P, source: str, records: Sequence[Any]) -> None:
        acks, taken = partition.acks[source], 0
        partition.last_arrival[source] = self.clock()
        for message in records:
            if not acks.add(message.offset):
                continue
            try:
                if message.value is None and source != "items":
                    items = full_name(self.settings.kafka, "items")
                    raise Refused("invalid", f"value: null; only {items} takes a null value")
                await self.take(number, partition, source, message)
                taken += 1
            except REFUSALS as error:
                await self.refuse(Original.of(message), error, partial(acks.done, message.offset))
            else:
                if self.judges_on_arrival:
                    self.guard.accepted(message.topic, number)
            partition.next_offset[source] = message.offset + 1
            self.at_work()
        metrics.EVENTS.labels(source).inc(taken)

    def _forget_state(self) -> None:
        self.state_ready = False
        if self._state is not None:
            self._state.stop()
            self._state = None

    async def _follow_state(self, handlers: dict[str, Handler], numbers: list[int]) -> None:
        partitions = self.partitions
        state = await asyncio.to_thread(LogView, self.settings.kafka, handlers, numbers)
        if self.partitions is not partitions or self._stopped:  # another rebalance came first
            state.close()
            return

        async def known() -> None:
            if state.ready and state is self._state and not self.state_ready:
                for topic in self.own_state:
                    state.drop(topic)
                self.state_ready = True

        self._state = state
        await state.follow(known)

    async def _tick_forever(self) -> None:
        while not self._stopped:
            await asyncio.sleep(TICK)
            try:
                await self._tick()
            except Halted as why:
                self.halt(why)

    async def _tick(self) -> None:
        if self.app.crashed:
            # What died is some part of Faust's that nobody waits for; no role would notice before it stalls.
            raise RuntimeError(f"Faust ended: {self.app.crash_reason!r}") from self.app.crash_reason
        if self.ready():
            self.health.done(self.name)
        now = self.clock()
        worked = time.process_time()
        if now - self._ticked - (worked - self._worked) > STANDSTILL:
            self._awake_since = now
        self._worked = worked
        for number, partition in list(self.partitions.items()):
            idle = set()
            for topic, source in self._sources.items():
                quiet = self.quiet_for(partition, source, now) > QUIET
                behind = await self._behind(topic, number, partition.next_offset.get(source), quiet)
                if behind is None or not self.owns(number, partition):
                    continue
                metrics.CONSUMER_LAG.labels(source, str(number)).set(behind)
                if source == partition.paused:
                    partition.last_arrival[source] = now  # not asked, so neither starved nor at its end
                    continue
                if behind == 0:
                    idle.add(source)
            if not self.halted:
                await self.advance(number, partition, now, idle)
        if not self.halted:
            await self.advanced(now)
        self._ticked = now

    def quiet_for(self, partition: P, source: str, now: float) -> float:
        """Seconds that a source has brought nothing although this process would have seen it."""
        return now - max(partition.last_arrival[source], self._awake_since)

    async def _watch_forever(self) -> None:
        """Beat while the broker confirms that this consumer is in its group and is given what is there."""
        watch = GroupWatch(self.settings.kafka, self.app.conf.id, self.app.conf.broker_client_id, topics=self._sources)
        stalled_after = self.settings.metrics.stalled_after_wall_seconds
        while not self._stopped:
            try:
                member, ends = await asyncio.to_thread(watch.look)
            except (KafkaError, OSError) as error:
                log.warning("broker does not answer", role=self.name, error=repr(error))
            else:
                now = self.clock()
                # While a batch is worked on, nobody takes what else is fetched.
                hands_full = self._busy_since is not None and self._received < now - stalled_after
                starved = [] if hands_full else await self._starved(ends, now - stalled_after)
                at_work = self.working_since(now - stalled_after)
                if member and at_work and not starved:
                    self.health.beat(self.name)
                else:
                    log.warning("no progress", role=self.name, member=member, at_work=at_work, starved=starved)
            await asyncio.sleep(min(WATCH, stalled_after / 4))
        await asyncio.to_thread(watch.close)

    async def _starved(self, ends: Mapping[Any, int], since: float) -> list[str]:
        """Partitions that have records which are not fetched, and of which nothing has come ``since``."""
        starved = []
        for number, partition in list(self.partitions.items()):
            for topic, source in self._sources.items():
                if self.halted or partition.last_arrival[source] > since:
                    continue
                position = await self._position(TP(topic, number))
                if position is None or position < ends.get(TopicPartition(topic, number), 0):
                    starved.append(f"{topic}[{number}]")
        return starved

    async def _behind(self, topic: str, number: int, next_offset: int | None, quiet: bool) -> int | None:
        """Records between what was processed and the end of the partition; None while that is not known.

        What is left of a ``quiet`` partition may be markers of transactions, which are never handed over.
        """
        tp = TP(topic, number)
        consumer = self.app.consumer
        highwater = consumer.highwater(tp) if tp in consumer.assignment() else None
        if highwater is None:
            return None
        if next_offset is None or (quiet and next_offset < highwater):
            position = await self._position(tp)
            if position is not None and not consumer.in_hand:
                next_offset = max(position, next_offset or 0)
        return None if next_offset is None else max(0, highwater - next_offset)

    async def _position(self, tp: TP) -> int | None:
        """Where the consumer reads next; None while that is not known.

        Faust answers from the consumer's thread, and never once that has stopped: without a limit a role that is
        stopped just then would wait for its tick for ever.
        """
        if self._stopped:
            return None
        try:
            position: int | None = await asyncio.wait_for(self.app.consumer.position(tp), WATCH)
        except (TimeoutError, ConsumerError):
            return None  # or the partition has just gone to somebody else
        return position
