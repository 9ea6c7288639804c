from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from streams.watermark import END, NEVER, Watermark


def test_the_slowest_source_decides():
    watermark = Watermark(["recalls", "feedback"], 10)
    watermark.observe("recalls", 100)
    assert watermark.value() == NEVER
    watermark.observe("feedback", 50)
    assert watermark.value() == 40


def test_an_idle_source_stops_counting_until_it_speaks_again():
    watermark = Watermark(["recalls", "feedback"], 10)
    watermark.observe("recalls", 100)
    watermark.idle("feedback")
    assert watermark.value() == 90
    watermark.idle("recalls")
    assert watermark.value() == END
    assert watermark.event_time == 90
    watermark.observe("feedback", 30)
    # It never falls: what feedback says now is late.
    assert watermark.value() == 90


@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 1000))))
def test_never_falls_and_trails_every_source_by_the_lateness(events):
    watermark = Watermark("ab", 7)
    newest = {"a": NEVER, "b": NEVER}
    before = NEVER
    for name, ts in events:
        watermark.observe(name, ts)
        newest[name] = max(newest[name], ts)
        value = watermark.value()
        assert value >= before
        if min(newest.values()) != NEVER:
            assert value == max(before, min(newest.values()) - 7)
        before = value
