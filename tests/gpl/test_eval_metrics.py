from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

from gpl.evaluation.intervals import bootstrap_mean_ci, paired_difference_ci
from gpl.evaluation.metrics import auc, calibration_error, gauc, log_loss

# Few distinct values, so that ties are common.
tied = st.integers(0, 4).map(lambda i: i / 4)
pairs = st.lists(st.tuples(st.integers(0, 1), tied), min_size=1, max_size=40)


def columns(rows):
    return np.array([y for y, _ in rows]), np.array([s for _, s in rows])


@given(pairs)
def test_auc_agrees_with_sklearn(rows):
    y, s = columns(rows)
    if len(set(y)) < 2:
        assert math.isnan(auc(y, s))
    else:
        assert auc(y, s) == pytest.approx(sk.roc_auc_score(y, s))


@given(pairs)
def test_log_loss_agrees_with_sklearn(rows):
    y, p = columns(rows)
    assert log_loss(y, p) == pytest.approx(sk.log_loss(y, np.clip(p, 1e-7, 1 - 1e-7), labels=[0, 1]))


@given(st.lists(st.tuples(st.integers(0, 1), tied, st.sampled_from("abc")), min_size=1, max_size=60))
def test_gauc_is_the_impression_weighted_mean_over_users_with_both_classes(rows):
    y, s, u = (np.array(column) for column in zip(*rows, strict=True))
    total = weight = 0.0
    for user in set(u):
        mine = u == user
        if len(set(y[mine])) == 2:
            total += mine.sum() * sk.roc_auc_score(y[mine], s[mine])
            weight += mine.sum()
    assert gauc(y, s, u) == pytest.approx(total / weight if weight else float("nan"), nan_ok=True)


def test_gauc_by_hand():
    # a: 1 of 1 pairs right, 2 impressions; b: 0 of 2, 3 impressions; c has only clicks.
    y, s, u = [1, 0, 0, 0, 1, 1], [0.9, 0.1, 0.5, 0.6, 0.2, 0.7], list("aabbbc")
    assert gauc(y, s, u) == pytest.approx((1.0 * 2 + 0.0 * 3) / 5)


def test_calibration_error_by_hand():
    # Two bins: predictions .1 and .1 with rate 1/2, .8 and .8 with rate 0.
    assert calibration_error([0, 1, 0, 0], [0.1, 0.1, 0.8, 0.8], bins=2) == pytest.approx((0.4 + 0.8) / 2)
    assert calibration_error([0, 1], [0.5, 0.5]) == 0
    assert math.isnan(calibration_error([], []))


@given(pairs, st.randoms(use_true_random=False))
def test_calibration_error_does_not_depend_on_order_and_is_bounded(rows, random):
    value = calibration_error(*columns(rows))
    random.shuffle(rows)
    assert calibration_error(*columns(rows)) == pytest.approx(value)
    y, p = columns(rows)
    # One bin is the least that binning can find, every prediction its own bin the most.
    assert abs(y.mean() - p.mean()) - 1e-12 <= value <= np.abs(y - p).mean() + 1e-12


def test_calibration_error_tells_calibrated_from_not():
    rng = np.random.default_rng(0)
    p = rng.random(50_000)
    y = rng.random(50_000) < p
    assert calibration_error(y, p) < 0.01
    assert calibration_error(y, p**3) > 0.15
    # Bins of equal mass: each of ten holds a tenth.
    assert calibration_error(y, p, bins=1) == pytest.approx(abs(y.mean() - p.mean()))


@given(st.lists(st.tuples(st.floats(-5, 5), st.integers(0, 4)), min_size=1, max_size=30), st.integers(0, 9))
@settings(max_examples=40, deadline=None)
def test_the_estimate_is_the_mean_and_lies_within(rows, seed):
    values, groups = columns(rows)
    ci = bootstrap_mean_ci(values, groups, seed, resamples=200)
    assert ci.estimate == pytest.approx(values.mean(), abs=1e-12)
    assert ci == bootstrap_mean_ci(values, groups, seed, resamples=200) or len(set(groups)) == 1
    if len(set(groups)) > 1:
        assert values.min() - 1e-9 <= ci.low <= ci.high <= values.max() + 1e-9


