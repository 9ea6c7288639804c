"""What arrays of several modules need: rows of ids, growing with what comes, the shapes of a saved state, log-odds."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

_Value = TypeVar("_Value", bound=np.generic)
_EMPTY, _ABSENT = -2, -1


class RowOf(dict[str, int]):
    """Row of each id; by ``[]``, 0 for one that is not there, and it stays not there."""

    def __missing__(self, id_: str) -> int:
        return 0

    def of(self, ids: Sequence[str]) -> npt.NDArray[np.int64]:
        """Rows (n,) of ids."""
        # No Python code for an id, and no list or tuple of integers for numpy to look through: a quarter of the time.
        return np.fromiter(map(self.__getitem__, ids), np.int64, len(ids))


class HashedRows(UserDict[str, int]):
    """Row, at least 0, of each id; of many at once by their hashes.

    The ids of a request are objects of its own, so a dict compares each with the one that it holds, somewhere in
    memory: beyond a core's cache that is most of the time. :meth:`of` looks for 64-bit hashes in one array instead
    (open addressing, linear probing), all at once. An id that is not there passes for one of the n that are with a
    chance of n / 2^64 (str hashes are SipHash under a key of the process). Ids put that share a hash are told apart:
    from then on the dict answers.
    """

    def __init__(self) -> None:
        self._shared = False
        self._table = _empty_table(1024)  # (hash, row) by slot
        self._taken = 0  # slots, those of ids that were removed among them
        super().__init__()

    def __setitem__(self, id_: str, row: int) -> None:
        known = id_ in self.data
        self.data[id_] = row
        slot = self._slot(hash(id_))
        found = self._table[slot, 1]
        self._shared |= found >= 0 and not known
        self._table[slot] = hash(id_), row
        self._taken += int(found == _EMPTY)
        if 4 * self._taken > len(self._table):
            self._rebuild()

    def __delitem__(self, id_: str) -> None:
        del self.data[id_]
        self._table[self._slot(hash(id_)), 1] = _ABSENT

    def __copy__(self) -> HashedRows:
        made = HashedRows()
        made.update(self.data)
        return made

    def of(self, ids: Sequence[str]) -> npt.NDArray[np.int64]:
        """Rows (n,) of ids, -1 where there is none."""
        if self._shared:
            return np.fromiter((self.data.get(id_, _ABSENT) for id_ in ids), np.int64, len(ids))
        hashes = np.fromiter(map(hash, ids), np.int64, len(ids))
        slots = hashes & (len(self._table) - 1)
        entries = self._table.take(slots, axis=0)
        rows = entries[:, 1].copy()
        others = np.flatnonzero((entries[:, 0] != hashes) & (rows != _EMPTY))
        while len(others):
            slots[others] = (slots[others] + 1) & (len(self._table) - 1)
            entries = self._table.take(slots[others], axis=0)
            rows[others] = entries[:, 1]
            others = others[(entries[:, 0] != hashes[others]) & (entries[:, 1] != _EMPTY)]
        return np.maximum(rows, _ABSENT)

    def _slot(self, key: int) -> int:
        """Where a hash is, or is to be put."""
        mask = len(self._table) - 1
        slot = key & mask
        while self._table[slot, 1] != _EMPTY and self._table[slot, 0] != key:
            slot = (slot + 1) & mask
        return slot

    def _rebuild(self) -> None:
        """Without those removed, and with room for as many again."""
        size = len(self._table)
        while 8 * len(self.data) > size:
            size *= 2
        self._table, self._taken = _empty_table(size), len(self.data)
        entries = np.empty((len(self.data), 2), np.int64)
        entries[:, 0] = np.fromiter(map(hash, self.data), np.int64, len(entries))
        entries[:, 1] = np.fromiter(self.data.values(), np.int64, len(entries))
        wanted = entries[:, 0] & (size - 1)
        order = np.argsort(wanted)
        # One after the other in this order, each has the slot that it wants, or the one after its predecessor's.
        at = np.arange(len(entries))
        slots = at + np.maximum.accumulate(wanted[order] - at)
        within = slots < size
        self._table[slots[within]] = entries[order[within]]
        for entry in entries[order[~within]]:  # beyond the end it goes on at the beginning
            self._table[self._slot(int(entry[0]))] = entry


def _empty_table(size: int) -> npt.NDArray[np.int64]:
    table = np.zeros((size, 2), np.int64)
    table[:, 1] = _EMPTY
    return table


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
