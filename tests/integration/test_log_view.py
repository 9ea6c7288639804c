from __future__ import annotations

import asyncio
import os

import pytest

from streams.kafka import producer
from streams.log_view import FETCH_BYTES, LogView, TopicMissingError
from streams.settings import KafkaSettings
from streams.topics import full_name


def send(kafka: KafkaSettings, topic: str, *values: bytes | None, partition: int = 0) -> None:
    with producer(kafka) as out:
        for value in values:
            out.send(full_name(kafka, topic), key=b"k", value=value, partition=partition)


def test_reads_what_was_there_then_what_comes(kafka_settings: KafkaSettings):
    seen: list[tuple[int, bytes | None]] = []
    send(kafka_settings, "user-anchors", b"1", None)
    send(kafka_settings, "user-anchors", b"2", partition=2)
    view = LogView(kafka_settings, {"user-anchors": lambda r: seen.append((r.partition, r.value))})
    assert not view.caught_up()
    view.warm_up()
    assert len(seen) == 3 and (2, b"2") in seen
    assert [value for partition, value in seen if partition == 0] == [b"1", None]
    send(kafka_settings, "user-anchors", b"3")
    while len(seen) < 4:
        view.apply(view.fetch(5.0))
    assert seen[-1] == (0, b"3")
    view.close()


def test_an_empty_topic_is_caught_up_and_chosen_partitions_only_are_read(kafka_settings: KafkaSettings):
    seen: list[int] = []
    send(kafka_settings, "profiles", b"1")
    send(kafka_settings, "profiles", b"2", partition=1)
    view = LogView(kafka_settings, {"profiles": lambda r: seen.append(r.partition)}, partitions=[1])
    view.warm_up()
    assert seen == [1]
    view.close()
    empty = LogView(kafka_settings, {"calibrations": lambda r: None})
    assert empty.caught_up()
    empty.close()


def test_records_over_what_is_fetched_at_a_time_are_read(kafka_settings: KafkaSettings):
    """Among small ones and in each partition, so that no partition waits for ever behind another."""
    seen: dict[int, list[bytes]] = {0: [], 1: [], 2: []}
    values = [b"1", os.urandom(3 * FETCH_BYTES), b"2", os.urandom(2 * FETCH_BYTES)]
    for partition in seen:
        send(kafka_settings, "user-anchors", *values, partition=partition)
    view = LogView(kafka_settings, {"user-anchors": lambda r: seen[r.partition].append(r.value)})
    view.warm_up()
    view.close()
    assert all(read == values for read in seen.values())


def test_a_dropped_topic_is_followed_no_longer(kafka_settings: KafkaSettings):
    seen: list[str] = []
    handlers = {name: lambda r, name=name: seen.append(name) for name in ("profiles", "user-anchors")}
    view = LogView(kafka_settings, handlers)
    send(kafka_settings, "profiles", b"1")
    send(kafka_settings, "user-anchors", b"1")
    while len(seen) < 2:
        view.apply(view.fetch(5.0))
    view.drop("profiles")
    send(kafka_settings, "profiles", b"2")
    send(kafka_settings, "user-anchors", b"2", b"3")
    while len(seen) < 4:
        view.apply(view.fetch(5.0))
    assert sorted(seen) == ["profiles", "user-anchors", "user-anchors", "user-anchors"]
    view.close()


async def test_it_can_be_asked_to_look_again(kafka_settings: KafkaSettings):
    seen: list[bytes] = []
    view = LogView(kafka_settings, {"item-vectors": lambda r: seen.append(r.value)})
    following = asyncio.ensure_future(view.follow())
    while not view.ready:
        await asyncio.sleep(0.01)
    for n in range(3):
        await asyncio.to_thread(send, kafka_settings, "item-vectors", b"%d" % n)
        view.look_again()
        assert not view.ready
        while not view.ready:
            await asyncio.sleep(0)
        assert len(seen) == n + 1
    view.stop()
    await following


def test_a_record_that_cannot_be_used_is_passed_over(kafka_settings: KafkaSettings):
    seen: list[int] = []
    view = LogView(kafka_settings, {"item-vectors": lambda r: seen.append(int(r.value))})
    send(kafka_settings, "item-vectors", b"1", b"oops", b"3")
    while len(seen) < 2:
        view.apply(view.fetch(5.0))
    assert seen == [1, 3]
    view.close()


def test_a_missing_topic_is_named(kafka_settings: KafkaSettings):
    elsewhere = kafka_settings.model_copy(update={"prefix": kafka_settings.prefix + "other."})
    with pytest.raises(TopicMissingError, match=r"other\.profiles does not exist"):
        LogView(elsewhere, {"profiles": lambda r: None})
