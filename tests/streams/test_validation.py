"""Progressive figures: hand-made windows whose answers can be counted on paper, and properties of ranks."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpl.preranker.batch import Batch, Example
from streams.trainer.validation import Evaluated, ProgressiveWindow, evaluate, joined, tail_threshold


def batch(*requests: tuple[list[int], int]) -> Batch:
    """Of requests with these clicks on exposed items, and so many unexposed ones."""
    return Batch.collate(
        [
            Example(
                user_row=1,
                item_row=np.arange(1, len(clicked) + hidden + 1),
                content_row=np.arange(len(clicked) + hidden),
                score=np.zeros(len(clicked) + hidden, np.float32),
                clicked=np.array(clicked, np.float32),
                label=np.full(hidden, 0.5, np.float32),
                confidence=np.ones(hidden, np.float32),
            )
            for clicked, hidden in requests
        ]
    )


def ranks(batch: Batch, logits: list[float]) -> list[int]:
    m = int(batch.exposed.sum())
    values = {"gpl": np.array(logits, np.float32)}
    made = evaluate(["u"] * len(batch.user_row), batch, values, np.zeros(m, bool), np.zeros(m, bool))
    return made.rank["gpl"].tolist()


def test_ranks_are_within_the_request_and_ties_count_against_the_model() -> None:
    assert ranks(batch(([1, 0, 1], 1)), [0.5, 0.5, 0.5, 0.5]) == [4, 0, 4]
    assert ranks(batch(([1, 1], 1), ([1], 2)), [3, 1, 2, 9, 10, 11]) == [1, 3, 3]
    assert ranks(batch(([1, 0], 0), ([0, 1], 1)), [1, 2, 3, 5, 4]) == [0, 0, 0, 1]  # nothing to be ranked among


@given(st.lists(st.integers(-50, 50), min_size=1, max_size=30), st.integers(1, 3))
def test_a_rank_counts_what_scores_as_high(values: list[int], hidden: int) -> None:
    logits = [*values, *range(hidden)]
    for value, rank in zip(values, ranks(batch(([1] * len(values), hidden)), logits), strict=False):
        assert rank == sum(other >= value for other in logits)


def test_requests_are_told_apart_and_pseudo_pairs_are_bounded() -> None:
    made = batch(([1, 0], 30), ([0], 2))
    new, tail = np.array([True, False, True]), np.array([False, True, True])
    evaluated = evaluate(["u", "v"], made, {"gpl": np.arange(35, dtype=np.float32)}, new, tail)
    first, second = evaluated.split()
    assert (first.users, second.users) == (["u"], ["v"])
    assert first.logits["gpl"].tolist() == [0, 1] and second.logits["gpl"].tolist() == [32]
    assert first.pseudo["gpl"].tolist() == list(range(2, 22)) and second.pseudo["gpl"].tolist() == [33, 34]
    assert first.clicked.tolist() == [True, False] and second.new.tolist() == [True]
    assert first.tail.tolist() == [False, True] and len(second.label) == 2


def test_tail_is_the_less_popular_half() -> None:
    exposures = np.array([0, 0, 3, 10, 11], np.int64)
    assert (exposures <= tail_threshold(exposures)).tolist() == [True, True, True, False, False]
    assert tail_threshold(np.zeros(0, np.int64)) == 0.0


MODELS = ("gpl", "exposed")


def record(
    user: str,
    clicked: list[int],
    logits: list[float],
    tail: list[bool] | None = None,
    rank: list[int] | None = None,
    new: list[bool] | None = None,
    pseudo: list[tuple[float, float]] = (),  # label, logit
) -> Evaluated:
    """``exposed`` scores the other way round. All in the tail, known and unranked unless told."""
    n, x = len(clicked), np.array(logits, np.float32)
    label, unexposed = np.array(pseudo, np.float32).reshape(-1, 2).T
    return Evaluated(
        users=[user],
        exposed=np.array([n]),
        hidden=np.array([len(label)]),
        clicked=np.array(clicked, bool),
        tail=np.array([True] * n if tail is None else tail, bool),
        new=np.array([False] * n if new is None else new, bool),
        label=label,
        logits={"gpl": x, "exposed": -x},
        rank=dict.fromkeys(MODELS, np.array(rank or [0] * n)),
        pseudo={"gpl": unexposed, "exposed": -unexposed},
    )


def test_figures_of_a_small_window() -> None:
    window = ProgressiveWindow(10, MODELS)
    assert window.summary("gpl") == {}
    window.add(
        joined(
            [
                record("u", [1, 0], [2.0, -1.0], rank=[10, 0]),
                record("v", [0, 1, 0], [1.0, 0.5, 0.0], [False] * 3, [0, 11, 0]),
            ],
            MODELS,
        )
    )
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
    window = ProgressiveWindow(10, MODELS)
    window.add(joined([record("u", [0, 0], [0.1, 0.2])], MODELS))
    figures = window.summary("gpl")
    assert "log_loss" in figures
    assert not {"auc", "gauc", "hr10", "hr10_tail"} & figures.keys()


def test_the_window_slides_and_is_restored_exactly() -> None:
    window = ProgressiveWindow(2, MODELS)
    wrong, right = record("u", [1, 0], [-1.0, 1.0]), record("u", [1, 0], [1 / 3, -1.0])
    window.add(joined([wrong, right], MODELS))
    assert window.summary("gpl")["auc"] == 0.375  # (-1, 1): 0, (-1, -1): a half, (1/3, 1): 0, (1/3, -1): 1
    window.add(joined([right], MODELS))
    assert len(window) == 2
    assert window.summary("gpl")["auc"] == 1.0
    other = ProgressiveWindow(2, MODELS)
    other.add(joined([wrong], MODELS))
    other.restore(*window.state())
    assert other.slices("exposed") == window.slices("exposed")
    assert other.summary("gpl") == window.summary("gpl")


def test_logits_far_from_zero_have_a_finite_loss() -> None:
    window = ProgressiveWindow(2, MODELS)
    window.add(joined([record("u", [1, 0], [-800.0, 800.0])], MODELS))
    assert math.isfinite(window.summary("gpl")["log_loss"])


def test_figures_by_slice_are_those_of_the_items_in_it() -> None:
    window = ProgressiveWindow(10, MODELS)
    window.add(
        joined(
            [
                record("u", [1, 0, 1], [2.0, -1.0, 0.5], tail=[True, True, False], rank=[3, 0, 20], new=[1, 0, 0]),
                record("v", [0, 1], [0.7, 0.1], tail=[False, True], rank=[0, 9], new=[0, 1]),
            ],
            MODELS,
        )
    )
    slices = window.slices("gpl")
    assert slices["all"]["click_rate"] == pytest.approx(3 / 5)
    assert slices["tail"]["hr10"] == 1.0 and slices["head"]["hr10"] == 0.0
    assert slices["tail"]["auc"] == 1.0  # 2.0 and 0.1 against -1.0
    assert slices["head"]["auc"] == 0.0  # 0.5 against 0.7
    assert slices["new"]["click_rate"] == 1.0 and "auc" not in slices["new"]
    assert slices["known"]["hr10"] == 0.0
    assert "auc" not in slices["pseudo"]
    assert window.slices("gpl", newest=1)["all"]["click_rate"] == 0.5
    assert (window.feed(1).exposures, window.feed(1).clicks) == (2, 1)
    assert (window.feed(9).requests, window.feed(9).of_one_user) == (2, 1)


def test_pseudo_figures_are_against_soft_labels() -> None:
    window = ProgressiveWindow(10, MODELS)
    window.add(joined([record("u", [0], [0.0], pseudo=[(1.0, 3.0), (0.0, -3.0), (0.5, 0.0)])], MODELS))
    figures = window.slices("gpl")["pseudo"]
    # Pairs weigh label x (1 - other label). In order: (1, 0) 1, (1, .5) .5, (.5, 0) .5; (.5, itself) .25, a half.
    assert figures["auc"] == pytest.approx((1 + 0.5 + 0.5 + 0.125) / 2.25)
    assert figures["log_loss"] == pytest.approx((2 * math.log1p(math.exp(-3)) + math.log(2)) / 3, abs=1e-6)
    assert window.slices("exposed")["pseudo"]["auc"] < 0.1


@given(st.lists(st.lists(st.tuples(st.booleans(), st.floats(-4, 4, width=32)), min_size=1, max_size=4), max_size=8))
def test_a_restored_window_is_the_same_window(requests: list[list[tuple[bool, float]]]) -> None:
    window = ProgressiveWindow(5, MODELS)
    for n, pairs in enumerate(requests):
        window.add(
            joined(
                [record(f"u{n % 3}", [c for c, _ in pairs], [x for _, x in pairs], pseudo=[(0.3, 0.1)] * (n % 3))],
                MODELS,
            )
        )
    other = ProgressiveWindow(5, MODELS)
    other.restore(*window.state())
    assert [other.slices(model) for model in MODELS] == [window.slices(model) for model in MODELS]
    window.add(joined([record("w", [1], [0.3])], MODELS))
    other.add(joined([record("w", [1], [0.3])], MODELS))
    assert other.summary("gpl") == window.summary("gpl")
