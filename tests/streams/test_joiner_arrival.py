"""The same log in any arrival gives the same final labels, across restarts too: byte for byte in content."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpl.labels.labeller import Config
from streams.contracts import Calibration, Feedback, Recall, encode
from streams.labels.joiner import Joined, Joiner, Source
from streams.labels.record import Versions, anchor_set, make_label
from streams.labels.store import MemoryStore
from streams.watermark import NEVER, Watermark
from tests.streams.test_record import LEVELS, SPACE, World

WINDOW, LATENESS, RETENTION = 100, 30, 50
WORLD = World(items=16)
ANCHORS = anchor_set(WORLD.anchors, SPACE, 16, LEVELS, Config())
VERSIONS = Versions("space", "codes", "config", "code")


@dataclass
class Record:
    """One record of the log: its place and what it says."""

    offset: int
    source: str
    said: Recall | Feedback


@st.composite
def logs(draw: st.DrawFn) -> list[Record]:
    """Requests of two users over the same items, with named and anonymous feedback, some of it twice."""
    records: list[Record] = []
    requests = draw(st.integers(1, 8))
    for n in range(requests):
        ts = draw(st.integers(0, 600))
        chosen = draw(st.lists(st.integers(0, 15), min_size=1, max_size=8, unique=True))
        user = f"u{draw(st.integers(0, 1))}"
        records.append(Record(0, "recalls", Recall(f"r{n}", user, ts, [f"i{c}" for c in chosen])))
        for k in range(draw(st.integers(0, 4))):
            item = f"i{draw(st.integers(0, 15))}"
            kind = draw(st.sampled_from(["impression", "click"]))
            named = draw(st.sampled_from([f"r{n}", None, "nobody"]))
            at = ts + draw(st.integers(-10, WINDOW + 10))
            records.append(Record(0, "feedback", Feedback(f"e{n}-{k}", user, item, max(0, at), kind, named)))
    again = draw(st.lists(st.sampled_from(records), max_size=4))
    return [*records, *(Record(0, record.source, record.said) for record in again)]


def in_log_order(records: list[Record], disorder: int, seed: int) -> list[Record]:
    """The log: by event time, but up to ``disorder`` ms out of order; offsets are places in their own topic."""
    order = random.Random(seed)
    arrived = sorted(records, key=lambda r: r.said.ts + order.randint(0, disorder))
    places = {"recalls": 0, "feedback": 0}
    for record in arrived:
        record.offset = places[record.source]
        places[record.source] += 1
    return arrived


@dataclass
class Worker:
    """What the labels role does with a joiner, in one thread and without Kafka."""

    final: dict[str, bytes]
    joiner: Joiner
    watermark: Watermark = field(default_factory=lambda: Watermark(("recalls", "feedback"), LATENESS))
    touched: set[str] = field(default_factory=set)
    released: dict[str, set[int]] = field(default_factory=lambda: {"recalls": set(), "feedback": set()})

    def take(self, record: Record, settle: bool) -> None:
        where, said = Source(record.offset, 0), record.said
        self.watermark.observe(record.source, said.ts)
        if isinstance(said, Feedback):
            self.touched |= set(self.joiner.add_feedback(said, where))
        elif self.joiner.is_over(said.ts):
            self.released["recalls"].add(record.offset)
        else:
            self.touched |= set(self.joiner.add_recall(said, where))
        if settle:
            self.settle(self.watermark.value())

    def settle(self, watermark: int) -> None:
        for joined in self.joiner.close(watermark):
            self.publish(joined)
        for request_id in self.touched:
            self.publish(self.joiner.rejoin(request_id))
        self.touched = set()
        _, released = self.joiner.forget(self.watermark.event_time)
        self.released["recalls"] |= set(released.recalls)
        self.released["feedback"] |= set(released.feedback)

    def publish(self, joined: Joined) -> None:
        calibration = Calibration("c", 0, "platt", 3.0, -1.0)
        label = make_label(joined, 0, ANCHORS, calibration, WORLD.lookup, VERSIONS)
        self.final[joined.recall.request_id] = encode(label)


def undisturbed(records: list[Record]) -> dict[str, bytes]:
    """All of the log before anything closes: what the contract says."""
    worker = Worker({}, Joiner(WINDOW, RETENTION))
    for record in records:
        worker.take(record, settle=False)
    worker.settle(2**62)
    return worker.final


def merged(log: list[Record], order: random.Random) -> Iterator[Record]:
    """Each topic in its own order, the two interleaved anyhow: one may be read far ahead of the other."""
    queues = {
        source: [r for r in sorted(log, key=lambda r: r.offset) if r.source == source]
        for source in ("recalls", "feedback")
    }
    while any(queues.values()):
        source = order.choice([name for name, queue in queues.items() if queue])
        for _ in range(order.randint(1, 6)):
            if queues[source]:
                yield queues[source].pop(0)


@settings(max_examples=150)
@given(logs(), st.integers(0, LATENESS + RETENTION), st.integers(0, 2**32))
def test_arrival_within_lateness_and_retention_does_not_change_a_byte(records, disorder, seed):
    log = in_log_order(records, disorder, seed)
    expected = undisturbed(log)
    worker = Worker({}, Joiner(WINDOW, RETENTION))
    order = random.Random(seed)
    for record in merged(log, order):
        worker.take(record, settle=order.random() < 0.7)
    worker.settle(2**62)
    assert worker.final == expected


@settings(max_examples=150)
@given(logs(), st.integers(0, LATENESS), st.integers(0, 2**32))
def test_a_worker_killed_anywhere_leaves_the_same_labels(records, disorder, seed):
    """Offsets are committed in order, a topic at a time, with the horizon; the next worker reads on from there."""
    log = in_log_order(records, disorder, seed)
    expected = undisturbed(log)
    order = random.Random(seed)
    final: dict[str, bytes] = {}
    committed, horizon = {"recalls": 0, "feedback": 0}, NEVER
    for life in range(4):
        worker = Worker(final, Joiner(WINDOW, RETENTION, horizon=horizon))
        rest = [record for record in log if record.offset >= committed[record.source]]
        dies_after = order.randint(0, len(rest)) if life < 3 else len(rest)
        for n, record in enumerate(merged(rest, order)):
            if n == dies_after:
                break
            worker.take(record, settle=True)
        if life == 3:
            worker.settle(2**62)
            continue
        for source, offset in committed.items():
            while offset in worker.released[source]:
                offset += 1
            if order.random() < 0.8:
                committed[source], horizon = offset, worker.joiner.horizon
    assert final == expected


def test_a_recall_after_its_window_and_retention_is_refused():
    joiner = Joiner(WINDOW, RETENTION)
    joiner.forget(1000)
    assert joiner.is_over(1000 - WINDOW - RETENTION)
    assert not joiner.is_over(1000 - WINDOW - RETENTION + 1)
    with pytest.raises(ValueError, match=r"ts: 0, .* over at 1000"):
        joiner.add_recall(Recall("r", "u", 0, ["i1"]), Source(0, 0))


def test_feedback_of_what_was_over_for_an_earlier_owner_is_let_go_at_once():
    joiner = Joiner(WINDOW, RETENTION, horizon=1000)
    assert joiner.add_feedback(Feedback("e", "u", "i", 800, "click", "r"), Source(7, 0)) == []
    assert joiner.forget(0)[1].feedback == [7]
    assert joiner.orphans == 1 and joiner.events == 0 and joiner.horizon == 1000


def test_many_are_closed_in_parts_and_in_order():
    joiner = Joiner(WINDOW, RETENTION, MemoryStore())
    for n in range(10):
        joiner.add_recall(Recall(f"r{n}", "u", n, ["i1"]), Source(n, 0))
    parts = [[j.recall.request_id for j in joiner.close(1000, at_most=4)] for _ in range(4)]
    assert parts == [["r0", "r1", "r2", "r3"], ["r4", "r5", "r6", "r7"], ["r8", "r9"], []]


def test_the_bytes_of_what_is_held_are_counted():
    joiner = Joiner(WINDOW, RETENTION)
    recall = Recall("r", "u", 0, [f"i{n}" for n in range(50)])
    joiner.add_recall(recall, Source(0, 0))
    assert joiner.retained_bytes == len(encode(recall))
    joiner.close(WINDOW)
    joiner.forget(WINDOW + RETENTION)
    assert joiner.retained_bytes == 0 and joiner.retained == 0


def test_labels_are_not_all_alike():
    """The test above would pass for labels that say nothing."""
    joined = Joined(Recall("r", "u", 100, ["i1", "i2"]), {}, 0, [], 0)
    label = make_label(joined, 0, ANCHORS, None, WORLD.lookup, VERSIONS)
    assert len(set(label.unexposed.score)) == 2 and np.isfinite(label.unexposed.score).all()
