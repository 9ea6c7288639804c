"""The profile fold: when anchors are asked for, and that the answer's timing does not matter."""

from __future__ import annotations

import math
import random

import msgspec
import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from river import drift as river_drift

from streams.contracts import AnchorRequest
from streams.profiles.drift import PageHinkley
from streams.profiles.state import AnchorsInForce, Positive, Profile, advance, answered, apply_positive, further
from streams.settings import ProfileSettings

VERSIONS = ("g", "q", "e")
SETTINGS = ProfileSettings(
    min_positives=2, min_interval_seconds=0, max_age_seconds=1e9, drift_delta=0.0, drift_threshold=0.5
)
AXES = {"east": np.array([1.0, 0.0], np.float32), "north": np.array([0.0, 1.0], np.float32)}


def positive(n: int, item: str = "east", ts: int | None = None) -> Positive:
    return Positive(1000 * n if ts is None else ts, f"e{n:04}", item)


def anchors(version: int, ts: int, axis: str = "east", versions: tuple[str, str, str] = VERSIONS) -> AnchorsInForce:
    return AnchorsInForce(version, ts, versions, AXES[axis][None, :])


def step(profile: Profile, in_force: AnchorsInForce | None, settings: ProfileSettings = SETTINGS):
    return advance(profile, in_force, VERSIONS, AXES.get, settings, history=10)


def feed(profile: Profile, *positives: Positive) -> Profile:
    for p in positives:
        profile = apply_positive(profile, p, 100) or profile
    return profile


def answer(request: AnchorRequest) -> AnchorsInForce:
    known = [item for item in request.positives if item in AXES]
    vectors = AXES[known[-1]][None, :] if known else np.zeros((0, 2), np.float32)
    return AnchorsInForce(request.sequence, request.ts, VERSIONS, vectors)


def test_cold_start_asks_at_the_click_that_makes_enough():
    profile, request = step(feed(Profile("u"), positive(1)), None)
    assert request is None
    profile, request = step(feed(profile, positive(2, "north"), positive(3)), None)
    assert request == AnchorRequest("u", 2000, 1, "cold", ["east", "north"])
    assert profile.pending and profile.tested == 2
    # While it is unanswered nothing more is asked for.
    assert step(feed(profile, positive(4)), None)[1] is None


def test_a_change_of_taste_asks_for_a_refresh_and_the_same_taste_does_not():
    profile = msgspec.structs.replace(Profile("u"), sequence=1, requested_ts=0)
    same, request = step(feed(profile, *(positive(n) for n in range(1, 30))), anchors(1, 0))
    assert request is None
    _, request = step(feed(same, *(positive(n, "north") for n in range(30, 40))), anchors(1, 0))
    assert request is not None and request.reason == "drift" and request.sequence == 2
    assert request.positives[-1] == "north"


def test_age_and_versions_ask_for_a_refresh():
    profile = msgspec.structs.replace(Profile("u"), sequence=1, requested_ts=0)
    aged = SETTINGS.model_copy(update={"max_age_seconds": 5.0})
    assert step(feed(profile, positive(5)), anchors(1, 0), aged)[1] is None
    assert step(feed(profile, positive(6)), anchors(1, 0), aged)[1].reason == "stale"
    other = anchors(1, 0, versions=("older", "q", "e"))
    assert step(feed(profile, positive(1)), other)[1].reason == "version"


def test_nothing_is_asked_for_within_the_minimum_interval():
    profile = msgspec.structs.replace(Profile("u"), sequence=1, requested_ts=0)
    calm = SETTINGS.model_copy(update={"max_age_seconds": 1.0, "min_interval_seconds": 10.0})
    profile, request = step(feed(profile, *(positive(n) for n in range(1, 10))), anchors(1, 0), calm)
    assert request is None
    assert step(feed(profile, positive(10)), anchors(1, 0), calm)[1].ts == 10_000


def test_a_profile_without_new_clicks_stays_the_same_one():
    """What is read back at a restart is not written again."""
    profile, request = step(feed(Profile("u"), *(positive(n) for n in range(1, 4))), None)
    assert request is not None
    done, _ = step(answered(profile, anchors(1, request.ts)), anchors(1, request.ts))
    assert step(done, anchors(1, request.ts)) == (done, None)
    assert step(done, anchors(1, request.ts))[0] is done


def test_an_unknown_item_is_no_miss():
    profile = msgspec.structs.replace(Profile("u"), sequence=1)
    profile, request = step(feed(profile, *(positive(n, "never seen") for n in range(1, 30))), anchors(1, 0))
    assert request is None and profile.drift.n == 0


def test_clicks_at_or_below_the_cursor_are_not_applied_again():
    profile = feed(Profile("u"), positive(1), positive(2))
    assert apply_positive(profile, positive(2), 100) is None
    assert apply_positive(profile, positive(1), 100) is None
    assert apply_positive(profile, Positive(2000, "e9999", "east"), 100) is not None


def test_only_the_newest_positives_are_kept():
    profile = Profile("u")
    for n in range(1, 11):
        profile = apply_positive(profile, positive(n), 4) or profile
    assert [p.ts for p in profile.positives] == [7000, 8000, 9000, 10_000]


