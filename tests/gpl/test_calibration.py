from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression

from gpl.labels.calibration import Isotonic, NoCalibration, Platt, calibration_from_dict, fit_calibration


def smoothed(clicks):
    positives, n = clicks.sum(), len(clicks)
    return np.where(clicks == 1, (positives + 1) / (positives + 2), 1 / (n - positives + 2))


def cross_entropy(slope, intercept, scores, clicks):
    z = slope * scores + intercept
    return (np.logaddexp(0, z) - smoothed(clicks) * z).mean()


@given(
    n=st.integers(20, 300),
    slope=st.floats(0, 12),
    shift=st.floats(-3, 3),
    scale=st.sampled_from([1e-3, 0.1, 1.0]),
    seed=st.integers(0, 999),
)
@settings(max_examples=60, deadline=None)
def test_fit_is_the_constrained_maximum_of_the_smoothed_likelihood(n, slope, shift, scale, seed):
    rng = np.random.default_rng(seed)
    scores = rng.normal(0.2, scale, n)
    clicks = (rng.random(n) < 1 / (1 + np.exp(-(slope * scores / scale + shift)))).astype(float)
    fit = Platt.fit(scores, clicks)
    best = cross_entropy(fit.slope, fit.intercept, scores, clicks)
    assert fit.slope >= 0
    assert fit.fitted_on == n
    for step in (1e-3, -1e-3):
        assert best <= cross_entropy(max(0, fit.slope + step / scale), fit.intercept, scores, clicks) + 1e-12
        assert best <= cross_entropy(fit.slope, fit.intercept + step, scores, clicks) + 1e-12


def test_fit_agrees_with_logistic_regression_where_smoothing_fades():
    rng = np.random.default_rng(0)
    scores = rng.uniform(-1, 1, 20_000)
    clicks = (rng.random(20_000) < 1 / (1 + np.exp(-(4 * scores - 1)))).astype(int)
    fit = Platt.fit(scores, clicks)
    reference = LogisticRegression(C=1e9).fit(scores[:, None], clicks)
    assert fit.slope == pytest.approx(reference.coef_[0, 0], rel=0.01)
    assert fit.intercept == pytest.approx(reference.intercept_[0], rel=0.01)


def test_scores_that_clicks_run_against_give_the_base_rate():
    scores = np.linspace(-0.5, 0.9, 100)
    fit = Platt.fit(scores, scores < 0)
    assert fit.slope == 0
    clicks = (scores < 0).astype(float)
    np.testing.assert_allclose(fit.apply(np.float32([-1, 0, 1])), smoothed(clicks).mean(), rtol=1e-6)


@pytest.mark.parametrize("clicked", [0, 1])
def test_one_class_is_finite_and_smoothed(clicked):
    fit = Platt.fit(np.linspace(0, 1, 8), np.full(8, clicked))
    # Targets are all (8 + 1) / (8 + 2), or 1 / (8 + 2): the label does not reach 1 or 0.
    np.testing.assert_allclose(fit.apply(np.float32([0, 1])), 0.9 if clicked else 0.1, atol=1e-5)


@pytest.mark.parametrize("gap", [1e-6, 0.5, 1e6])
def test_separable_scores_are_finite(gap):
    fit = Platt.fit(np.array([0.0] * 5 + [gap] * 5), np.array([0] * 5 + [1] * 5))
    np.testing.assert_allclose(fit.apply(np.array([0.0, gap])), [1 / 7, 6 / 7], atol=1e-4)


def test_constant_scores_give_the_base_rate():
    fit = Platt.fit(np.full(6, 0.3), [1, 0, 0, 1, 0, 0])
    assert fit.slope == 0
    assert fit.apply(np.float32([0.3]))[0] == pytest.approx((2 * 3 / 4 + 4 * 1 / 6) / 6)


