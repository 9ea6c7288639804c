"""Progressive figures: hand-made windows whose answers can be counted on paper, and properties of ranks."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streams.trainer.validation import Evaluated, ProgressiveWindow, ranks, tail_threshold


def test_ties_count_against_the_model() -> None:
    assert ranks(np.array([0.5, 0.5, 0.5], np.float32), [0, 2]) == [3, 3]
    assert ranks(np.array([3, 1, 2], np.float32), [0, 1, 2]) == [1, 3, 2]


@given(st.lists(st.integers(-50, 50), min_size=1, max_size=30))
def test_a_rank_is_one_more_than_what_scores_higher_when_scores_differ(values: list[int]) -> None:
    scores = np.array(values, np.float32)
    for i, rank in enumerate(ranks(scores, range(len(values)))):
        higher = sum(v > values[i] for v in values)
        equal = values.count(values[i])
        assert rank == higher + equal


def test_tail_is_the_less_popular_half() -> None:
    exposures = np.array([0, 0, 3, 10, 11], np.int64)
    assert (exposures <= tail_threshold(exposures)).tolist() == [True, True, True, False, False]
    assert tail_threshold(np.zeros(0, np.int64)) == 0.0


def record(user: str, clicked: list[int], logits: list[float], tail: list[bool], rank: list[int]) -> Evaluated:
    return Evaluated(
        user, clicked, {"gpl": logits, "exposed": [-x for x in logits]}, tail, {"gpl": rank, "exposed": rank}
    )


def test_figures_of_a_small_window() -> None:
    window = ProgressiveWindow(10)
    assert window.summary("gpl") == {}
    window.add([record("u", [1, 0], [2.0, -1.0], [True], [10]), record("v", [0, 1, 0], [1.0, 0.5, 0.0], [False], [11])])
    figures = window.summary("gpl")
    # Of the 2 x 3 pairs (click, no click), all but (0.5, 1.0) are in order.
    assert figures["auc"] == pytest.approx(5 / 6)
    assert figures["hr10"] == 0.5
    assert figures["hr10_tail"] == 1.0
    expected = [math.log1p(math.exp(-2)), math.log1p(math.exp(-1)), math.log1p(math.e)]
    expected += [math.log1p(math.exp(-0.5)), math.log(2)]
    assert figures["log_loss"] == pytest.approx(np.mean(expected))
    assert 0.5 < figures["gauc"] < 1.0  # u is in order, v half so
    assert window.summary("exposed")["auc"] == pytest.approx(1 / 6)


def test_figures_that_are_not_defined_are_left_out() -> None:
    window = ProgressiveWindow(10)
    window.add([record("u", [0, 0], [0.1, 0.2], [], [])])
    figures = window.summary("gpl")
    assert "log_loss" in figures
    assert not {"auc", "gauc", "hr10", "hr10_tail"} & figures.keys()
    assert window.summary("never trained") == {}


def test_the_window_slides_and_is_restored_exactly() -> None:
    window = ProgressiveWindow(2)
    wrong, right = record("u", [1, 0], [-1.0, 1.0], [], []), record("u", [1, 0], [1 / 3, -1.0], [], [])
    window.add([wrong, right])
    assert window.summary("gpl")["auc"] == 0.375  # (-1, 1): 0, (-1, -1): a half, (1/3, 1): 0, (1/3, -1): 1
    window.add([right])
    assert len(window) == 2
    assert window.summary("gpl")["auc"] == 1.0
    other = ProgressiveWindow(2)
    other.add([wrong])
    other.restore(window.state())
    assert other.summary("gpl") == window.summary("gpl")


def test_logits_far_from_zero_have_a_finite_loss() -> None:
    window = ProgressiveWindow(2)
    window.add([record("u", [1, 0], [-800.0, 800.0], [], [])])
    assert math.isfinite(window.summary("gpl")["log_loss"])
