"""The items in the frozen space: one dense matrix, with item ids interned to its rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gpl.arrays import HashedRows

UNIT_TOLERANCE = 1e-3
_INITIAL_ROWS = 1024


@dataclass(frozen=True, slots=True)
class ItemContent:
    """What an item says about itself: text, or a vector that came with it."""

    item_id: str
    text: str
    embedding: Sequence[float] | None = None


def rows_by_id(items: Sequence[ItemContent]) -> dict[str, int]:
    """Position of each item by its id. Raises ValueError naming an id that comes twice, and where."""
    row_of: dict[str, int] = {}
    for row, item in enumerate(items):
        first = row_of.setdefault(item.item_id, row)
        if first != row:
            raise ValueError(f"item {item.item_id!r}: its id comes twice, items[{first}] and items[{row}]")
    return row_of


class Catalogue:
    """Item id -> dense row of a growing float32 matrix, with the item's semantic id (SID).

    An update keeps the item's row. A removed row is zeroed, its SID set to -1, and it may go to an item that
    comes later: so row numbers, and the views ``vectors`` and ``sids``, hold for one ``generation`` only. Take
    them anew after a change. Derived tables (``SidTrie``, ``SidCentroids``) remember the generation they were
    built from and are rebuilt when it moves on.

    Not thread-safe: one thread writes and reads, or callers lock.
    """

    def __init__(self, dim: int, levels: int) -> None:
        """An empty catalogue of vectors (dim,) and SIDs (levels,). Raises ValueError if either is below 1."""
        if dim < 1:
            raise ValueError(f"dim: {dim}, must be at least 1")
        if levels < 1:
            raise ValueError(f"levels: {levels}, must be at least 1")
        self.dim = dim
        self.levels = levels
        self._generation = 0
        self._row_of = HashedRows()
        self._id_of: list[str | None] = []
        self._free: list[int] = []
        self._vectors = np.zeros((_INITIAL_ROWS, dim), np.float32)
        self._sids = np.full((_INITIAL_ROWS, levels), -1, np.int32)
        self._changed = np.zeros(_INITIAL_ROWS, np.int64)

    @property
    def generation(self) -> int:
        """Counts changes: it moves on with every put that changed something and every removal of a known item."""
        return self._generation

    def put(self, item_id: str, vector: npt.ArrayLike, sid: Sequence[int] | npt.NDArray[np.integer]) -> None:
        """Add or replace one item. A put that changes nothing leaves ``generation`` alone.

        ``vector``: (dim,), unit length to 1e-3. ``sid``: ``levels`` codes, none negative.
        Raises ValueError naming the item, the field and the value; the catalogue is then unchanged.
        """
        row_vector = np.asarray(vector, np.float32)
        if row_vector.shape != (self.dim,):
            raise ValueError(f"item {item_id!r}: vector has shape {row_vector.shape}, expected ({self.dim},)")
        norm = float(np.sqrt(np.dot(row_vector, row_vector)))
        # Written so that NaN and infinity fail it too.
        if not abs(norm - 1.0) <= UNIT_TOLERANCE:
            raise ValueError(f"item {item_id!r}: vector has length {norm:g}, expected 1 within {UNIT_TOLERANCE:g}")
        try:
            codes = np.asarray(sid, np.int32)
        except OverflowError as error:
            raise ValueError(f"item {item_id!r}: sid {list(sid)} has a code beyond 32 bits") from error
        if not np.array_equal(codes, np.asarray(sid)):  # of an array, a cast wraps and cuts
            raise ValueError(f"item {item_id!r}: sid {list(sid)} has a code that is no whole number of 32 bits")
        if codes.shape != (self.levels,):
            raise ValueError(f"item {item_id!r}: sid has shape {codes.shape}, expected ({self.levels},)")
        if codes.min() < 0:
            raise ValueError(f"item {item_id!r}: sid {codes.tolist()} has a negative code")

        row = self._row_of.get(item_id)
        if row is None:
            row = self._new_row(item_id)
        elif np.array_equal(self._sids[row], codes) and np.array_equal(self._vectors[row], row_vector):
            return
        self._vectors[row] = row_vector
        self._sids[row] = codes
        self._generation += 1
        self._changed[row] = self._generation

    def remove(self, item_id: str) -> bool:
        """Forget an item; False if it was not known."""
        row = self._row_of.pop(item_id, None)
        if row is None:
            return False
        self._id_of[row] = None
        self._vectors[row] = 0.0
        self._sids[row] = -1
        self._free.append(row)
        self._generation += 1
        self._changed[row] = self._generation
        return True

    def __contains__(self, item_id: object) -> bool:
        return item_id in self._row_of

    def __len__(self) -> int:
        return len(self._row_of)

    def ids(self) -> list[str]:
        """All item ids, in the order in which they were first put."""
        return list(self._row_of)

    def rows(self, ids: Sequence[str]) -> npt.NDArray[np.int64]:
        """Row of each id, in order; -1 where unknown. Shape (len(ids),)."""
        return self._row_of.of(ids)

    def id_at(self, row: int) -> str:
        """The item in a row. Raises LookupError for a row that is out of range or holds no item."""
        if not 0 <= row < len(self._id_of):
            raise LookupError(f"row: {row}, the catalogue has {len(self._id_of)} rows")
        item_id = self._id_of[row]
        if item_id is None:
            raise LookupError(f"row: {row} holds no item, it was removed")
        return item_id

    @property
    def vectors(self) -> npt.NDArray[np.float32]:
        """Read-only view (rows used, dim), indexed by row; zeros where an item was removed."""
        view = self._vectors[: len(self._id_of)]
        view.flags.writeable = False
        return view

    @property
    def sids(self) -> npt.NDArray[np.int32]:
        """Read-only view (rows used, levels), indexed by row; -1 where an item was removed."""
        view = self._sids[: len(self._id_of)]
        view.flags.writeable = False
        return view

    @property
    def changed(self) -> npt.NDArray[np.int64]:
        """Read-only view (rows used,): the ``generation`` that each row has been as it is since."""
        view = self._changed[: len(self._id_of)]
        view.flags.writeable = False
        return view

    def lookup(self, ids: Sequence[str]) -> tuple[list[str], npt.NDArray[np.float32]]:
        """The known ones among ``ids``, in order, and a copy of their vectors (n known, dim)."""
        rows = self.rows(ids)
        known = rows >= 0
        if known.all():
            return list(ids), self._vectors[rows]
        return [ids[i] for i in np.flatnonzero(known).tolist()], self._vectors[rows[known]]

    def _new_row(self, item_id: str) -> int:
        if self._free:
            row = self._free.pop()
            self._id_of[row] = item_id
        else:
            row = len(self._id_of)
            if row == len(self._vectors):
                self._grow()
            self._id_of.append(item_id)
        self._row_of[item_id] = row
        return row

    def _grow(self) -> None:
        used = len(self._vectors)
        vectors = np.zeros((2 * used, self.dim), np.float32)
        vectors[:used] = self._vectors
        sids = np.full((2 * used, self.levels), -1, np.int32)
        sids[:used] = self._sids
        changed = np.zeros(2 * used, np.int64)
        changed[:used] = self._changed
        self._vectors, self._sids, self._changed = vectors, sids, changed