@given(
    slope=st.floats(0, 1e4), intercept=st.floats(-1e3, 1e3), scores=st.lists(st.floats(-1, 1), min_size=2, max_size=50)
)
@settings(deadline=None)
def test_apply_is_monotone_and_a_probability(slope, intercept, scores):
    ordered = np.sort(np.array(scores, np.float32))
    for calibration in (Platt(slope, intercept), Isotonic((-0.5, 0.0, 0.25), (0.1, 0.1, 1.0)), NoCalibration()):
        labels = calibration.apply(ordered)
        assert labels.dtype == np.float32
        assert (np.diff(labels) >= 0).all()
        assert ((labels >= 0) & (labels <= 1)).all()


def test_no_calibration_is_linear():
    assert NoCalibration().apply(np.float32([-1, 0, 0.5, 1])).tolist() == [0, 0.5, 0.75, 1]


def pool_adjacent_violators(targets):
    """Plain PAVA over targets in order of distinct scores."""
    blocks = []
    for value in targets:
        blocks.append([value, 1])
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            (a, m), (b, n) = blocks[-2:]
            blocks[-2:] = [[(a * m + b * n) / (m + n), m + n]]
    return np.concatenate([[value] * size for value, size in blocks])


@given(n=st.integers(1, 200), slope=st.floats(-8, 8), seed=st.integers(0, 999))
@settings(max_examples=60, deadline=None)
def test_isotonic_is_pool_adjacent_violators_on_smoothed_clicks(n, slope, seed):
    rng = np.random.default_rng(seed)
    scores = np.unique(rng.uniform(-1, 1, n))
    clicks = (rng.random(len(scores)) < 1 / (1 + np.exp(-slope * scores))).astype(float)
    mixed = rng.permutation(len(scores))
    fit = Isotonic.fit(scores[mixed], clicks[mixed])
    np.testing.assert_allclose(fit.apply(scores), pool_adjacent_violators(smoothed(clicks)), atol=1e-6)
    assert fit.fitted_on == len(scores)
    # Outside the range that was seen, the nearest end.
    np.testing.assert_array_equal(fit.apply(np.array([-9.0, 9.0])), fit.apply(scores[[0, -1]]))


def test_isotonic_follows_a_form_that_platt_cannot():
    rng = np.random.default_rng(0)
    scores = rng.uniform(-1, 1, 20_000)
    chance = np.where(scores > 0.3, 0.6, 0.1)
    clicks = rng.random(20_000) < chance
    errors = {
        kind: np.abs(fit_calibration(kind, scores, clicks).apply(scores) - chance).mean()
        for kind in ("platt", "isotonic", "none")
    }
    assert errors["isotonic"] < 0.02 < errors["platt"] < errors["none"]


@pytest.mark.parametrize(
    "calibration",
    [Platt(3.25, -1.5, 40), Platt(0.1 + 0.2, 1e-17), Isotonic((-0.1, 0.3), (1 / 3, 0.7), 9), NoCalibration()],
)
def test_json_round_trip_is_exact(calibration):
    assert calibration_from_dict(json.loads(json.dumps(calibration.to_dict()))) == calibration


@pytest.mark.parametrize(
    ("scores", "clicks", "named"),
    [
        ([], [], "scores"),
        ([0.1, float("nan")], [0, 1], "scores: nan at 1"),
        ([0.1, 0.2], [1], "clicks"),
        ([0.1, 0.2], [1, 2], "clicks: 2.0 at 1"),
    ],
)
def test_fit_refuses(scores, clicks, named):
    with pytest.raises(ValueError, match=named):
        Platt.fit(scores, clicks)


def test_values_are_checked():
    with pytest.raises(ValueError, match=r"slope: -1\.0"):
        Platt(-1.0, 0.0)
    with pytest.raises(ValueError, match="intercept: inf"):
        Platt(1.0, float("inf"))
    with pytest.raises(ValueError, match="kind: 'beta'"):
        calibration_from_dict({"kind": "beta"})
    for scores, labels, named in (
        ((), (), "labels: 0"),
        ((0.1, 0.1), (0.1, 0.2), "scores"),
        ((0.1, 0.2), (0.3, 0.2), "labels"),
        ((0.1,), (1.5,), "labels"),
    ):
        with pytest.raises(ValueError, match=named):
            Isotonic(scores, labels)
