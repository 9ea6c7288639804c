"""Arrays by row that grow with what comes."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import numpy.typing as npt

_Value = TypeVar("_Value", bound=np.generic)


def grown(array: npt.NDArray[_Value], rows: int) -> npt.NDArray[_Value]:
    """``array`` (n, ...) with at least ``rows`` rows: at double the capacity where it was too small, new ones zero."""
    missing = rows - len(array)
    if missing <= 0:
        return array
    more = np.zeros((max(missing, len(array)), *array.shape[1:]), array.dtype)
    return np.concatenate([array, more])
