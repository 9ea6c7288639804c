"""The simulated upstream and the split of its output into what is fitted on and what is streamed."""

from __future__ import annotations

import threading
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streams.contracts import Feedback, decode, encode
from streams.demo.stream import Pacer
from streams.demo.timeline import Event, Split, Timeline
from streams.demo.upstream import MET, POPULARITY, Rating, UpstreamConfig, pages, simulate

CATALOGUE = [f"i{n}" for n in range(60)]
CONFIG = UpstreamConfig(candidates=40, popular=10, cooccur=10, ahead=5, page=4)
CAP = 2**20

ratings = st.lists(
    st.builds(
        Rating,
        user_id=st.sampled_from(["u", "v", "w"]),
        item_id=st.sampled_from(CATALOGUE),
        ts=st.integers(0, 20_000).map(lambda second: second * 1000),
        value=st.sampled_from([1.0, 3.0, 4.0, 5.0]),
    ),
    max_size=80,
)


@settings(max_examples=50, deadline=None)
@given(ratings)
def test_a_request_holds_what_its_user_met_and_no_item_twice(history):
    out = list(simulate(history, CATALOGUE, CONFIG))
    assert sum(e.kind == "impression" for _, f in out for e in f) == len({(r.user_id, r.item_id) for r in history})
    seen = {}
    for recall, feedback in out:
        mine = seen.setdefault(recall.user_id, set())
        shown = [event.item_id for event in feedback if event.kind == "impression"]
        assert len(set(recall.candidates)) == len(recall.candidates) <= CONFIG.candidates
        assert 1 <= len(shown) <= CONFIG.page
        assert set(shown) <= set(recall.candidates)
        assert not mine & set(recall.candidates)
        named = dict(zip(recall.candidates, recall.sources, strict=True))
        assert all(MET in named[item].split("+") for item in shown)
        assert all(recall.ts < event.ts for event in feedback)
        mine.update(shown)


@settings(max_examples=25, deadline=None)
@given(ratings)
def test_events_have_unique_ids_and_a_user_no_two_at_one_time(history):
    events = [event for _, feedback in simulate(history, CATALOGUE, CONFIG) for event in feedback]
    assert len({event.event_id for event in events}) == len(events)
    assert len({(event.user_id, event.ts) for event in events}) == len(events)


def test_a_click_is_a_high_rating_just_after_its_impression():
    history = [Rating("u", "i1", 1000, 4.0), Rating("u", "i2", 1000, 3.5)]
    ((_, feedback),) = simulate(history, CATALOGUE, CONFIG)
    assert [(e.item_id, e.kind, e.ts, e.position) for e in feedback] == [
        ("i1", "impression", 1000, 0),
        ("i1", "click", 1003, 0),
        ("i2", "impression", 1010, 1),
    ]


def test_pages_break_at_the_gap_and_at_the_size():
    history = [Rating("u", f"i{n}", n * 1000, 5.0) for n in range(6)] + [Rating("u", "i9", 6_000_000, 5.0)]
    found = pages(history, CONFIG)
    assert [[r.item_id for r in page.ratings] for page in found] == [["i0", "i1", "i2", "i3"], ["i4", "i5"], ["i9"]]
    assert found[0].ahead == ["i4", "i5", "i9"]
    assert all(a.recall_ts < b.recall_ts for a, b in pairwise(found))


def test_popularity_is_as_of_the_request():
    history = [Rating(f"p{n}", "i7", n * 1000, 5.0) for n in range(3)] + [Rating("u", "i1", 2000, 5.0)]
    sources = {
        recall.user_id: dict(zip(recall.candidates, recall.sources, strict=True))
        for recall, _ in simulate(history, CATALOGUE, CONFIG)
    }
    assert POPULARITY in sources["u"]["i7"]
    assert POPULARITY not in sources["p0"].get("i7", "")  # nobody had rated it before
    assert POPULARITY not in sources["u"]["i1"]


def test_only_the_met_source_sees_the_future():
    past = [Rating("u", f"i{n}", n * 1000, 5.0) for n in range(4)]
    first = next(simulate([*past, Rating("v", "i50", 10**7, 5.0)], CATALOGUE, CONFIG))
    second = next(simulate([*past, Rating("v", "i51", 10**7, 5.0)], CATALOGUE, CONFIG))
    assert first == second


