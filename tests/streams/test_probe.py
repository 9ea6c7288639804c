"""The probe: drift of scores and of their order, counted by hand and by properties; and where a trainer starts."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streams.models import NO_PROBE, Probe
from streams.trainer import probe
from streams.trainer.start import StartFrom

ASKED = Probe(["u", "v"], [["z"], []], [["a", "b", "c"], ["d", "a"]], [[0.5, None, 0.1], [None, 0.2]], [])


def model(of: dict[str, float]) -> Any:
    """Scores by item; an item that it does not name is unknown."""

    def score(user: str, history: list[str], items: list[str], raw: np.ndarray) -> Any:
        assert history == {"u": ["z"], "v": []}[user]
        return np.array([of.get(i, 0.0) for i in items], np.float32), np.array([i in of for i in items])

    return score


BASE = {"a": 1.0, "b": 2.0, "c": 3.0, "d": 4.0}


def test_a_model_agrees_with_itself_and_unknown_items_are_left_out() -> None:
    answered = probe.answered(ASKED, model(BASE))
    assert answered.logits == [[1, 2, 3], [4, 1]]
    same = probe.compare(answered, model(BASE))
    assert same == {"finite": 1.0, "psi": 0.0, "agreement": pytest.approx(1.0)}
    fewer = probe.answered(ASKED, model({"a": 1.0, "d": 4.0}))
    assert fewer.history == ASKED.history
    assert (fewer.items, fewer.score) == ([["a"], ["d", "a"]], [[0.5], [None, 0.2]])
    assert "agreement" not in probe.compare(fewer, model(BASE))  # no request of three items
    assert probe.compare(answered, model({})) == {} and probe.compare(NO_PROBE, model(BASE)) == {}


def test_order_and_level_are_told_apart() -> None:
    answered = probe.answered(ASKED, model(BASE))
    shifted = probe.compare(answered, model({item: x + 100 for item, x in BASE.items()}))
    assert shifted["agreement"] == pytest.approx(1) and shifted["psi"] > 1
    turned = probe.compare(answered, model({"a": 3.0, "b": 2.0, "c": 1.0, "d": 4.0}))
    assert turned["agreement"] == pytest.approx(-1)
    assert probe.compare(answered, model(dict.fromkeys(BASE, 1.0)))["agreement"] == 0
    assert probe.compare(answered, model({**BASE, "b": float("nan")})) == {"finite": 0.0}
    assert probe.compare(answered, model({**BASE, "b": float("inf")})) == {"finite": 0.0}


def test_psi_of_a_hand_made_case() -> None:
    before = np.arange(10, dtype=np.float32)
    # All in the upper half: five bins of a tenth become empty (floored at .001), five hold a fifth.
    now = np.repeat(np.arange(5, 10, dtype=np.float32), 2)
    expected = 5 * (0.2 - 0.1) * np.log(2) + 5 * (0.001 - 0.1) * np.log(0.001 / 0.1)
    assert probe.psi(before, now) == pytest.approx(expected)
    assert np.isnan(probe.psi(before, np.zeros(0, np.float32)))


@given(
    st.lists(st.floats(-5, 5, width=32), min_size=1, max_size=50),
    st.lists(st.floats(-5, 5, width=32), min_size=1, max_size=50),
)
def test_psi_is_never_negative_and_zero_for_the_same(one: list[float], other: list[float]) -> None:
    a, b = np.array(one, np.float32), np.array(other, np.float32)
    assert probe.psi(a, b) >= 0
    assert probe.psi(a, a) == 0


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        ("latest", "latest", 0),
        ("earliest", "earliest", 0),
        ("step-1234", "step", 1234),
        ("ts=1769860800000", "time", 1_769_860_800_000),
        ("2026-01-31T12:00", "time", 1_769_860_800_000),
        ("2026-01-31T13:00+01:00", "time", 1_769_860_800_000),
        ("before=2026-01-31T12:00", "before", 1_769_860_800_000),
    ],
)
def test_where_to_start_is_read(text: str, kind: str, value: int) -> None:
    found = StartFrom.parse(text)
    assert (found.kind, found.value, found.skip_to) == (kind, value, None)
    skipping = StartFrom.parse(text, "ts=7")
    assert (skipping.kind, skipping.value, skipping.skip_to) == (kind, value, 7)


@pytest.mark.parametrize("text", ["", "newest", "step-", "step-x", "before=", "before=soon", "ts=now", "last week"])
def test_what_is_no_start_is_said(text: str) -> None:
    with pytest.raises(ValueError, match="start-from: "):
        StartFrom.parse(text)
    with pytest.raises(ValueError, match="skip-to: "):
        StartFrom.parse("latest", "yesterday")
