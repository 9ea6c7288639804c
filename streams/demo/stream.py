"""The producer of a demo: the data directory's lines to the topics, items at once, events at their pace."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec

from streams.contracts import Item
from streams.data.reader import entries
from streams.demo.timeline import Event
from streams.kafka import RecordTooLargeError, check_size, producer
from streams.settings import KafkaSettings
from streams.topics import full_name

_BEHIND_OK = 0.005  # seconds: shorter waits are not worth a system call


class _Owner(msgspec.Struct):
    """The one field of a recall or feedback that routes it."""

    user_id: str


_owner = msgspec.json.Decoder(_Owner)


class Sender:
    """Sends raw records; ``sent`` and ``refused`` (over the size cap) count them by topic."""

    def __init__(self, kafka: KafkaSettings) -> None:
        self._kafka = kafka
        self._producer = producer(kafka)
        self._error: BaseException | None = None
        self.sent: dict[str, int] = {"items": 0, "recalls": 0, "feedback": 0}
        self.refused: dict[str, int] = {"items": 0, "recalls": 0, "feedback": 0}

    @property
    def events(self) -> int:
        """Recalls and feedback sent."""
        return self.sent["recalls"] + self.sent["feedback"]

    def send(self, topic: str, key: bytes | None, value: bytes) -> None:
        """Queue one record. Raises what an earlier record failed with."""
        if self._error is not None:
            raise self._error
        name = full_name(self._kafka, topic)
        try:
            check_size(self._kafka, name, key, value)
        except RecordTooLargeError:
            self.refused[topic] += 1
            return
        self._producer.send(name, key=key, value=value).add_errback(self._failed)
        self.sent[topic] = self.sent.get(topic, 0) + 1

    def _failed(self, error: Any) -> None:
        self._error = error if isinstance(error, BaseException) else RuntimeError(str(error))

    def flush(self, timeout: float = 60.0) -> None:
        """Wait until everything is acknowledged. Raises what a record failed with."""
        self._producer.flush(timeout=timeout)
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        self._producer.close(timeout=5)


def send_items(sender: Sender, path: Path, max_bytes: int) -> set[str]:
    """All lines of ``items.jsonl`` to the items topic, unreadable ones too. Returns the ids of the readable ones."""
    ids = set()
    for entry in entries(path, Item, max_bytes):
        if entry.line.raw is None:
            sender.refused["items"] += 1
            continue
        # The topic is compacted and takes no record without a key, so a line without an id goes under its place.
        key = f"items.jsonl:{entry.line.number}"
        if entry.record is not None:
            key = entry.record.item_id
            ids.add(key)
        sender.send("items", key.encode(), entry.line.raw)
    sender.flush()
    return ids


class Pacer(threading.Thread):
    """Sends events in a thread of its own, ``speed`` seconds of event time in each second on the wall.

    While it is held it sends nothing, and what is still to come is put off by as long: event time has no backlog of its
    own to catch up with. ``held_seconds``: how long that was.
    """

    def __init__(self, sender: Sender, events: Iterable[Event], speed: float) -> None:
        super().__init__(name="producer", daemon=True)
        self._sender = sender
        self._events = events
        self._speed = speed
        self._stop_asked = threading.Event()
        self.event_ts = 0
        self.held = False
        self.held_seconds = 0.0
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self._run()
        except BaseException as error:  # the main thread raises it
            self.error = error

    def _run(self) -> None:
        started, first = time.monotonic(), None
        for event in self._events:
            first = event.ts if first is None else first
            self._wait_while_held()
            due = started + self.held_seconds + (event.ts - first) / 1000 / self._speed
            ahead = due - time.monotonic()
            if (ahead > _BEHIND_OK and self._stop_asked.wait(ahead)) or self._stop_asked.is_set():
                return
            self._sender.send(event.topic, _key(event.value), event.value)
            self.event_ts = event.ts
        self._sender.flush()

    def _wait_while_held(self) -> None:
        since = time.monotonic()
        while self.held and not self._stop_asked.wait(0.02):
            pass
        self.held_seconds += time.monotonic() - since

    def stop(self) -> None:
        """Send nothing more."""
        self._stop_asked.set()


def _key(value: bytes) -> bytes | None:
    """The user id, by which the topics are partitioned; None when the line has none to read."""
    try:
        return _owner.decode(value).user_id.encode()
    except (msgspec.DecodeError, UnicodeError):
        return None
