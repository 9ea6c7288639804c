"""What arrays of several modules need: rows of ids, growing with what comes, the shapes of a saved state, log-odds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

_Value = TypeVar("_Value", bound=np.generic)


class RowOf(dict[str, int]):
    """Row of each id; by ``[]``, ``absent`` for one that is not there, and it stays not there."""

    def __init__(self, absent: int, rows: Iterable[tuple[str, int]] = ()) -> None:
        super().__init__(rows)
        self._absent = absent

    def __missing__(self, id_: str) -> int:
        return self._absent

    def of(self, ids: Sequence[str]) -> npt.NDArray[np.int64]:
        """Rows (n,) of ids."""
        # No Python code for an id, and no list or tuple of integers for numpy to look through: a quarter of the time.
        return np.fromiter(map(self.__getitem__, ids), np.int64, len(ids))


def grown(array: npt.NDArray[_Value], rows: int) -> npt.NDArray[_Value]:
    """``array`` (n, ...) with at least ``rows`` rows: at double the capacity where it was too small, new ones zero."""
    missing = rows - len(array)
    if missing <= 0:
        return array
    more = np.zeros((max(missing, len(array)), *array.shape[1:]), array.dtype)
    return np.concatenate([array, more])


def add_at(table: npt.NDArray[np.float64], rows: npt.NDArray[np.int64], columns: npt.NDArray[np.float64]) -> None:
    """Add ``columns`` (k, n) to the ``rows`` (n,) of ``table`` (m, k); a row may stand there more than once."""
    # Column by column: on rows of three it takes numpy seven times as long.
    for column, values in zip(table.T, columns, strict=True):
        np.add.at(column, rows, values)


def check_shape(name: str, state: Mapping[str, Any], shape: tuple[int | None, ...]) -> None:
    """Raises ValueError when ``state`` lacks an array or tensor, or it has another shape. None is any length."""
    if name not in state:
        raise ValueError(f"{name}: missing from the state")
    found = tuple(state[name].shape)
    if len(found) != len(shape) or any(e is not None and e != f for f, e in zip(found, shape, strict=True)):
        raise ValueError(f"{name}: shape {found}, expected {shape}")


def sigmoid(logits: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Probabilities of log-odds, element by element."""
    # Each side in the form that cannot overflow.
    e = np.exp(-np.abs(logits))
    return np.where(logits >= 0, 1.0, e) / (1.0 + e)
