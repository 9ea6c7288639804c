"""What the anchors role may cost and in which order it serves: waiting requests, budget, circuit breaker."""

from __future__ import annotations

import asyncio
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streams.anchors.agent import awaited
from streams.anchors.budget import Budget, CircuitBreaker
from streams.anchors.waiting import OLDEST_EVERY, Waiting, WaitingRequests
from streams.contracts import AnchorRequest
from streams.dead_letters import Original

ORIGINAL = Original("t", 0, 0, 0, None, None)


class Log:
    """Makes requests and remembers which are done."""

    def __init__(self) -> None:
        self.done: list[Waiting] = []
        self.made = 0

    def request(self, user: str, reason: str = "cold", miss: float | None = None, ts: int | None = None) -> Waiting:
        self.made += 1
        request = AnchorRequest(user, self.made if ts is None else ts, self.made, reason, ["a"], miss)  # type: ignore[arg-type]
        waiting = Waiting(0, request, ORIGINAL, float(self.made), lambda: self.done.append(waiting))
        return waiting


def users(batch: list[Waiting]) -> list[str]:
    return [waiting.request.user_id for waiting in batch]


def test_the_neediest_go_first():
    log, queue = Log(), WaitingRequests()
    for user, reason, miss in [
        ("old", "stale", 0.1),
        ("version", "version", 0.1),
        ("drifted", "drift", 0.4),
        ("far", "drift", 0.9),
        ("new", "cold", None),
        ("newer", "cold", None),
    ]:
        queue.put(log.request(user, reason, miss))
    assert users(queue.take(4)) == ["new", "newer", "far", "drifted"]
    assert users(queue.take(4)) == ["version", "old"]
    assert queue.take(4) == [] and queue.oldest_arrival() is None


def test_a_newer_request_takes_the_place_of_an_older_one_in_whatever_order_they_come():
    log, queue = Log(), WaitingRequests()
    first, second = log.request("u"), log.request("u", "drift", 0.5)
    assert queue.put(first)
    assert not queue.put(second)
    assert log.done == [first] and len(queue) == 1
    assert queue.take(1) == [second]
    queue.put_back([second])
    assert not queue.put(first)
    assert log.done == [first, first]
    assert queue.take(9) == [second]


def test_a_flood_of_needy_users_starves_nobody():
    log, queue = Log(), WaitingRequests()
    queue.put(log.request("merely old", "stale"))
    served = []
    for _ in range(OLDEST_EVERY):
        for _ in range(3):
            queue.put(log.request(f"cold {log.made}"))
        served += users(queue.take(1))
    assert served[-1] == "merely old"


def test_what_made_the_generator_fail_comes_last_and_alone():
    log, queue = Log(), WaitingRequests()
    for name in ("a", "b"):
        queue.put(log.request(name))
    failed = queue.take(2)
    for waiting in failed:
        waiting.failures += 1
    queue.put_back(failed)
    queue.put(log.request("healthy", "stale"))
    assert [users(queue.take(8)) for _ in range(3)] == [["healthy"], ["a"], ["b"]]


@given(
    st.lists(st.tuples(st.integers(0, 5), st.sampled_from(["cold", "drift", "stale"]), st.integers(0, 4)), max_size=60)
)
def test_every_request_is_taken_or_superseded_and_none_twice(steps):
    log, queue = Log(), WaitingRequests()
    put, taken = [], []
    for user, reason, take in steps:
        waiting = log.request(f"u{user}", reason, 0.5)
        put.append(waiting)
        queue.put(waiting)
        batch = queue.take(take)
        if take % 2:
            queue.put_back(batch)
        else:
            taken += batch
    while batch := queue.take(3):
        taken += batch
    assert len(queue) == 0
    assert sorted(w.request.sequence for w in taken + log.done) == [w.request.sequence for w in put]
    for done in log.done:  # only ever for a later one of the same user
        assert any(w.request.user_id == done.request.user_id and w.newer_than(done) for w in put)


@given(
    st.integers(1, 600),
    st.integers(1, 64),
    st.lists(st.tuples(st.floats(0, 30), st.integers(1, 64)), max_size=60),
)
def test_no_minute_sees_more_than_the_budget_and_one_burst(per_minute, burst, steps):
    budget, now, spent = Budget(per_minute, burst), 0.0, []
    for wait, want in steps:
        now += wait
        available = budget.available(now)
        n = min(want, available)
        budget.spend(n)
        spent.append((now, n))
    for start, _ in spent:
        assert sum(n for at, n in spent if start <= at < start + 60) <= per_minute + burst
    # And what is not spent flows in: nobody waits for ever.
    assert budget.available(now + 60 * burst / per_minute + 1) >= 1


def test_without_a_budget_any_number_is_available():
    budget = Budget(0, 8)
    budget.spend(1000)
    assert budget.available(1.0) is None


def test_the_breaker_opens_probes_and_closes():
    breaker = CircuitBreaker(failures=2, open_seconds=10)
    breaker.failed(0)
    breaker.succeeded()
    breaker.failed(1)
    assert breaker.state(1) == "closed"
    breaker.failed(2)
    assert (breaker.state(2), breaker.state(11.9), breaker.state(12)) == ("open", "open", "half_open")
    breaker.failed(12)  # the probe fails: open for as long again
    assert (breaker.state(21.9), breaker.state(22)) == ("open", "half_open")
    breaker.succeeded()
    assert breaker.state(22) == "closed"
    breaker.failed(23)
    assert breaker.state(23) == "closed"


async def _awaited(enough: int, limit: float) -> tuple[str, int]:
    """What a call gives that ends once it was beaten for ``enough`` times, and how often that was."""
    done, beats = threading.Event(), 0

    def beat() -> None:
        nonlocal beats
        beats += 1
        if beats == enough:
            done.set()

    def call() -> str:
        done.wait(30 if limit else 0.1)
        return "anchors"

    return await awaited(asyncio.to_thread(call), beat, limit), beats


def test_a_long_call_of_the_generator_beats_until_it_counts_as_stuck():
    assert asyncio.run(_awaited(3, limit=60.0)) == ("anchors", 3)
    assert asyncio.run(_awaited(3, limit=0.0)) == ("anchors", 0)


def test_the_error_of_a_call_of_the_generator_comes_through():
    async def fails() -> None:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        asyncio.run(awaited(fails(), lambda: None, 60.0))
