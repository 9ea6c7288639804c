"""How well a candidate matches a user's interest anchors: the raw anchor score.

A score does not depend on the other candidates of its request, bit for bit, on one machine with one numpy and thread
count: every product has the same shape, 96 items by 8 anchors, padded with zeros. Plain ``items @ anchors.T`` does not
have this property (BLAS takes other kernels for other row counts; the last bits differ, measured up to 3e-7).
Across machines scores agree to about 1e-6.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

# Multiples of the tiles of OpenBLAS's sgemm kernels, so that an item is computed the same wherever it stands in a
# block. Checked with OPENBLAS_CORETYPE = SkylakeX, Haswell, Sandybridge, Nehalem, Prescott and Barcelona; blocks of
# 64 items, or 16 anchors at once, are not invariant on Haswell.
BLOCK_ITEMS = 96
BLOCK_ANCHORS = 8

_GATHERED = 3 * BLOCK_ITEMS  # rows copied at a time: of 384 float32 values, they stay in a core's second-level cache


def cosines(anchors: Floats, items: Floats) -> Floats:
    """Cosine of every item with every anchor, (n, K), clipped to [-1, 1].

    ``anchors`` (K, d) and ``items`` (n, d) are unit rows. Raises ValueError when the shapes do not fit.
    """
    if anchors.ndim != 2 or anchors.shape[0] == 0:
        raise ValueError(f"anchors: shape {anchors.shape}, expected (K, d) with K >= 1")
    if items.ndim != 2 or items.shape[1] != anchors.shape[1]:
        raise ValueError(f"items: shape {items.shape}, expected (n, {anchors.shape[1]})")
    count, dim = anchors.shape
    columns = _padded(anchors)
    items = np.ascontiguousarray(items, dtype=np.float32)
    n = len(items)
    full = n - n % BLOCK_ITEMS
    last = np.zeros((BLOCK_ITEMS, dim), dtype=np.float32)
    last[: n - full] = items[full:]
    out = np.empty((full // BLOCK_ITEMS + 1, BLOCK_ITEMS, len(columns)), dtype=np.float32)
    _products(items[:full].reshape(-1, BLOCK_ITEMS, dim), columns, out[:-1])
    _products(last[None], columns, out[-1:])
    cos = out.reshape(-1, len(columns))[:n, :count]
    return np.clip(cos, -1.0, 1.0, out=cos)


def max_cosines(anchors: Floats, items: Floats, rows: Ints) -> Floats:
    """Scores (n,) of ``max_cosine(anchors, items[rows])``, bit for bit, without a copy of all those rows.

    ``rows`` (n,) within 0..len(items)-1; float32 ``items``. For few rows of a large catalogue: a copy is megabytes
    that the allocator maps and unmaps at each call, which costs more than the products.
    """
    best: Floats = np.empty(len(rows), np.float32)
    for start, cos in _gathered(anchors, items, rows):
        part = best[start : start + len(cos)]
        # Column by column: numpy reduces a short last axis slowly.
        part[:] = cos[:, 0]
        for k in range(1, cos.shape[1]):
            np.maximum(part, cos[:, k], out=part)
    return best


def kernels(anchors: Floats, logprobs: Floats, items: Floats, tau: float, rows: Ints) -> Floats:
    """Scores (n,) of ``kernel(anchors, logprobs, items[rows], tau)``, bit for bit; see :func:`max_cosines`."""
    score: Floats = np.empty(len(rows), np.float32)
    for start, cos in _gathered(anchors, items, rows):
        score[start : start + len(cos)] = _summed(_terms(cos, logprobs, tau))
    return score


def max_cosine(anchors: Floats, items: Floats) -> tuple[Floats, Ints]:
    """Paper: ``s = max_k cos(a_k, e)``. Returns the scores (n,) in [-1, 1] and the best anchor of each item (n,).

    Of equally good anchors the first is best, which is the more probable one where anchors come sorted.
    """
    cos = cosines(anchors, items)
    best = cos.argmax(axis=1)
    return _pick(cos, best), best


def kernel(anchors: Floats, logprobs: Floats, items: Floats, tau: float) -> tuple[Floats, Ints]:
    """Ours: ``s = sum_k p_k exp((cos_k - 1) / tau)``, p = softmax of the beam log-probabilities (K,).

    Returns the scores (n,) in [0, 1] and the anchor with the largest term. ``tau`` is in units of cosine.
    """
    terms = _terms(cosines(anchors, items), logprobs, tau)
    return _summed(terms), terms.argmax(axis=1)


def softmax(logprobs: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
    """Probabilities (K,) of K log-weights, in float64. Raises ValueError for non-finite or no values."""
    values = np.asarray(logprobs, dtype=np.float64)
    if values.ndim != 1 or values.size == 0 or not np.isfinite(values).all():
        raise ValueError(f"logprobs: {logprobs!r}, expected (K,) finite values with K >= 1")
    weights = np.exp(values - values.max())
    return np.asarray(weights / weights.sum(), dtype=np.float64)


def _pick(values: Floats, column: Ints) -> Floats:
    picked: Floats = np.take_along_axis(values, column[:, None], axis=1)[:, 0]
    return picked


def _padded(anchors: Floats) -> Floats:
    count, dim = anchors.shape
    columns = np.zeros((count + -count % BLOCK_ANCHORS, dim), dtype=np.float32)
    columns[:count] = anchors
    return columns


def _products(blocks: Floats, columns: Floats, out: Floats) -> None:
    """``blocks`` (B, BLOCK_ITEMS, d) times ``columns`` (multiple of BLOCK_ANCHORS, d), in the one shape."""
    for start in range(0, len(columns), BLOCK_ANCHORS):
        group = slice(start, start + BLOCK_ANCHORS)
        np.matmul(blocks, columns[group].T, out=out[:, :, group])


def _gathered(anchors: Floats, items: Floats, rows: Ints) -> Iterator[tuple[int, Floats]]:
    """Start and cosines (at most _GATHERED, K) of consecutive parts of ``rows``; the next part overwrites them."""
    count, dim = anchors.shape
    columns = _padded(anchors)
    buffer = np.empty((_GATHERED, dim), np.float32)
    out = np.empty((_GATHERED, len(columns)), np.float32)
    shape = (-1, BLOCK_ITEMS)
    for start in range(0, len(rows), _GATHERED):
        some = rows[start : start + _GATHERED]
        n = len(some)
        whole = n + -n % BLOCK_ITEMS
        # mode "clip" fills the buffer directly; the default goes by another copy.
        items.take(some, axis=0, out=buffer[:n], mode="clip")
        buffer[n:whole] = 0.0
        _products(buffer[:whole].reshape(*shape, dim), columns, out[:whole].reshape(*shape, len(columns)))
        cos = out[:n, :count]
        yield start, np.clip(cos, -1.0, 1.0, out=cos)


def _terms(cos: Floats, logprobs: Floats, tau: float) -> Floats:
    if not tau > 0:
        raise ValueError(f"tau: {tau}, expected a positive number")
    cos -= np.float32(1.0)
    cos /= np.float32(tau)
    np.exp(cos, out=cos)
    cos *= softmax(logprobs).astype(np.float32)
    return cos


def _summed(terms: Floats) -> Floats:
    # Column by column: the order of additions must not depend on the number of rows.
    score = terms[:, 0].copy()
    for k in range(1, terms.shape[1]):
        score += terms[:, k]
    return np.minimum(score, np.float32(1.0))
