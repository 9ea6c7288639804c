"""Metrics of a world against their definitions, and intervals that cover both users and seeds."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import ndcg_score

from gpl.evaluation import report
from gpl.evaluation.judge import Judge, Outcome
from gpl.evaluation.statistics import crossed_comparison, crossed_mean, seed_comparison, seed_mean
from gpl.evaluation.summary import _interval
from gpl.evaluation.world import World
from tests.gpl.evaluation import planted
from tests.gpl.evaluation.test_world import world


@pytest.fixture(scope="module")
def made() -> World:
    return world(planted.full(80))


def judged(made: World, matrix: np.ndarray) -> Outcome:
    return Judge(made, made.judged).judge(lambda users: matrix[users])


def test_against_the_definitions(made: World) -> None:
    matrix = np.random.default_rng(0).normal(size=(made.n_users, made.n_items)).astype(np.float32)
    found = judged(made, matrix)
    for row, user in enumerate(made.judged[:20].tolist()):
        candidates = np.flatnonzero(made.candidates(user))
        relevant = np.isin(candidates, made.relevant[user])
        scores = matrix[user, candidates]
        hits = [(scores[~relevant] > s).sum() < 10 for s in scores[relevant]]
        assert found.per_user["hr@10"][row] == pytest.approx(np.mean(hits))
        pairs = scores[relevant][:, None] > scores[~relevant][None, :]
        assert found.per_user["auc"][row] == pytest.approx(pairs.mean())
        assert found.per_user["ndcg@10"][row] == pytest.approx(ndcg_score([relevant], [scores], k=10))
        tail = made.tail[candidates][relevant]
        expected = np.mean(np.array(hits)[tail]) if tail.any() else np.nan
        assert found.per_user["tail_hr@10"][row] == pytest.approx(expected, nan_ok=True)


def test_the_truth_scores_one_and_equal_scores_earn_what_chance_earns(made: World) -> None:
    truth = np.zeros((made.n_users, made.n_items), dtype=np.float32)
    truth[made.relevant.rows, made.relevant.values] = 1.0
    best, blind = judged(made, truth), judged(made, np.zeros_like(truth))
    for metric in ("hr@3", "hr@10", "tail_hr@10", "ndcg@10", "auc"):
        assert best.mean(metric) == pytest.approx(1.0)
    assert blind.mean("auc") == pytest.approx(0.5)
    irrelevant = np.array([made.candidates(u).sum() - len(made.relevant[u]) for u in made.judged.tolist()])
    assert blind.mean("hr@10") == pytest.approx((10 / (irrelevant + 1)).mean())
    assert blind.mean("exposed_auc") == pytest.approx(0.5)


def test_choices_are_made_by_the_mean_of_both_hit_rates(made: World) -> None:
    matrix = np.random.default_rng(0).normal(size=(made.n_users, made.n_items)).astype(np.float32)
    judge = Judge(made, made.judged)
    found = judge.judge(lambda users: matrix[users])
    assert found.mean("hr@10") != pytest.approx(found.mean("tail_hr@10"))
    goal = judge.goal(lambda users: matrix[users])
    assert goal == pytest.approx((found.mean("hr@10") + found.mean("tail_hr@10")) / 2)
    judge.tail = np.zeros(made.n_items, dtype=bool)  # nothing relevant is in it
    assert judge.goal(lambda users: matrix[users]) == pytest.approx(found.mean("hr@10"))


def test_lists_that_are_all_alike_have_little_coverage_and_a_high_gini(made: World) -> None:
    same = np.tile(np.arange(made.n_items, dtype=np.float32), (made.n_users, 1))
    own = np.random.default_rng(1).normal(size=same.shape).astype(np.float32)
    alike, diverse = judged(made, same), judged(made, own)
    assert alike.mean("coverage") < 0.2 < diverse.mean("coverage")
    assert alike.mean("gini") > 0.9 > diverse.mean("gini")


def test_the_popularity_curve_adds_up_to_the_hits(made: World) -> None:
    matrix = np.random.default_rng(2).normal(size=(made.n_users, made.n_items)).astype(np.float32)
    found = judged(made, matrix)
    sizes = made.relevant.sizes[made.judged]
    assert found.curve[:, 1].sum() == sizes.sum()
    assert found.curve[:, 0].sum() == pytest.approx((found.per_user["hr@10"] * sizes).sum())


def test_crossed_intervals_cover_the_mean_with_effects_of_users_and_of_seeds() -> None:
    covered = 0
    for trial in range(60):
        rng = np.random.default_rng(trial)
        values = 0.3 + rng.normal(0, 0.2, (1, 150)) + rng.normal(0, 0.03, (8, 1)) + rng.normal(0, 0.1, (8, 150))
        interval = crossed_mean(values)
        covered += interval.low <= 0.3 <= interval.high
    assert covered >= 50  # 95% nominal, somewhat less with 8 seeds


def test_resamples_without_a_defined_cell_are_not_zeros() -> None:
    assert crossed_mean(np.array([[0.5, np.nan, np.nan]])) == pytest.approx((0.5, 0.5, 0.5))


def test_comparisons_are_paired() -> None:
    rng = np.random.default_rng(0)
    users = rng.normal(1.0, 0.5, (1, 200))
    second = users + rng.normal(0, 0.05, (5, 200))
    first = second + 0.1 + rng.normal(0, 0.05, (5, 200))
    found = crossed_comparison(first, second)
    assert found.difference.low < 0.1 < found.difference.high
    assert found.difference.high - found.difference.low < 0.03  # the users' own spread has no part in it
    assert found.relative.estimate == pytest.approx(first.mean() / second.mean() - 1)
    gone = first.copy()
    gone[:, :150] = np.nan
    assert crossed_comparison(gone, second).difference.estimate == pytest.approx((first - second)[:, 150:].mean())


def test_figures_of_whole_worlds_have_students_interval() -> None:
    values = np.array([1.0, 2.0, 3.0])
    assert seed_mean(values) == pytest.approx((2.0, 2.0 - 2.4841, 2.0 + 2.4841), abs=1e-3)
    assert np.isnan(seed_mean(values[:1]).low)
    assert seed_comparison(values * 1.1, values).relative.estimate == pytest.approx(0.1)


def test_a_rival_that_may_have_nothing_leaves_the_relative_interval_without_an_upper_end() -> None:
    """One of ten users has all of the rival's hits: a resample without that user, some 35% of them, has none."""
    first, second = np.full((1, 10), 0.5), np.eye(10)[:1]
    found = crossed_comparison(first, second)
    assert found.relative.estimate == pytest.approx(4.0)
    assert found.relative.high == np.inf and 0 < found.relative.low < 4
    assert np.isfinite(found.difference).all()
    assert report._percent(_interval(found.relative)).endswith(", n/a]")
    # Nobody hits anything in such a resample: it says nothing, and the others agree.
    assert crossed_comparison(second * 1.5, second).relative == pytest.approx((0.5, 0.5, 0.5))
    assert np.isnan(crossed_comparison(first, np.zeros_like(first)).relative).all()


def test_seeds_without_both_figures_have_no_part_in_their_comparison() -> None:
    first, second = np.array([1.1, 2.2, np.nan]), np.array([1.0, 2.0, 90.0])
    assert seed_comparison(first, second).relative.estimate == pytest.approx(0.1)
