"""How well a candidate matches a user's interest anchors: the raw anchor score.

A score does not depend on the other candidates of its request, bit for bit, on one machine with one numpy and thread
count: every product has the same shape, 96 items by 8 anchors, padded with zeros. Plain ``items @ anchors.T`` does not
have this property (BLAS takes other kernels for other row counts; the last bits differ, measured up to 3e-7).
Across machines scores agree to about 1e-6.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

# Multiples of the tiles of OpenBLAS's sgemm kernels, so that an item is computed the same wherever it stands in a
# block. Checked with OPENBLAS_CORETYPE = SkylakeX, Haswell, Sandybridge, Nehalem, Prescott and Barcelona; blocks of
# 64 items, or 16 anchors at once, are not invariant on Haswell.
BLOCK_ITEMS = 96
BLOCK_ANCHORS = 8


def cosines(anchors: Floats, items: Floats) -> Floats:
    """Cosine of every item with every anchor, (n, K), clipped to [-1, 1].

    ``anchors`` (K, d) and ``items`` (n, d) are unit rows. Raises ValueError when the shapes do not fit.
    """
    if anchors.ndim != 2 or anchors.shape[0] == 0:
        raise ValueError(f"anchors: shape {anchors.shape}, expected (K, d) with K >= 1")
    if items.ndim != 2 or items.shape[1] != anchors.shape[1]:
        raise ValueError(f"items: shape {items.shape}, expected (n, {anchors.shape[1]})")
    count, dim = anchors.shape
    columns = np.zeros((count + -count % BLOCK_ANCHORS, dim), dtype=np.float32)
    columns[:count] = anchors
    items = np.ascontiguousarray(items, dtype=np.float32)
    n = len(items)
    full = n - n % BLOCK_ITEMS
    blocks = items[:full].reshape(-1, BLOCK_ITEMS, dim)
    last = np.zeros((BLOCK_ITEMS, dim), dtype=np.float32)
    last[: n - full] = items[full:]
    out = np.empty((len(blocks) + 1, BLOCK_ITEMS, len(columns)), dtype=np.float32)
    for start in range(0, len(columns), BLOCK_ANCHORS):
        group = slice(start, start + BLOCK_ANCHORS)
        np.matmul(blocks, columns[group].T, out=out[:-1, :, group])
        np.matmul(last, columns[group].T, out=out[-1, :, group])
    cos = out.reshape(-1, len(columns))[:n, :count]
    return np.clip(cos, -1.0, 1.0, out=cos)


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
    if not tau > 0:
        raise ValueError(f"tau: {tau}, expected a positive number")
    terms = cosines(anchors, items)
    terms -= np.float32(1.0)
    terms /= np.float32(tau)
    np.exp(terms, out=terms)
    terms *= softmax(logprobs).astype(np.float32)
    # Summed column by column: the order of additions must not depend on the number of rows.
    score = terms[:, 0].copy()
    for k in range(1, terms.shape[1]):
        score += terms[:, k]
    return np.minimum(score, np.float32(1.0)), terms.argmax(axis=1)


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
