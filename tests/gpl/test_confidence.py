from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpl.labels.confidence import confidence, dispersion_factor, generation_factor, history_factor


def unit(rng, rows, dim=6):
    x = rng.standard_normal((rows, dim)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


@given(count=st.integers(2, 12), seed=st.integers(0, 999), spread=st.floats(0, 20))
@settings(max_examples=60, deadline=None)
def test_dispersion_is_the_documented_sum_over_pairs(count, seed, spread):
    rng = np.random.default_rng(seed)
    a, logs = unit(rng, count), (-spread * rng.random(count)).astype(np.float32)
    p = np.exp(logs.astype(np.float64))
    p /= p.sum()
    pairs = list(combinations(range(count), 2))
    weights = [p[j] * p[k] for j, k in pairs]
    distances = [1 - float(a[j].astype(np.float64) @ a[k].astype(np.float64)) for j, k in pairs]
    expected = min(1.0, max(0.0, 1 - np.dot(weights, distances) / sum(weights)))
    assert dispersion_factor(a, logs) == pytest.approx(expected, abs=1e-9)


def test_dispersion_by_hand():
    # cosines 0 (1, 2), 1 (1, 3), 0 (2, 3) with equal weights: D = (1 + 0 + 1) / 3
    a = np.array([[1, 0], [0, 1], [1, 0]], np.float32)
    assert dispersion_factor(a, np.zeros(3, np.float32)) == pytest.approx(1 / 3)


def test_dispersion_limits():
    one = np.array([[1, 0]], np.float32)
    assert dispersion_factor(one, np.float32([-4])) == 1.0
    assert dispersion_factor(np.repeat(one, 5, axis=0), np.linspace(-1, -9, 5)) == pytest.approx(1.0)
    assert dispersion_factor(np.concatenate([one, -one]), np.float32([-1, -2])) == 0.0
    # The second beam's probability underflows: one anchor is left.
    assert dispersion_factor(np.concatenate([one, -one]), np.float64([0, -2000])) == 1.0


@given(count=st.integers(1, 8), past=st.integers(1, 20), seed=st.integers(0, 999))
@settings(max_examples=40, deadline=None)
def test_history_is_the_nearest_past_item(count, past, seed):
    rng = np.random.default_rng(seed)
    a, h = unit(rng, count), unit(rng, past)
    expected = [max(0.0, max(float(x @ y) for y in h)) for x in a]
    np.testing.assert_allclose(history_factor(a, h), expected, atol=1e-6)


def test_history_limits():
    a = np.array([[1, 0], [0, 1], [-1, 0]], np.float32)
    assert history_factor(a, np.array([[1, 0]], np.float32)).tolist() == [1, 0, 0]
    assert history_factor(a, np.zeros((0, 2), np.float32)).tolist() == [0, 0, 0]


def test_generation_is_the_geometric_mean_token_probability():
    tokens = np.array([[0.5, 0.25, 0.1], [0.9, 0.9, 0.9]])
    factor = generation_factor(np.log(tokens.prod(axis=1)).astype(np.float32), levels=3)
    np.testing.assert_allclose(factor, [(0.5 * 0.25 * 0.1) ** (1 / 3), 0.9], rtol=1e-6)
    assert generation_factor(np.float32([0, -np.inf]), levels=3).tolist() == [1, 0]


def test_confidence_is_the_geometric_mean_of_what_is_there():
    a, b = np.float32([0.5, 0.0, 1.0]), np.float32([0.25, 0.9, 1.0])
    np.testing.assert_allclose(confidence([0.125, a, b], 3), [0.25, 0.0, 0.5], rtol=1e-6)
    np.testing.assert_allclose(confidence([a], 3), a)
    assert confidence([], 2).tolist() == [1, 1]


def test_bad_input_is_named():
    a = np.eye(2, dtype=np.float32)
    with pytest.raises(ValueError, match="vectors"):
        dispersion_factor(a, np.zeros(3))
    with pytest.raises(ValueError, match="history"):
        history_factor(a, np.ones((1, 3), np.float32))
    with pytest.raises(ValueError, match="levels: 0"):
        generation_factor(np.float32([-1]), 0)
    with pytest.raises(ValueError, match="logprobs"):
        generation_factor(np.float32([0.5]), 3)
