"""What is handed over to a role: all that was said, once, through rebalances and other people's transactions."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from faust.types import TP
from kafka import TopicPartition

from streams import metrics
from streams.faust_app import make_app, raw_topic
from streams.intake import subscribe
from streams.kafka import consumer, producer
from streams.liveness import GroupWatch
from streams.role import PartitionState, Role
from streams.settings import KafkaSettings, Settings
from streams.topics import full_name
from tests.integration.pipeline import until

RECORDS = 20


class Taken:
    """An intake that notes what it is given, and acknowledges nothing."""

    def __init__(self) -> None:
        self.begun = 0
        self.offsets: dict[TP, list[int]] = {}

    def revoked(self) -> None:
        self.offsets = {}

    def begin(self, committed: Mapping[TP, str]) -> None:
        self.begun += 1
        self.offsets = {tp: [] for tp in committed}

    async def received(self, tp: TP, records: Sequence[Any]) -> None:
        self.offsets[tp].extend(record.offset for record in records)

    def committable(self, tp: TP) -> tuple[int, str] | None:
        return None

    def all_read(self) -> bool:
        """Whether every record of every assigned partition came, once."""
        return bool(self.offsets) and all(came == list(range(RECORDS)) for came in self.offsets.values())


def reader(kafka: KafkaSettings) -> tuple[Any, Taken]:
    app, taken = make_app(kafka, "intake-test"), Taken()
    subscribe(app, raw_topic(app, kafka, "recalls", "feedback"), taken)
    return app, taken


@pytest.mark.kafka
async def test_a_fetch_that_outlives_a_rebalance_loses_nothing(
    kafka_settings: KafkaSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    with producer(kafka_settings) as out:
        for topic in ("recalls", "feedback"):
            for number in range(kafka_settings.partitions):
                for n in range(RECORDS):
                    out.send(full_name(kafka_settings, topic), value=b"%d" % n, partition=number)
        out.flush()
    (first, of_first), (second, of_second) = reader(kafka_settings), reader(kafka_settings)
    consumer = first.consumer
    getmany, perform_seek = consumer._getmany, consumer.perform_seek
    outlived: list[int] = []

    async def patient(active_partitions: set[TP] | None, timeout: float) -> Any:
        # Under way whenever a rebalance begins, whatever the moment.
        return await getmany(active_partitions=active_partitions, timeout=30.0)

    async def slow() -> None:
        await perform_seek()
        thread = consumer._thread
        if of_first.begun > 1:  # in the first there is nothing that could be outlived
            await until("a fetch from behind the new seek", lambda: thread.fetched_epoch == thread.epoch)
            outlived.append(thread.epoch)

    monkeypatch.setattr(consumer, "_getmany", patient)
    monkeypatch.setattr(consumer, "perform_seek", slow)
    await first.start()
    try:
        await until("all records at the first member", of_first.all_read)
        await second.start()
        try:
            await until("a rebalance", lambda: len(outlived) > 0)
            await until("all records at the first member again", of_first.all_read)
            await until("all records at the second member", of_second.all_read)
        finally:
            await second.stop()
    finally:
        await first.stop()


class Reader(Role[PartitionState]):
    """Notes what it takes, and which sources are at their end."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.values: list[bytes] = []
        self.idle: dict[int, set[str]] = {}
        self.quiet: list[float] = []

    def new_partition(self, now: float) -> PartitionState:
        return PartitionState(self._sources.values(), now)

    def ready(self) -> bool:
        return True

    async def take(self, number: int, partition: PartitionState, source: str, message: Any) -> None:
        self.values.append(message.value)

    async def advance(self, number: int, partition: PartitionState, now: float, idle: set[str]) -> None:
        self.idle[number] = idle
        self.quiet.append(self.quiet_for(partition, "recalls", now))


