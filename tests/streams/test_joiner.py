"""The joiner against a plain restatement of its contract, under every kind of shuffling."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streams.contracts import Feedback, Recall
from streams.labels.joiner import Joined, Joiner, Source
from streams.labels.store import MemoryStore

WINDOW, RETENTION = 100, 50
ITEMS = ["a", "b", "c", "d"]


def recall(request_id: str, ts: int, user: str = "u", candidates: list[str] | None = None) -> Recall:
    return Recall(request_id, user, ts, candidates or ITEMS)


def feedback(event_id: str, ts: int, item: str, request_id: str | None, kind: str = "impression", user: str = "u"):
    return Feedback(event_id, user, item, ts, kind, request_id)  # type: ignore[arg-type]


def source(offset: int) -> Source:
    return Source(offset, 1000 + offset)


def exposed_by_contract(target: Recall, recalls: list[Recall], events: list[Feedback]) -> dict[str, bool]:
    """label(request)'s exposures, said without state: quadratic and obvious."""
    joined = []
    for event in events:
        if event.user_id != target.user_id or not target.ts <= event.ts <= target.ts + WINDOW:
            continue
        if event.request_id is None:
            holders = [
                r
                for r in recalls
                if r.user_id == event.user_id and event.item_id in r.candidates and r.ts <= event.ts <= r.ts + WINDOW
            ]
            if not holders or max(holders, key=lambda r: (r.ts, r.request_id)) is not target:
                continue
        elif event.request_id != target.request_id:
            continue
        joined.append(event)
    joined.sort(key=lambda e: (e.ts, e.event_id))
    clicked: dict[str, bool] = {}
    for event in joined:
        clicked[event.item_id] = clicked.get(event.item_id, False) or event.kind == "click"
    return clicked


@st.composite
def logs(draw: st.DrawFn) -> tuple[list[Recall], list[Feedback]]:
    users = ["u", "v"]
    recalls = [
        recall(
            f"r{i}",
            draw(st.integers(0, 300)),
            draw(st.sampled_from(users)),
            draw(st.lists(st.sampled_from(ITEMS), min_size=1, max_size=5)),
        )
        for i in range(draw(st.integers(1, 6)))
    ]
    names = [*(r.request_id for r in recalls), None, "unknown"]
    events = [
        feedback(
            f"e{i}",
            draw(st.integers(0, 450)),
            draw(st.sampled_from(ITEMS)),
            draw(st.sampled_from(names)),
            draw(st.sampled_from(["impression", "click"])),
            draw(st.sampled_from(users)),
        )
        for i in range(draw(st.integers(0, 20)))
    ]
    return recalls, events