def test_state_survives_the_wire():
    profile = feed(Profile("u"), positive(1), positive(2))
    assert msgspec.json.decode(msgspec.json.encode(profile), type=Profile) == profile


@given(st.lists(st.sampled_from(["east", "north", "unknown"]), min_size=1, max_size=30), st.randoms())
def test_the_state_that_has_come_furthest_wins_in_whatever_order_states_are_written(items, order):
    states, profile, in_force = [], Profile("u"), None
    for n, item in enumerate(items, start=1):
        profile = feed(profile, positive(n, item))
        states.append(profile)
        profile, request = step(profile, in_force)
        states.append(profile)
        if request is not None:
            in_force = anchors(request.sequence, request.ts)
            profile = answered(profile, in_force)
            states.append(profile)
    order.shuffle(states)
    kept = None
    for state in states:
        kept = further(kept, state)
    assert kept == profile


@given(
    st.lists(st.tuples(st.sampled_from(["east", "north", "unknown"]), st.integers(0, 2)), min_size=1, max_size=40),
    st.integers(0, 2**32),
)
def test_requests_do_not_depend_on_states_that_a_crash_lost(clicks, seed):
    """States are written after the requests that they tell of; these are answered although the states are lost."""
    ts, log = 0, []
    for n, (item, later) in enumerate(clicks):
        ts += 1000 * later
        log.append(positive(n, item, ts))

    def run(order: random.Random | None) -> tuple[list[AnchorRequest], Profile]:
        profile, in_force, asked, states = Profile("u"), None, {}, [Profile("u")]
        at = 0
        while at < len(log):
            profile = feed(profile, log[at])
            at += 1
            profile, request = step(profile, in_force)
            if request is not None:
                known = asked.setdefault(request.sequence, request)
                assert (known.ts, known.positives) == (request.ts, request.positives)
                if order is None or order.random() < 0.7:
                    in_force = answer(request)
                if order is not None and order.random() < 0.5:
                    # The process dies. Of the states that were written any may be the newest durable one.
                    profile = states[order.randrange(len(states))]
                    at = sum((p.ts, p.event_id) <= profile.cursor for p in log)
                elif in_force is None or in_force.version < request.sequence:
                    in_force = answer(request)
            if in_force is not None:
                profile = answered(profile, in_force)
            states.append(profile)
        return list(asked.values()), profile

    order = random.Random(seed)
    (asked, last), (again, last_again) = run(None), run(order)
    assert [(r.sequence, r.ts, r.reason, r.positives) for r in again] == [
        (r.sequence, r.ts, r.reason, r.positives) for r in asked
    ]
    assert last_again == last


@given(st.lists(st.sampled_from(["east", "north", "unknown"]), min_size=1, max_size=40), st.integers(0, 2**32))
def test_requests_do_not_depend_on_when_answers_arrive(items, seed):
    """Answered at once, or after any number of further clicks: the same requests."""

    def run(delay) -> list[AnchorRequest]:
        profile, in_force, asked = Profile("u"), None, []
        waiting: AnchorRequest | None = None
        arrivals = list(enumerate(items, start=1))
        while arrivals or waiting is not None:
            if waiting is not None and (not arrivals or not delay()):
                in_force = answer(waiting)
                profile, waiting = answered(profile, in_force), None
            elif arrivals:
                n, item = arrivals.pop(0)
                profile = feed(profile, positive(n, item))
            profile, request = step(profile, in_force)
            if request is not None:
                asked.append(request)
                waiting = request
        return asked

    order = random.Random(seed)
    assert run(lambda: False) == run(lambda: order.random() < 0.8)


@given(
    st.lists(st.floats(0, 2), min_size=1, max_size=60),
    st.floats(0, 0.2),
    st.floats(0.01, 2),
    st.integers(1, 10),
)
def test_page_hinkley_alarms_where_river_does(values, delta, threshold, min_values):
    """Against river's implementation, value by value, up to and including its first alarm."""
    theirs = river_drift.PageHinkley(min_values, delta, threshold, alpha=1.0, mode="up")
    ours = PageHinkley()
    for value in values:
        theirs.update(value)
        ours = ours.update(value, delta)
        rise = theirs._sum_increase - theirs._min_increase
        assert math.isclose(ours.cumulative - ours.minimum, rise, rel_tol=1e-9, abs_tol=1e-9)
        assert ours.n == theirs._x_mean.n
        if abs(rise - threshold) > 1e-9:  # the two sum in different orders
            assert ours.alarm(threshold, min_values) == theirs.drift_detected
        if theirs.drift_detected:
            return  # river starts anew then, as a profile does once its request is answered


def test_page_hinkley_alarms_on_a_rise_only():
    low, high = PageHinkley(), PageHinkley()
    for n in range(60):
        low = low.update(0.8 if n < 30 else 0.2, 0.05)
        high = high.update(0.2 if n < 30 else 0.8, 0.05)
    assert not low.alarm(0.5, 5)
    assert high.alarm(0.5, 5)