@pytest.mark.kafka
async def test_transactions_count_when_committed_and_their_markers_leave_nothing_behind(
    kafka_settings: KafkaSettings,
) -> None:
    topic = full_name(kafka_settings, "recalls")
    name = f"{kafka_settings.group_prefix}upstream"
    with producer(kafka_settings, transactional_id=name) as out:
        out.init_transactions()
        for value, kept in ((b"first", True), (b"taken back", False), (b"second", True)):
            out.begin_transaction()
            out.send(topic, value=value, partition=0)
            out.commit_transaction() if kept else out.abort_transaction()
    failures: list[BaseException] = []
    role = Reader("transactions", ("recalls",), Settings(kafka=kafka_settings), metrics.Health(), failures.append)
    await role.start()
    try:
        # The last record is followed by a marker, so the end of the partition is never the next of a record.
        await until("the end of the partition", lambda: role.idle.get(0) == {"recalls"} and len(role.values) > 1)
    finally:
        await role.stop()
    assert (role.values, failures) == ([b"first", b"second"], [])
    with consumer(kafka_settings) as of_state:
        tp = TopicPartition(topic, 0)
        of_state.assign([tp])
        read: list[bytes] = []
        while of_state.position(tp) < of_state.end_offsets([tp])[tp]:
            read += [record.value for batch in of_state.poll(500).values() for record in batch]
    assert read == role.values


@pytest.mark.kafka
def test_what_an_open_transaction_has_written_keeps_nobody_waiting(kafka_settings: KafkaSettings) -> None:
    """A consumer that waits for the transaction's end has all that there is to read, however long it is open."""
    topic = full_name(kafka_settings, "recalls")
    with producer(kafka_settings, transactional_id=f"{kafka_settings.group_prefix}slow") as out:
        out.init_transactions()
        out.begin_transaction()
        out.send(topic, value=b"not yet", partition=0).get(timeout=30)
        watch = GroupWatch(kafka_settings, "nobody", "nobody", [topic])
        try:
            assert watch.look()[1][TopicPartition(topic, 0)] == 0
            out.commit_transaction()
            assert watch.look()[1][TopicPartition(topic, 0)] == 2, "the record, and the marker behind it"
        finally:
            watch.close()


@pytest.mark.kafka
async def test_a_process_that_stood_still_takes_no_source_for_quiet(kafka_settings: KafkaSettings) -> None:
    """As after SIGSTOP or a pause of the machine: what came meanwhile is in the log, and not fetched yet."""
    away = 0.0
    failures: list[BaseException] = []
    settings = Settings(kafka=kafka_settings)
    role = Reader("standstill", ("recalls",), settings, metrics.Health(), failures.append, lambda: time.time() + away)
    await role.start()
    try:
        await until("some quiet", lambda: bool(role.quiet) and role.quiet[-1] > 0.5)
        role.quiet.clear()
        away = 3600.0
        await until("looks after the pause", lambda: len(role.quiet) > 2 * kafka_settings.partitions)
    finally:
        await role.stop()
    assert max(role.quiet) < 3000
    assert failures == []


async def test_what_has_gone_while_a_commit_waited_is_not_committed_without_its_metadata(
    kafka_settings: KafkaSettings,
) -> None:
    app, taken = make_app(kafka_settings, "commit-test"), Taken()
    subscribe(app, raw_topic(app, kafka_settings, "recalls"), taken)
    own, gone = TP("recalls", 0), TP("recalls", 1)
    committed: list[Mapping[TP, tuple[int, str]]] = []

    class Thread:
        async def commit(self, offsets: Mapping[TP, tuple[int, str]]) -> bool:
            committed.append(offsets)
            return True

    consumer = app.consumer
    consumer._thread = Thread()
    taken.committable = lambda tp: (7, "as of 5") if tp == own else None  # type: ignore[method-assign]
    assert await consumer._commit({own: 7, gone: 9})
    assert committed == [{own: (7, "as of 5")}]
    assert consumer._should_commit(gone, 9) and not consumer._should_commit(own, 7)
