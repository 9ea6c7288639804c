"""A role that is told to stop does, whatever Faust's consumer does not answer any more."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any

import pytest
from aiokafka.errors import IllegalStateError
from faust.types import TP
from kafka import TopicPartition

from streams import metrics
from streams import role as role_module
from streams.faust_app import show_errors
from streams.kafka import consumer
from streams.role import PartitionState, Role
from streams.settings import KafkaSettings, Settings
from streams.topics import full_name
from tests.integration.pipeline import until


class Idle(Role[PartitionState]):
    def new_partition(self, now: float) -> PartitionState:
        return PartitionState(self._sources.values(), now)

    def ready(self) -> bool:
        return True

    async def take(self, number: int, partition: PartitionState, source: str, message: Any) -> None:
        raise AssertionError("nothing is sent")

    async def advance(self, number: int, partition: PartitionState, now: float, idle: set[str]) -> None:
        pass


async def test_the_position_of_a_partition_that_has_just_gone_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    role = Idle("idle", ("recalls",), Settings(), metrics.Health(), lambda error: None)

    async def position(tp: TP) -> int | None:
        raise IllegalStateError(f"Partition {tp} is not assigned")

    monkeypatch.setattr(role.app.consumer, "position", position)
    assert await role._position(TP("recalls", 0)) is None


@pytest.mark.kafka
async def test_what_ends_a_part_of_faust_ends_the_role_and_is_told(
    kafka_settings: KafkaSettings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failures: list[BaseException] = []
    role = Idle("idle", ("recalls",), Settings(kafka=kafka_settings), metrics.Health(), failures.append)
    errors = {name: logging.getLogger(name).handlers[:] for name in ("faust", "mode", "streams")}
    show_errors()
    try:
        await role.start()
        await until("partitions", lambda: bool(role.partitions))

        async def broken(*_: Any, **__: Any) -> Any:
            raise ValueError("a fetch that Faust did not foresee")

        monkeypatch.setattr(role.app.consumer, "_wait_next_records", broken)
        await until("the failure", lambda: bool(failures))
    finally:
        await role.stop()
        for name, before in errors.items():
            logging.getLogger(name).handlers[:] = before
    assert isinstance(failures[0].__cause__, ValueError) and "did not foresee" in str(failures[0])
    assert "did not foresee" in capsys.readouterr().err


@pytest.mark.kafka
async def test_a_partition_without_a_position_ends_nothing(kafka_settings: KafkaSettings) -> None:
    """As in a rebalance that is slow: Faust looks at all partitions every other second."""
    failures: list[BaseException] = []
    role = Idle("idle", ("recalls",), Settings(kafka=kafka_settings), metrics.Health(), failures.append)
    await role.start()
    try:
        await until("partitions", lambda: bool(role.partitions))
        subscription = role.app.consumer._thread._ensure_consumer()._fetcher._subscriptions.subscription
        for tp in subscription.assignment.tps:
            state = subscription.assignment.state_value(tp)
            state.timestamp, state._position = time.monotonic() * 1000, None  # fetched a moment ago, and put out since
            role.app.consumer.verify_event_path(time.monotonic(), TP(tp.topic, tp.partition))
    finally:
        await role.stop()
    assert failures == [] and not role.app.crashed


@pytest.mark.kafka
async def test_a_stop_does_not_wait_for_a_consumer_that_has_stopped(
    kafka_settings: KafkaSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures: list[BaseException] = []
    role = Idle("idle", ("recalls", "feedback"), Settings(kafka=kafka_settings), metrics.Health(), failures.append)
    await role.start()
    await until("partitions", lambda: bool(role.partitions))
    # Nothing was read, so every look at the lag asks the consumer's thread for a position. Faust drops a question that
    # comes as the thread ends, which cannot be timed from here.
    asked = asyncio.Event()

    async def position(tp: TP) -> int | None:
        asked.set()
        await asyncio.Event().wait()
        return None

    monkeypatch.setattr(role.app.consumer, "position", position)
    await asyncio.wait_for(asked.wait(), 60)
    await asyncio.wait_for(role.stop(), 60)
    assert failures == []


@pytest.mark.kafka
async def test_a_stop_does_not_wait_for_a_group_that_has_put_the_role_out(
    kafka_settings: KafkaSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(role_module, "FLUSH", 0.5)
    failures: list[BaseException] = []
    role = Idle("out", ("recalls",), Settings(kafka=kafka_settings), metrics.Health(), failures.append)
    await role.start()
    await until("partitions", lambda: bool(role.partitions))
    lease, acknowledged = role.app.transport.lease, asyncio.Event()
    monkeypatch.setattr(lease, "held", lambda: lease._over)  # whatever heartbeats say
    await role.publisher.send("labels", b"user", b"unsent", then=acknowledged.set, partition=0)
    await asyncio.wait_for(role.stop(), 60)
    assert failures == [] and not acknowledged.is_set()
    with consumer(kafka_settings) as reader:
        tp = TopicPartition(full_name(kafka_settings, "labels"), 0)
        assert reader.end_offsets([tp])[tp] == 0