def test_intervals_cover_the_truth_about_as_often_as_they_say_when_users_repeat():
    covered = narrow = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        user = np.repeat(np.arange(60), 10)
        values = rng.normal(0, 1, 60)[user] + rng.normal(0, 0.3, 600)  # ten outcomes of a user are nearly one
        low, high = bootstrap_mean_ci(values, user, seed, resamples=300)[1:]
        covered += low <= 0 <= high
        low, high = bootstrap_mean_ci(values, np.arange(600), seed, resamples=300)[1:]
        narrow += low <= 0 <= high
    assert 0.89 <= covered / 200 <= 0.985
    assert narrow / 200 < 0.7  # what ignoring the users would claim


def test_resampling_whole_users_of_unequal_size_is_resampling_their_rows():
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(12), rng.integers(1, 40, 12))
    values = rng.normal(0, 1, 12)[groups] + groups * (groups > 8)
    rows = [values[groups == g] for g in range(12)]
    means = [np.concatenate([rows[g] for g in rng.integers(0, 12, 12)]).mean() for _ in range(4000)]
    ci = bootstrap_mean_ci(values, groups, seed=1, level=0.8, resamples=4000)
    np.testing.assert_allclose(ci[1:], np.quantile(means, [0.1, 0.9]), rtol=0.06)


def test_a_paired_difference_is_tighter_than_two_intervals_and_excludes_zero():
    rng = np.random.default_rng(0)
    user = np.repeat(np.arange(100), 5)
    base = rng.normal(0, 1, 100)[user]
    ours = base + 0.05 + rng.normal(0, 0.1, 500)
    difference = paired_difference_ci(ours, base, user, seed=1)
    assert difference.estimate == pytest.approx((ours - base).mean())
    assert 0 < difference.low < difference.high < 0.1
    assert bootstrap_mean_ci(ours, user, 1).low < bootstrap_mean_ci(base, user, 1).high


def test_resampling_in_parts_gives_one_sound_interval(monkeypatch):
    values, groups = np.random.default_rng(0).random(400), np.arange(400) % 50
    whole = bootstrap_mean_ci(values, groups, seed=3, resamples=500)
    monkeypatch.setattr("gpl.evaluation.intervals._CHUNK", 120)
    assert bootstrap_mean_ci(values, groups, seed=3, resamples=500) == whole


def test_undefined_values_are_left_out():
    nan = float("nan")
    with_nan = bootstrap_mean_ci([1, nan, 3, 5], ["a", "a", "b", "c"], seed=0)
    assert with_nan == bootstrap_mean_ci([1, 3, 5], ["a", "b", "c"], seed=0)
    assert all(math.isnan(x) for x in bootstrap_mean_ci([nan], ["a"], seed=0))
    assert paired_difference_ci([1, nan, 2], [0, 1, nan], ["a", "b", "c"], seed=0).estimate == 1
    one = bootstrap_mean_ci([1, 2], ["a", "a"], seed=0)
    assert one.estimate == 1.5 and math.isnan(one.low) and math.isnan(one.high)


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: auc([0, 2], [0, 1]), "clicks: 2"),
        (lambda: auc([0, 1], [0]), "scores"),
        (lambda: auc([0, 1], [0, float("nan")]), "scores: nan at 1"),
        (lambda: gauc([0, 1], [0, 1], ["a"]), "users"),
        (lambda: log_loss([0, 1], [0, 1.5]), "probabilities: 1.5"),
        (lambda: calibration_error([0, 1], [0, 1], bins=0), "bins: 0"),
        (lambda: bootstrap_mean_ci([1], [1, 2], 0), "groups"),
        (lambda: bootstrap_mean_ci([1], [1], 0, level=1.0), "level: 1.0"),
        (lambda: bootstrap_mean_ci([1], [1], 0, resamples=0), "resamples: 0"),
        (lambda: paired_difference_ci([1], [1, 2], [1], 0), "second"),
    ],
)
def test_bad_input_is_named(call, named):
    with pytest.raises(ValueError, match=named):
        call()
