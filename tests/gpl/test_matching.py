from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpl.labels.matching import BLOCK_ITEMS, cosines, kernel, max_cosine, softmax


def unit(rng, rows, dim):
    x = rng.standard_normal((rows, dim)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


@given(
    anchors=st.integers(1, 33),
    items=st.integers(0, 300),
    dim=st.sampled_from([1, 2, 7, 64, 100]),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_max_cosine_is_the_plain_definition(anchors, items, dim, seed):
    rng = np.random.default_rng(seed)
    a, e = unit(rng, anchors, dim), unit(rng, items, dim)
    score, best = max_cosine(a, e)
    exact = e.astype(np.float64) @ a.T.astype(np.float64)
    assert score.dtype == np.float32
    assert score.shape == best.shape == (items,)
    np.testing.assert_allclose(score, exact.max(axis=1, initial=-2), atol=1e-6)
    np.testing.assert_allclose(exact[np.arange(items), best], exact.max(axis=1, initial=-2), atol=1e-6)
    assert (np.abs(score) <= 1).all()


@given(
    anchors=st.integers(1, 20),
    items=st.integers(1, 200),
    tau=st.sampled_from([0.02, 0.1, 1.0]),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_kernel_is_the_plain_definition(anchors, items, tau, seed):
    rng = np.random.default_rng(seed)
    a, e = unit(rng, anchors, 16), unit(rng, items, 16)
    logprobs = -rng.exponential(3, anchors).astype(np.float32)
    score, best = kernel(a, logprobs, e, tau)
    p = np.exp(logprobs.astype(np.float64)) / np.exp(logprobs.astype(np.float64)).sum()
    terms = p * np.exp((e.astype(np.float64) @ a.T.astype(np.float64) - 1) / tau)
    np.testing.assert_allclose(score, terms.sum(axis=1), rtol=1e-4)
    np.testing.assert_allclose(terms[np.arange(items), best], terms.max(axis=1), rtol=1e-4)
    assert ((score >= 0) & (score <= 1)).all()


@given(
    anchors=st.integers(1, 33), dim=st.sampled_from([8, 50, 384]), seed=st.integers(0, 10**6), count=st.integers(1, 250)
)
@settings(max_examples=80, deadline=None)
def test_a_score_does_not_depend_on_the_other_candidates_bit_for_bit(anchors, dim, seed, count):
    rng = np.random.default_rng(seed)
    a, e = unit(rng, anchors, dim), unit(rng, 3 * BLOCK_ITEMS + 17, dim)
    logprobs = np.linspace(-1, -5, anchors, dtype=np.float32)
    some = rng.permutation(len(e))[:count]
    for whole, part in (
        (max_cosine(a, e), max_cosine(a, e[some])),
        (kernel(a, logprobs, e, 0.1), kernel(a, logprobs, e[some], 0.1)),
    ):
        np.testing.assert_array_equal(part[0], whole[0][some])
        np.testing.assert_array_equal(part[1], whole[1][some])


def test_of_equal_anchors_the_first_is_best():
    a = np.array([[0, 1], [1, 0], [1, 0]], np.float32)
    score, best = max_cosine(a, np.array([[1, 0], [0, 1], [0, -1]], np.float32))
    assert score.tolist() == [1, 1, 0]
    assert best.tolist() == [1, 0, 1]


def test_kernel_of_an_item_that_is_the_only_anchor_is_one():
    score, best = kernel(np.eye(1, 4, dtype=np.float32), np.float32([-3]), np.eye(2, 4, dtype=np.float32), 0.5)
    assert score[0] == 1.0
    assert score[1] == pytest.approx(np.exp(-2))
    assert best.tolist() == [0, 0]


def test_non_contiguous_and_read_only_input_is_taken():
    rng = np.random.default_rng(0)
    wide = unit(rng, 20, 8)
    view = wide[::2]
    view.flags.writeable = False
    np.testing.assert_array_equal(cosines(wide[:3], view), cosines(wide[:3], view.copy()))
    np.testing.assert_array_equal(view, wide[::2])


@pytest.mark.parametrize(
    ("anchors", "items", "named"),
    [((0, 4), (2, 4), "anchors"), ((4,), (2, 4), "anchors"), ((2, 4), (2, 5), "items"), ((2, 4), (4,), "items")],
)
def test_shapes_that_do_not_fit_are_named(anchors, items, named):
    with pytest.raises(ValueError, match=named):
        cosines(np.zeros(anchors, np.float32), np.zeros(items, np.float32))


@pytest.mark.parametrize("tau", [0.0, -1.0, float("nan")])
def test_kernel_refuses_tau(tau):
    with pytest.raises(ValueError, match="tau"):
        kernel(np.eye(1, dtype=np.float32), np.float32([0]), np.eye(1, dtype=np.float32), tau)


@pytest.mark.parametrize("logprobs", [[], [0.0, float("nan")], [float("-inf")]])
def test_softmax_refuses(logprobs):
    with pytest.raises(ValueError, match="logprobs"):
        softmax(np.array(logprobs))


def test_softmax_of_large_logs():
    np.testing.assert_allclose(softmax(np.array([1000.0, 1000.0, -1000.0])), [0.5, 0.5, 0.0])
