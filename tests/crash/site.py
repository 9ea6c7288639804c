"""A small site: its catalogue, its log of recalls and feedback, and what the labels of that log are to say.

The log is the same for every test, so that an undisturbed run is made once and every disturbed one must equal it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
from kafka import TopicPartition

from gpl.catalogue import ItemContent
from gpl.fit import Event, FitOptions
from gpl.fit import fit as fit_artefacts
from streams.contracts import Calibration, Feedback, Item, Label, Recall, UserAnchors, decode, encode
from streams.kafka import consumer, producer
from streams.settings import KafkaSettings, Settings
from streams.topics import full_name

DIM, ITEMS, GROUPS, USERS, REQUESTS, CANDIDATES = 16, 120, 6, 30, 400, 20
START, STEP = 1_700_000_000_000, 2_000
Event_ = Recall | Feedback


def vectors(dim: int = DIM) -> np.ndarray:
    """Raw item vectors in groups, so that there are interests to be found."""
    rng = np.random.default_rng(7)
    centres = rng.normal(size=(GROUPS, dim))
    return (centres[np.arange(ITEMS) % GROUPS] + 0.4 * rng.normal(size=(ITEMS, dim))).astype(np.float32)


def make_artefacts(directory: Path, dim: int = DIM) -> Path:
    """Space, quantiser and history generator over that catalogue, as `gpl fit` leaves them."""
    items = [ItemContent(f"item-{i}", "", row.tolist()) for i, row in enumerate(vectors(dim))]
    rng = np.random.default_rng(1)
    events = [
        Event(f"past-{u}", f"item-{(u % GROUPS) + GROUPS * rng.integers(0, ITEMS // GROUPS)}", START - 10**9 + t, True)
        for u in range(20)
        for t in range(10)
    ]
    fit_artefacts(items, events, None, FitOptions(generator="history", levels=3), seed=0).save(directory)
    return directory


def settings(kafka: KafkaSettings, artefacts: Path, shard: Path, **sections: dict[str, object]) -> Settings:
    """Of one worker: short windows, an index of its own."""
    chosen: dict[str, dict[str, object]] = {
        "labels": {
            "window_seconds": 60,
            "allowed_lateness_seconds": 5,
            "retention_seconds": 3600,
            "idle_timeout_wall_seconds": 3,
        },
        "profiles": {"min_interval_seconds": 60, "allowed_lateness_seconds": 5, "idle_timeout_wall_seconds": 1},
        "generator": {"beams": 5},
        "index": {"path": shard},
    }
    for name, values in sections.items():
        chosen[name] = {**chosen.get(name, {}), **values}
    return Settings(artefacts=artefacts, kafka=kafka, **chosen)  # type: ignore[arg-type]


def event_log() -> list[Event_]:
    """Recalls and feedback in event-time order; users change their taste half-way, every 23rd record comes twice."""
    rng = np.random.default_rng(3)
    records: list[Event_] = []
    for n in range(REQUESTS):
        user, ts = int(rng.integers(USERS)), START + n * STEP
        group = (user + 3 * (n > REQUESTS // 2)) % GROUPS
        liked = [f"item-{group + GROUPS * int(i)}" for i in rng.choice(ITEMS // GROUPS, 4, replace=False)]
        others = [f"item-{i}" for i in rng.choice(ITEMS, CANDIDATES, replace=False)]
        candidates = [*list(dict.fromkeys(liked + others))[:CANDIDATES], "ghost"]
        records.append(Recall(f"r{n}", f"user-{user}", ts, candidates))
        for k, item in enumerate(candidates[:6]):
            kind = "click" if item in liked and k < 3 else "impression"
            named = f"r{n}" if k % 2 else None
            records.append(Feedback(f"e{n}-{k}", f"user-{user}", item, ts + 1000 * (k + 1), kind, named))
    records.sort(key=lambda record: record.ts)
    return [record for n, record in enumerate(records) for _ in range(2 if n % 23 == 0 else 1)]


def send_items(kafka: KafkaSettings, rows: Iterable[int] = range(ITEMS), pause: float = 0.0) -> None:
    """Items and a calibration; ``pause`` seconds after each item."""
    raw = vectors()
    with producer(kafka) as out:
        calibration = Calibration("platt-test", 0, "platt", 2.5, -1.0, 100)
        out.send(full_name(kafka, "calibrations"), key=b"platt", value=encode(calibration))
        for i in rows:
            item = Item(f"item-{i}", "", embedding=[float(x) for x in raw[i]])
            out.send(full_name(kafka, "items"), key=item.item_id.encode(), value=encode(item))
            if pause:
                time.sleep(pause)


class Sender(threading.Thread):
    """Sends the log, or a part of it, over ``seconds``, in order, whatever the broker does meanwhile."""

    def __init__(self, kafka: KafkaSettings, seconds: float, part: slice = slice(None)) -> None:
        super().__init__(daemon=True)
        self._part = part
        self._kafka = kafka
        self._seconds = seconds
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            records = event_log()[self._part]
            with producer(self._kafka, delivery_timeout_ms=300_000) as out:
                started = time.monotonic()
                for n, record in enumerate(records):
                    topic = "recalls" if isinstance(record, Recall) else "feedback"
                    out.send(full_name(self._kafka, topic), key=record.user_id.encode(), value=encode(record))
                    time.sleep(max(0.0, started + self._seconds * n / len(records) - time.monotonic()))
                out.flush()
        except BaseException as error:
            self.error = error

    def finish(self) -> None:
        self.join(timeout=330)
        assert not self.is_alive() and self.error is None, self.error


class Twice(NamedTuple):
    """A record that says what an earlier one has said. The milliseconds at which both were made tell who made them."""

    topic: str
    key: tuple[str, int]
    first_ms: int
    again_ms: int


@dataclass
class Outcome:
    """What a run left behind. Final labels and anchors by identity, without what may differ between equal runs."""

    labels: dict[str, bytes]
    anchors: dict[tuple[str, int], bytes]
    vectors: dict[str, bytes]
    twice: list[Twice]
    """Labels of one (request, revision) and anchors of one (user, version) that were published again."""

    def same_as(self, other: Outcome) -> bool:
        return (self.labels, self.anchors, self.vectors) == (other.labels, other.anchors, other.vectors)

    def differences(self, other: Outcome) -> str:
        said = []
        for name in ("labels", "anchors", "vectors"):
            mine, theirs = getattr(self, name), getattr(other, name)
            changed = sorted(key for key in mine.keys() & theirs.keys() if mine[key] != theirs[key])
            said.append(
                f"{name}: {len(theirs.keys() - mine.keys())} missing, {len(mine.keys() - theirs.keys())} too many, "
                f"{len(changed)} other"
            )
            for key in changed[:2]:
                said.append(f"  {key}\n    {mine[key]!r}\n    {theirs[key]!r}")
            said += [f"  only here: {key}" for key in sorted(mine.keys() - theirs.keys())[:3]]
            said += [f"  only there: {key}" for key in sorted(theirs.keys() - mine.keys())[:3]]
        return "\n".join(said)


class Follower:
    """Reads the output topics as they grow."""

    def __init__(self, kafka: KafkaSettings) -> None:
        self._kafka = kafka
        names = {full_name(kafka, name): name for name in ("labels", "user-anchors", "item-vectors")}
        self._names = names
        self._reader = consumer(kafka, max_poll_records=2000)
        partitions = [TopicPartition(t, p) for t in names for p in sorted(self._reader.partitions_for_topic(t) or ())]
        self._reader.assign(partitions)
        self._reader.seek_to_beginning(*partitions)
        self._final: dict[str, Label] = {}
        self._anchors: dict[tuple[str, int], bytes] = {}
        self._vectors: dict[str, bytes] = {}
        self._seen: dict[tuple[str, tuple[str, int]], int] = {}
        self._ends: dict[tuple[str, int], int] = {}
        self._twice: list[Twice] = []
        self.label_times: list[tuple[int, int]] = []
        """Partition and Kafka milliseconds of every label record."""

    def poll(self, timeout: float = 0.3) -> Outcome:
        """Read what has come; what the topics say now."""
        while batches := self._reader.poll(timeout_ms=int(timeout * 1000)):
            for record in (record for batch in batches.values() for record in batch):
                # A broker that died may give a record again; twice in the log is what is looked for.
                where = record.topic, record.partition
                if record.offset >= self._ends.get(where, 0):
                    self._ends[where] = record.offset + 1
                    self._take(self._names[record.topic], record)
            timeout = 0.05
        return Outcome(
            {name: _comparable(label) for name, label in self._final.items()},
            dict(self._anchors),
            dict(self._vectors),
            list(self._twice),
        )

    def _take(self, topic: str, record: Any) -> None:
        value = record.value
        if topic == "item-vectors":
            self._vectors[record.key.decode()] = value
        elif topic == "user-anchors":
            anchors = decode(UserAnchors, value)
            self._look_for((anchors.user_id, anchors.version), record)
            self._anchors[anchors.user_id, anchors.version] = value
        else:
            label = decode(Label, value)
            self.label_times.append((record.partition, record.timestamp))
            self._look_for((label.request_id, label.revision), record)
            known = self._final.get(label.request_id)
            # As all readers: of one revision the first in the log stands.
            if known is None or label.revision > known.revision:
                self._final[label.request_id] = label

    def _look_for(self, key: tuple[str, int], record: Any) -> None:
        """Whether this record was published before."""
        if (first_ms := self._seen.get((record.topic, key))) is not None:
            self._twice.append(Twice(record.topic, key, first_ms, record.timestamp))
        else:
            self._seen[record.topic, key] = record.timestamp

    def close(self) -> None:
        self._reader.close()

    def __enter__(self) -> Follower:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _comparable(label: Label) -> bytes:
    """All that a label says, offsets included; only how often it was corrected on the way may differ."""
    provenance = msgspec.structs.replace(label.provenance, correction=None)
    return encode(msgspec.structs.replace(label, revision=0, provenance=provenance))


def until_same(follower: Follower, reference: Outcome, timeout: float = 150.0) -> Outcome:
    """Wait until the topics say what the undisturbed run said; then that they go on saying it."""
    deadline = time.monotonic() + timeout
    while not (outcome := follower.poll()).same_as(reference):
        assert time.monotonic() < deadline, f"not the undisturbed run's:\n{outcome.differences(reference)}"
    return outcome


def steps(seed: int, count: int, seconds: float) -> Iterator[tuple[float, int]]:
    """``count`` random moments within ``seconds``, in order, each with a random number."""
    rng = np.random.default_rng(seed)
    moments = sorted(float(x) for x in rng.uniform(0, seconds, count))
    yield from ((moment, int(rng.integers(2**31))) for moment in moments)
