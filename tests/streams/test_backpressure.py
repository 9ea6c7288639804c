"""Over the caps the source that is ahead is not read, and reading goes on when it no longer is."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streams.contracts import Feedback, Recall
from streams.labels.backpressure import Backpressure
from streams.labels.joiner import Source
from streams.labels.partition import Partition
from streams.labels.store import MemoryStore
from streams.settings import LabelSettings

SETTINGS = LabelSettings(
    window_seconds=1, allowed_lateness_seconds=0, retention_seconds=1, max_open_requests=5, max_retained_bytes=2**20
)


class Worker:
    """Partitions, and what the consumer was told."""

    def __init__(self, settings: LabelSettings = SETTINGS, partitions: int = 1) -> None:
        self.partitions = {n: Partition(settings, MemoryStore(), 0.0) for n in range(partitions)}
        self.paused: set[tuple[int, str]] = set()
        self.caps = Backpressure(settings, self._pause, self._resume)

    def _pause(self, number: int, source: str) -> None:
        assert (number, source) not in self.paused
        self.paused.add((number, source))

    def _resume(self, number: int, source: str) -> None:
        self.paused.remove((number, source))

    def recall(self, n: int, ts: int, number: int = 0) -> None:
        partition = self.partitions[number]
        partition.joiner.add_recall(Recall(f"r{n}", "u", ts, ["i"]), Source(n, 0))
        partition.watermark.observe("recalls", ts)
        self.apply()

    def feedback(self, n: int, ts: int, number: int = 0) -> None:
        partition = self.partitions[number]
        partition.joiner.add_feedback(Feedback(f"e{n}", "u", "i", ts, "click", f"r{n}"), Source(n, 0))
        partition.watermark.observe("feedback", ts)
        partition.joiner.close(partition.watermark.value())
        self.apply()

    def apply(self) -> None:
        self.caps.apply(self.partitions)


def test_the_source_ahead_waits_for_the_other_and_is_read_again_once_it_caught_up():
    worker = Worker()
    for n in range(5):
        worker.recall(n, n * 400)
    assert worker.paused == set()
    worker.recall(5, 2000)
    assert worker.paused == {(0, "recalls")}
    worker.feedback(0, 900)
    assert worker.paused == {(0, "recalls")}
    worker.feedback(1, 1300)  # closes the first: five are open, the cap is not passed, but hardly
    assert worker.paused == {(0, "recalls")}
    worker.feedback(2, 1900)
    assert worker.paused == set()


def test_a_source_that_caught_up_while_over_the_cap_is_ahead_itself_then():
    worker = Worker()
    for n in range(8):
        worker.recall(n, 10 + n)
    assert worker.paused == {(0, "recalls")}
    worker.feedback(0, 500)
    assert worker.paused == {(0, "feedback")}
    worker.recall(8, 500)
    assert worker.paused == set()  # side by side: nothing less can be held


def test_nobody_waits_for_an_idle_source():
    worker = Worker()
    for n in range(8):
        worker.recall(n, n)
    assert worker.paused == {(0, "recalls")}
    worker.partitions[0].watermark.idle("feedback")
    worker.apply()
    assert worker.paused == set()


@pytest.mark.parametrize(("store", "pauses"), [("memory", True), ("disk", False)])
def test_bytes_on_disk_are_no_memory(store, pauses):
    worker = Worker(SETTINGS.model_copy(update={"store": store, "max_open_requests": 1000}))
    partition = worker.partitions[0]
    recall = Recall("big", "u", 5, ["i" * 200] * 6000)
    partition.joiner.add_recall(recall, Source(0, 0))
    partition.watermark.observe("recalls", 5)
    worker.apply()
    assert bool(worker.paused) is pauses


@given(st.lists(st.tuples(st.integers(0, 2), st.booleans(), st.integers(0, 300)), max_size=80))
def test_of_each_partition_one_source_is_always_read(steps):
    worker = Worker(partitions=3)
    now = dict.fromkeys([(p, kind) for p in range(3) for kind in (True, False)], 0)
    for n, (number, is_recall, step) in enumerate(steps):
        now[number, is_recall] += step
        (worker.recall if is_recall else worker.feedback)(n, now[number, is_recall], number)
        for number, partition in worker.partitions.items():
            mine = {source for p, source in worker.paused if p == number}
            assert len(mine) <= 1 and mine == ({partition.paused} if partition.paused else set())
            if mine:
                (paused,) = mine
                other = "feedback" if paused == "recalls" else "recalls"
                assert partition.watermark.newest(paused) > partition.watermark.newest(other)
