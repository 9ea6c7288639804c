"""Rows of a large matrix times a few columns, without a copy of all the rows."""

from __future__ import annotations

import numpy as np

from gpl.labels.matching import Floats, Ints

BLOCK = 256
"""Rows at a time: 256 x 384 float32 values stay in a core's second-level cache."""


def gathered_product(matrix: Floats, rows: Ints, columns: Floats) -> Floats:
    """``matrix[rows] @ columns``: (n, k) of (N, w), (n,) within 0..N-1 and (w, k).

    Block by block over one small buffer: a copy of all rows is megabytes that the allocator maps and unmaps at each
    call, which cost more than the product itself.
    """
    n, width = len(rows), matrix.shape[1]
    buffer = np.empty((min(BLOCK, n), width), np.float32)
    out: Floats = np.empty((n, columns.shape[1]), np.float32)
    for start in range(0, n, BLOCK):
        some = rows[start : start + BLOCK]
        # mode "clip" fills the buffer directly; the default goes by another copy.
        block = np.take(matrix, some, axis=0, out=buffer[: len(some)], mode="clip")
        np.matmul(block, columns, out=out[start : start + BLOCK])
    return out
