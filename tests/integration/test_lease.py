"""What a producer sends while its process may have been put out of its group: nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace

import pytest
from aiokafka import AIOKafkaProducer
from aiokafka.producer.message_accumulator import MessageAccumulator
from kafka import TopicPartition

from streams.intake import flush
from streams.kafka import consumer
from streams.lease import Fenced, Lease, drop_unsent, send_while_held
from streams.settings import KafkaSettings
from streams.topics import full_name

SESSION = 10.0


class Group:
    """What a lease asks of a coordinator. ``answers``: what comes of the heartbeats, in turn."""

    def __init__(self, *answers: bool, during: Callable[[], None] = lambda: None) -> None:
        self._answers = list(answers)
        self._during = during

    async def _do_heartbeat(self) -> bool:
        self._during()
        return self._answers.pop(0)

    def reset_generation(self) -> None:
        """As aiokafka does when the coordinator says that this is no member."""


class Clock:
    now = 1000.0
    looks = 0

    def __call__(self) -> float:
        self.looks += 1
        return self.now

    async def looked_at(self, times: int) -> None:
        """Wait until the lease was asked for so many times more."""
        until = self.looks + times
        while self.looks < until:
            await asyncio.sleep(0.01)


async def test_a_lease_counts_from_when_an_answered_heartbeat_was_sent() -> None:
    clock = Clock()
    lease = Lease(SESSION, clock)
    assert lease.held(), "nothing is assigned, so nothing can be somebody else's"

    def slow() -> None:
        clock.now += 4

    group = Group(True, False, True, during=slow)
    await lease.keep_by(group)
    clock.now = 1000 + SESSION - 0.1
    assert lease.held()
    clock.now = 1000 + SESSION
    assert not lease.held(), "the broker may have counted from when it was sent"
    await group._do_heartbeat()
    assert not lease.held(), "refused"
    await lease.keep_by(group)  # a second assignment by the same coordinator
    assert lease.held() and group._answers == []
    group.reset_generation()
    assert not lease.held(), "put out before its time"
    lease.end()
    assert lease.held()
    await lease.keep_by(Group(False))
    assert not lease.held(), "assigned, but not known to be a member any more"
    lease.end(for_good=True)
    await lease.keep_by(Group(True))
    clock.now += SESSION
    assert lease.held(), "the process stops: there is nothing to wait for"


@pytest.mark.kafka
async def test_records_wait_for_the_lease_and_are_dropped_when_it_is_lost(
    kafka_settings: KafkaSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    lease, topic = Lease(SESSION, clock), full_name(kafka_settings, "labels")
    producer = AIOKafkaProducer(
        bootstrap_servers=kafka_settings.bootstrap_servers, enable_idempotence=True, acks="all", max_batch_size=2000
    )
    send_while_held(producer, lease)
    await producer.start()
    try:
        await lease.keep_by(Group(True))
        await producer.send_and_wait(topic, b"owned", partition=0)
        clock.now += SESSION
        waiting = await producer.send(topic, b"waits", partition=0)
        await asyncio.wait_for(clock.looked_at(5), 30)
        assert not waiting.done()
        await lease.keep_by(Group(True))
        await asyncio.wait_for(waiting, 30)
        clock.now += SESSION
        # One that waits in a batch, and one that waits for room.
        lost = await producer.send(topic, b"lost", partition=0)
        without_room = asyncio.ensure_future(producer.send(topic, b"x" * 1990, partition=0))
        await asyncio.wait_for(clock.looked_at(5), 30)
        assert not lost.done() and not without_room.done()
        drop_unsent(producer)
        lease.end()
        for dropped in (lost, without_room):
            with pytest.raises(Fenced):
                await asyncio.wait_for(dropped, 30)
        await asyncio.wait_for(producer.flush(), 30)
        # The broker finds no gap.
        await producer.send_and_wait(topic, b"later", partition=0)
        # One that is under way when the lease ends, comes back unwritten, and waits: it has its number already.
        await lease.keep_by(Group(True))
        stopped = asyncio.Event()
        ready = producer.client.ready

        async def stop_before_writing(*node: object, **options: object) -> object:
            clock.now += SESSION
            stopped.set()
            return await ready(*node, **options)

        monkeypatch.setattr(producer.client, "ready", stop_before_writing)
        numbered = await producer.send(topic, b"numbered", partition=0)
        await asyncio.wait_for(stopped.wait(), 30)
        monkeypatch.setattr(producer.client, "ready", ready)
        await asyncio.wait_for(clock.looked_at(5), 30)
        behind = asyncio.ensure_future(producer.send(topic, b"behind it", partition=0))
        await asyncio.wait_for(clock.looked_at(5), 30)
        assert not numbered.done() and not behind.done()
        drop_unsent(producer)
        for dropped in (numbered, behind):
            with pytest.raises(Fenced):
                await asyncio.wait_for(dropped, 30)
        await asyncio.wait_for(producer.flush(), 30)
        await lease.keep_by(Group(True))
        await asyncio.wait_for(producer.send_and_wait(topic, b"last", partition=0), 30)
    finally:
        await producer.stop()
    with consumer(kafka_settings) as reader:
        tp = TopicPartition(topic, 0)
        reader.assign([tp])
        reader.seek_to_beginning(tp)
        read: list[bytes] = []
        while reader.position(tp) < reader.end_offsets([tp])[tp]:
            read += [record.value for batch in reader.poll(500).values() for record in batch]
    assert read == [b"owned", b"waits", b"later", b"last"]


async def test_a_flush_takes_those_along_who_wait_for_room() -> None:
    partition, owned, sent = TopicPartition("labels", 0), True, []
    accumulator = MessageAccumulator(SimpleNamespace(leader_for_partition=lambda _: 1), 1000, 0, 40)
    producer = SimpleNamespace(flush=accumulator.flush, _message_accumulator=accumulator)
    app = SimpleNamespace(producer=SimpleNamespace(_producer=producer))

    async def publish() -> None:
        while owned:
            await accumulator.add_message(partition, b"u", b"x" * 400, 40)
            sent.append(len(sent))

    async def deliver() -> None:
        nodes, _ = accumulator.drain_by_nodes(set())
        await asyncio.sleep(0.01)  # those who waited go on
        for batch in nodes.get(1, {}).values():
            batch.done(base_offset=0)

    publishing = asyncio.ensure_future(publish())
    await asyncio.sleep(0.01)
    assert len(sent) == 2, "the third waits for room"
    owned = False
    flushing = asyncio.ensure_future(flush(app))
    await deliver()
    await asyncio.wait({flushing}, timeout=0.1)
    assert publishing.done() and len(sent) == 3 and not flushing.done()
    await deliver()
    await asyncio.wait_for(flushing, 30)
    assert not accumulator._batches
    await asyncio.wait_for(flush(SimpleNamespace(producer=SimpleNamespace(_producer=None))), 30)