def run(recalls: list[Recall], events: list[Feedback], order: random.Random, close_early: bool) -> dict[str, Joined]:
    """Feed a log in some order; with ``close_early`` requests close half-way and the rest arrives as late records."""
    joiner = Joiner(WINDOW, RETENTION + 10_000)
    arrivals: list[Recall | Feedback] = [*recalls, *events]
    order.shuffle(arrivals)
    final: dict[str, Joined] = {}
    for i, record in enumerate(arrivals):
        where = source(i)
        late = joiner.add_recall(record, where) if isinstance(record, Recall) else joiner.add_feedback(record, where)
        for request_id in late:
            final[request_id] = joiner.rejoin(request_id)
        if (close_early and i == len(arrivals) // 2) or (close_early and i > len(arrivals) // 2):
            final |= {joined.recall.request_id: joined for joined in joiner.close(10_000)}
    final |= {joined.recall.request_id: joined for joined in joiner.close(10_000)}
    return final


@given(logs(), st.integers(0, 2**32), st.booleans())
def test_every_request_once_with_what_the_contract_says_in_any_order(log, seed, close_early):
    recalls, events = log
    final = run(recalls, events, random.Random(seed), close_early)
    assert final.keys() == {r.request_id for r in recalls}
    for r in recalls:
        expected = exposed_by_contract(r, recalls, events)
        assert final[r.request_id].exposed == expected
        assert list(final[r.request_id].exposed) == list(expected)


@given(logs(), st.integers(0, 2**32))
def test_every_offset_is_released_once_and_memory_is_empty_at_the_end(log, seed):
    recalls, events = log
    joiner = Joiner(WINDOW, RETENTION)
    arrivals: list[Recall | Feedback] = [*recalls, *events, *recalls, *events]
    random.Random(seed).shuffle(arrivals)
    offsets: dict[str, list[int]] = {"recalls": [], "feedback": []}
    for i, record in enumerate(arrivals):
        if isinstance(record, Recall):
            joiner.add_recall(record, source(i))
            offsets["recalls"].append(i)
        else:
            joiner.add_feedback(record, source(i))
            offsets["feedback"].append(i)
    joiner.close(10_000)
    forgotten, released = joiner.forget(10_000)
    assert sorted(forgotten) == sorted(r.request_id for r in recalls)
    assert sorted(released.recalls) == offsets["recalls"]
    assert sorted(released.feedback) == offsets["feedback"]
    assert joiner.retained == 0 and len(joiner) == 0
    assert not joiner._events and not joiner._early and not joiner._anonymous and not joiner._joined_events
    assert joiner.duplicate_recalls == len(recalls)
    assert joiner.duplicate_feedback == len(events)


def test_a_request_closes_when_its_window_is_over_and_not_before():
    joiner = Joiner(WINDOW, RETENTION)
    joiner.add_recall(recall("r", 10), source(0))
    assert joiner.close(109) == []
    assert [j.recall.request_id for j in joiner.close(110)] == ["r"]
    assert joiner.close(1000) == []


def test_the_window_is_closed_on_both_ends():
    joiner = Joiner(WINDOW, RETENTION)
    joiner.add_recall(recall("r", 10), source(0))
    for i, (ts, item) in enumerate([(9, "a"), (10, "b"), (110, "c"), (111, "d")]):
        joiner.add_feedback(feedback(f"e{i}", ts, item, "r"), source(i))
    (joined,) = joiner.close(1000)
    assert list(joined.exposed) == ["b", "c"]
    assert joined.feedback_offsets == [1, 2]


def test_late_feedback_names_the_request_that_it_changes_until_retention_is_over():
    joiner = Joiner(WINDOW, RETENTION)
    joiner.add_recall(recall("r", 0), source(0))
    joiner.close(100)
    assert joiner.add_feedback(feedback("e1", 50, "a", "r", "click"), source(1)) == ["r"]
    assert joiner.rejoin("r").exposed == {"a": True}
    assert joiner.late == 1
    joiner.forget(150)
    assert joiner.add_feedback(feedback("e2", 50, "b", "r"), source(2)) == []
    joiner.forget(10_000)
    assert joiner.orphans == 1


class CountingStore(MemoryStore):
    reads = 0

    def get(self, request_id: str) -> bytes:
        self.reads += 1
        return super().get(request_id)


def test_closing_reads_each_request_of_a_busy_user_once_or_twice():
    # A guest's id, or a crawler's: as each event asks every request of its user, the reads go up with the square.
    store, requests = CountingStore(), 150
    joiner = Joiner(WINDOW, RETENTION, store)
    for n in range(requests):
        joiner.add_recall(recall(f"r{n:03}", 10), source(n))
    for n in range(400):
        joiner.add_feedback(feedback(f"e{n}", 20 + n % 50, ITEMS[n % 4], None), source(n))
    assert store.reads < 2 * requests, "each event asks the latest requests first"
    store.reads = 0
    due = joiner.close(10 + WINDOW, at_most=1)
    assert due[0].recall.request_id == "r000" and due[0].exposed == {} and store.reads <= 2 * requests
    rest = joiner.close(10 + WINDOW)
    assert [set(joined.exposed) for joined in rest] == [set()] * (requests - 2) + [set(ITEMS)]


def test_closing_without_anonymous_feedback_looks_at_no_other_request(monkeypatch: pytest.MonkeyPatch):
    joiner = Joiner(WINDOW, RETENTION)
    for n in range(50):
        joiner.add_recall(recall(f"r{n}", 10), source(n))
        joiner.add_feedback(feedback(f"e{n}", 20, "a", f"r{n}"), source(n))
    monkeypatch.setattr("streams.labels.joiner._order", lambda _: pytest.fail("looked at"))
    assert [joined.exposed for joined in joiner.close(10 + WINDOW)] == [{"a": False}] * 50


def test_a_late_recall_takes_anonymous_feedback_from_the_request_before_it():
    joiner = Joiner(WINDOW, RETENTION)
    joiner.add_recall(recall("r1", 0), source(0))
    joiner.add_feedback(feedback("e", 60, "a", None), source(1))
    (first,) = joiner.close(120)
    assert first.exposed == {"a": False}
    assert joiner.add_recall(recall("r2", 50), source(2)) == ["r1"]
    assert joiner.rejoin("r1").exposed == {}
    assert [j.exposed for j in joiner.close(150)] == [{"a": False}]


def test_feedback_of_another_user_does_not_join():
    joiner = Joiner(WINDOW, RETENTION)
    joiner.add_recall(recall("r", 0), source(0))
    joiner.add_feedback(feedback("e", 10, "a", "r", user="someone else"), source(1))
    assert joiner.close(100)[0].exposed == {}
    joiner.forget(1000)
    assert joiner.orphans == 1
