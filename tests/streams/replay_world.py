"""A small log in memory, as a broker would have it: for the pure tests of replay."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import msgspec
import numpy as np

from streams.contracts import Calibration, Feedback, ItemVector, Label, Recall, UserAnchors, encode
from streams.frame import Frame
from streams.labels import published
from streams.labels.record import digest
from streams.replay.log import Entry, LogError, Span
from streams.replay.run import Replay, Setup
from streams.replay.select import FAR, Selection
from streams.settings import LabelSettings, Settings
from streams.topics import TOPICS
from streams.views import vector_bytes

DIM, LEVELS, PARTITIONS = 8, 3, 2
START = 1_700_000_000_000
SINGLE = {spec.name for spec in TOPICS if spec.single}
FRAME = Frame(DIM, LEVELS, "space-1", "codes-1")
LABELS = LabelSettings(max_ahead_seconds=86_400, window_seconds=10, allowed_lateness_seconds=2, retention_seconds=20)
SETTINGS = Settings(labels=LABELS)
EVERYTHING = Selection(0, FAR)


def unit(rng: np.random.Generator, n: int) -> np.ndarray:
    rows = rng.normal(size=(n, DIM))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


class MemoryLog:
    """Topics as lists; ``compact`` does what the broker's cleaner does."""

    def __init__(self) -> None:
        self.frame = FRAME
        self.entries: dict[tuple[str, int], list[Entry]] = {
            (spec.name, p): [] for spec in TOPICS for p in range(1 if spec.name in SINGLE else PARTITIONS)
        }
        self.ends: dict[tuple[str, int], int] = dict.fromkeys(self.entries, 0)
        self.now = START

    def put(self, topic: str, key: str, value: bytes | None, headers: Sequence[tuple[str, bytes]] = ()) -> Entry:
        """Append a record, a millisecond after the one before."""
        self.now += 1
        partition = 0 if topic in SINGLE else sum(key.encode()) % PARTITIONS
        at = (topic, partition)
        entry = Entry(topic, partition, self.ends[at], self.now, key.encode(), value, tuple(headers))
        self.entries[at].append(entry)
        self.ends[at] += 1
        return entry

    def compact(self, topic: str) -> None:
        """Keep the newest record of every key, at its offset."""
        for at, entries in self.entries.items():
            if at[0] == topic:
                newest = {entry.key: entry.offset for entry in entries}
                self.entries[at] = [entry for entry in entries if newest[entry.key] == entry.offset]

    # --- the Log protocol ---

    def partitions(self, topic: str) -> list[int]:
        return sorted(p for name, p in self.entries if name == topic)

    def span(self, topic: str, partition: int) -> Span:
        if (topic, partition) not in self.ends:
            raise LogError(f"no partition {partition} of {topic}")
        return Span(0, self.ends[topic, partition])

    def offset_at(self, topic: str, partition: int, kafka_ms: int) -> int:
        found = (entry.offset for entry in self.entries[topic, partition] if entry.kafka_ms >= kafka_ms)
        return next(found, self.ends[topic, partition])

    def read(self, topic: str, partition: int, start: int | None = None, end: int | None = None) -> Iterator[Entry]:
        for given, entry in enumerate(self.entries[topic, partition]):
            if (start is None or entry.offset >= start) and (end is None or entry.offset < end):
                yield replace(entry, missing=entry.offset - given if start is None else 0)


class World:
    """A site with items, users with anchors, requests and feedback."""

    def __init__(self, seed: int = 0, items: int = 24, users: int = 4) -> None:
        self.rng = np.random.default_rng(seed)
        self.log = MemoryLog()
        self.users = [f"user-{n}" for n in range(users)]
        self.items = [f"item-{n}" for n in range(items)]
        for item, vector in zip(self.items, unit(self.rng, items), strict=True):
            self.put_item(item, vector)
        self.put_calibration(Calibration("cal-1", 0, "platt", 2.5, -1.0, 10))
        for user in self.users:
            self.put_anchors(user, START, 1)

    def put_item(self, item: str, vector: np.ndarray | None) -> None:
        if vector is None:
            self.log.put("item-vectors", item, None)
            return
        record = ItemVector(item, vector_bytes(vector), [0] * LEVELS, "content", FRAME.encoder, FRAME.quantiser)
        self.log.put("item-vectors", item, encode(record))

    def put_calibration(self, calibration: Calibration) -> None:
        self.log.put("calibrations", calibration.version, encode(calibration))

    def put_anchors(self, user: str, ts: int, version: int, k: int = 3, **changes: Any) -> UserAnchors:
        record = UserAnchors(
            user_id=user,
            ts=ts,
            version=version,
            sid=[[n, 0, 0] for n in range(k)],
            logprob=np.round(-self.rng.uniform(1, 6, size=k), 6).tolist(),
            vectors=vector_bytes(unit(self.rng, k)) if k else b"",
            history_factor=np.round(self.rng.uniform(0, 1, size=k), 6).tolist(),
            history=["item-0"],
            generator="lm-1",
            quantiser=FRAME.quantiser,
            encoder=FRAME.encoder,
        )
        record = msgspec.structs.replace(record, **changes)
        self.log.put("user-anchors", user, encode(record))
        return record

    def events(self, requests: int = 12, step_ms: int = 3_000) -> list[Recall | Feedback]:
        """Recalls and feedback in event-time order; some feedback names no request, some comes twice."""
        found: list[Recall | Feedback] = []
        for n in range(requests):
            user = self.users[int(self.rng.integers(len(self.users)))]
            ts = START + 1_000 + n * step_ms
            candidates = [str(item) for item in self.rng.choice(self.items, 10, replace=False)]
            found.append(Recall(f"r{n}", user, ts, [*candidates, "ghost"]))
            for k, item in enumerate(self.rng.choice(candidates, 3, replace=False)):
                kind = "click" if k == 2 else "impression"
                named = None if k == 0 else f"r{n}"
                event = Feedback(f"e{n}-{k}", user, str(item), ts + 500 * (k + 1), kind, named)
                found += [event, event] if k == 1 else [event]
        return sorted(found, key=lambda record: record.ts)

    def send(self, records: Sequence[Recall | Feedback]) -> None:
        for record in records:
            self.log.put("recalls" if isinstance(record, Recall) else "feedback", record.user_id, encode(record))

    def record(self, settings: Settings = SETTINGS, **provenance: Any) -> list[Label]:
        """Label what is on the log and log the labels, as the labels role does; later calls give revisions."""
        before = {entry.key: entry for at, some in self.log.entries.items() if at[0] == "labels" for entry in some}
        revision = 1 if before else 0
        labels = []
        for result in Replay(self.log, EVERYTHING, Setup.of(settings, FRAME)):
            assert result.label is not None
            changed = msgspec.structs.replace(result.label.provenance, **provenance)
            label = msgspec.structs.replace(result.label, revision=revision, provenance=changed)
            headers = [
                (published.REQUEST_ID, label.request_id.encode()),
                (published.REVISION, str(revision).encode()),
                (published.DIGEST, digest(label)),
            ]
            self.log.put("labels", label.user_id, encode(label), headers)
            labels.append(label)
        self.log.now += 120_000  # what comes after is not of the moment of labelling
        return labels
