from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpl.labels.calibration import NoCalibration, Platt
from gpl.labels.confidence import dispersion_factor
from gpl.labels.labeller import Config, PreparedAnchors, label, score

LEVELS = 3


def unit(rng, rows, dim=12):
    x = rng.standard_normal((rows, dim)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def anchors_of(rng, count):
    return unit(rng, count), -rng.exponential(4, count).astype(np.float32), rng.random(count).astype(np.float32)


@given(
    matching=st.sampled_from(["max", "kernel"]),
    dispersion=st.booleans(),
    history=st.booleans(),
    generation=st.booleans(),
    count=st.integers(1, 12),
    seed=st.integers(0, 999),
)
@settings(max_examples=80, deadline=None)
def test_labels_equal_a_plain_recomputation(matching, dispersion, history, generation, count, seed):
    rng = np.random.default_rng(seed)
    a, logs, past = anchors_of(rng, count)
    items = unit(rng, 40)
    prepared = PreparedAnchors.build(a, logs, past, LEVELS, Config(matching, 0.2, dispersion, history, generation))
    got = label(prepared, Platt(4.0, -1.0), items)

    cos = items.astype(np.float64) @ a.T.astype(np.float64)
    p = np.exp(logs.astype(np.float64)) / np.exp(logs.astype(np.float64)).sum()
    terms = p * np.exp((cos - 1) / 0.2)
    raw = cos.max(axis=1) if matching == "max" else terms.sum(axis=1)
    best = (cos if matching == "max" else terms).argmax(axis=1)
    confidence = np.ones(len(items))
    power = 1 / max(1, dispersion + history + generation)
    if dispersion:
        confidence *= dispersion_factor(a, logs)
    if history:
        confidence *= past[best]
    if generation:
        confidence *= np.exp(logs[best].astype(np.float64) / LEVELS)
    np.testing.assert_allclose(got.score, raw, atol=1e-6)
    np.testing.assert_allclose(got.label, 1 / (1 + np.exp(-(4 * raw - 1))), atol=2e-6)
    np.testing.assert_array_equal(got.best, best)
    np.testing.assert_allclose(got.confidence, confidence**power, atol=1e-6)
    assert {c.dtype for c in (got.score, got.label, got.confidence)} == {np.dtype(np.float32)}


@given(matching=st.sampled_from(["max", "kernel"]), seed=st.integers(0, 999), count=st.integers(1, 300))
@settings(max_examples=40, deadline=None)
def test_a_label_does_not_depend_on_the_other_candidates_bit_for_bit(matching, seed, count):
    rng = np.random.default_rng(seed)
    items = unit(rng, 400)
    prepared = PreparedAnchors.build(*anchors_of(rng, 10), LEVELS, Config(matching))
    whole = label(prepared, Platt(7.0, -2.0), items)
    some = rng.permutation(len(items))[:count]
    part = label(prepared, Platt(7.0, -2.0), items[some])
    for name in ("score", "label", "confidence", "best"):
        np.testing.assert_array_equal(getattr(part, name), getattr(whole, name)[some])


def test_all_factors_off_is_full_confidence():
    rng = np.random.default_rng(0)
    off = Config(dispersion=False, history=False, generation=False)
    prepared = PreparedAnchors.build(*anchors_of(rng, 5), LEVELS, off)
    assert prepared.weight.tolist() == [1] * 5
    assert label(prepared, NoCalibration(), unit(rng, 7)).confidence.tolist() == [1] * 7


def test_no_items_give_no_labels():
    prepared = PreparedAnchors.build(*anchors_of(np.random.default_rng(0), 3), LEVELS, Config())
    got = label(prepared, NoCalibration(), np.zeros((0, 12), np.float32))
    assert [len(c) for c in (got.score, got.label, got.confidence, got.best)] == [0, 0, 0, 0]
    assert len(score(prepared, np.zeros((0, 12), np.float32))[0]) == 0


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("vectors", np.zeros((0, 4), np.float32)),
        ("vectors", 2 * np.eye(2, 4, dtype=np.float32)),
        ("vectors", np.full((2, 4), np.nan, np.float32)),
        ("logprobs", np.zeros(3, np.float32)),
        ("logprobs", np.float32([np.nan, 0])),
        ("logprobs", np.float32([-1, 2])),
        ("history_factor", np.zeros(3, np.float32)),
        ("history_factor", np.float32([0.5, 1.5])),
        ("history_factor", np.float32([0.5, np.nan])),
        ("levels", 0),
    ],
)
def test_bad_anchors_are_named(field, value):
    good = {
        "vectors": np.eye(2, 4, dtype=np.float32),
        "logprobs": np.float32([-1, -2]),
        "history_factor": np.float32([0.5, 0.5]),
        "levels": 3,
    }
    with pytest.raises(ValueError, match=field):
        PreparedAnchors.build(**{**good, field: value}, config=Config())


def test_bad_configuration_is_named():
    with pytest.raises(ValueError, match="matching: 'mean'"):
        Config(matching="mean")
    with pytest.raises(ValueError, match="kernel_tau: 0"):
        Config(kernel_tau=0)