def test_the_seed_decides():
    history = [Rating("u", f"i{n}", n * 1000, 5.0) for n in range(8)]
    assert list(simulate(history, CATALOGUE, CONFIG)) == list(simulate(history, CATALOGUE, CONFIG))
    other = UpstreamConfig(candidates=40, popular=10, cooccur=10, ahead=5, page=4, seed=1)
    assert list(simulate(history, CATALOGUE, CONFIG)) != list(simulate(history, CATALOGUE, other))


def test_candidates_must_hold_what_the_user_met():
    with pytest.raises(ValueError, match="candidates: 20 must hold"):
        UpstreamConfig(candidates=20)


@pytest.fixture
def directory(tmp_path):
    history = [Rating(f"u{n % 3}", f"i{n}", n * 60_000, 5.0 if n % 2 else 2.0) for n in range(48)]
    out = list(simulate(history, CATALOGUE, CONFIG))
    # Files need not be in time order.
    (tmp_path / "recalls.jsonl").write_bytes(b"".join(encode(recall) + b"\n" for recall, _ in reversed(out)))
    feedback = [event for _, events in reversed(out) for event in events]
    (tmp_path / "feedback.jsonl").write_bytes(b"".join(encode(event) + b"\n" for event in feedback))
    return tmp_path


def test_fitting_and_streaming_part_all_feedback_between_them(directory):
    split = Split.of(directory, 0.5, CAP)
    timeline = Timeline.build(directory, split, CAP)
    trained = {event.event_id for event in split.training(directory, CAP)}
    streamed = [decode(Feedback, event.value) for event in timeline if event.topic == "feedback"]
    every = set((directory / "feedback.jsonl").read_bytes().splitlines())
    assert len(trained) + len(streamed) == len(every)
    assert not trained & {event.event_id for event in streamed}
    assert {event.request_id for event in streamed} == set(timeline.requests)
    assert trained and streamed


def test_the_timeline_is_in_event_time_order_byte_for_byte(directory):
    timeline = Timeline.build(directory, Split.of(directory, 0.25, CAP), CAP)
    events = list(timeline)
    assert len(events) == len(timeline) == timeline.recalls + timeline.feedback
    assert all(a.ts <= b.ts for a, b in pairwise(events))
    every = (directory / "recalls.jsonl").read_bytes() + (directory / "feedback.jsonl").read_bytes()
    assert {event.value for event in events} <= set(every.splitlines())
    assert timeline.span_seconds == (events[-1].ts - events[0].ts) / 1000


def test_a_line_that_is_no_record_follows_the_line_before_it(directory):
    path = directory / "recalls.jsonl"
    first, rest = path.read_bytes().split(b"\n", 1)
    path.write_bytes(first + b"\nnonsense\n" + b"x" * 2000 + b"\n" + rest)
    timeline = Timeline.build(directory, Split.of(directory, 0.5, 1024), 1024)
    values = [event.value for event in timeline if event.topic == "recalls"]
    assert values[values.index(first) + 1] == b"nonsense"
    assert (timeline.unreadable, timeline.over_cap) == (1, 1)


def test_without_feedback_there_is_nothing_to_split(directory):
    (directory / "feedback.jsonl").write_bytes(b"\n")
    with pytest.raises(ValueError, match=r"feedback\.jsonl: no valid record"):
        Split.of(directory, 0.5, CAP)


class Collected:
    """Where a Pacer's events go, in place of a broker."""

    def __init__(self):
        self.sent = []

    def send(self, topic, key, value):
        self.sent.append((topic, key, value))

    def flush(self):
        self.sent.append("flushed")


def test_the_pacer_sends_all_in_order_under_the_users_key_and_waits_while_held():
    def events():
        for n in range(3):
            yield Event(n, "feedback", b'{"user_id": "u%d", "more": 1}' % n)
            if n == 0:
                pacer.held = True
                first.set()
        yield Event(3, "recalls", b"nonsense")

    first, collected = threading.Event(), Collected()
    pacer = Pacer(collected, events(), speed=1e9)
    pacer.start()
    assert first.wait(10)
    pacer.held = False
    pacer.join(10)
    assert pacer.error is None and pacer.event_ts == 3
    assert [key for _, key, _ in collected.sent[:-1]] == [b"u0", b"u1", b"u2", None]
    assert collected.sent[-1] == "flushed"


def test_a_stopped_pacer_sends_nothing_more_even_while_held():
    collected = Collected()
    pacer = Pacer(collected, iter([Event(0, "feedback", b"{}")]), speed=1.0)
    pacer.held = True
    pacer.start()
    pacer.stop()
    pacer.join(10)
    assert not pacer.is_alive() and collected.sent == []
