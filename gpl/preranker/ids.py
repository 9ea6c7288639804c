"""Ids to dense rows: a fixed table for serving, and one that grows and forgets for training.

No hashing into buckets, so no collisions. Row 0 stands for every id that is not in the table.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from gpl.arrays import RowOf
from gpl.labels.matching import Ints

_ROOM = 20
"""Over its capacity a table lets go of this fraction (one in ``_ROOM``) more, so that not every batch has to."""


class IdTable:
    """Ids in rows 1, 2, ...: what a published model knows. It does not change."""

    def __init__(self) -> None:
        self._rows = RowOf()

    @classmethod
    def from_list(cls, ids: Iterable[str]) -> IdTable:
        """The table of ids in row order; the first has row 1. Raises ValueError for an id that comes twice."""
        table = cls()
        for i in ids:
            if i in table._rows:
                raise ValueError(f"ids: {i!r} comes twice")
            table._rows[i] = len(table._rows) + 1
        return table

    def to_list(self) -> list[str]:
        """Ids in row order."""
        return list(self._rows)

    def __len__(self) -> int:
        """Number of ids; rows in use are ``len + 1`` with row 0."""
        return len(self._rows)

    def __contains__(self, item: object) -> bool:
        return item in self._rows

    def row(self, id_: str) -> int:
        """Row of an id, 0 when it is unknown."""
        return self._rows.get(id_, 0)

    def rows(self, ids: Sequence[str]) -> Ints:
        """Rows (n,) of ids, 0 where unknown."""
        return self._rows.of(ids)


class GrowingIds:
    """Ids that come and go. An id keeps its row while it lives; a row let go of goes to a later id, lowest first.

    Which ids live, and in which rows, follows from the calls alone: the same calls give the same table, also when it
    was saved and restored between any two of them.
    """

    def __init__(self, capacity: int, ttl: int | None = None) -> None:
        """``capacity``: ids above which :meth:`expire` lets go of those seen longest ago. ``ttl``: how long, in the
        unit of ``at``, an id lives after it was last seen; None for ever. Raises ValueError for less than 1 of either.
        """
        for name, value in (("capacity", capacity), ("ttl", ttl)):
            if value is not None and value < 1:
                raise ValueError(f"{name}: {value}, expected at least 1")
        self._capacity = capacity
        self._ttl = ttl
        self._rows = RowOf()
        self._ids: list[str | None] = [None]  # by row; None: row 0, and rows that are free
        self._seen = np.zeros(1, np.int64)  # by row, with room to spare
        self._free: list[int] = []

    def __len__(self) -> int:
        """Number of ids that live."""
        return len(self._rows)

    def __contains__(self, item: object) -> bool:
        return item in self._rows

    @property
    def size(self) -> int:
        """Rows that a table by these ids must have: row 0, those in use and those let go of."""
        return len(self._ids)

    def row(self, id_: str) -> int:
        """Row of an id, 0 when it is unknown."""
        return self._rows.get(id_, 0)

    def rows(self, ids: Sequence[str]) -> Ints:
        """Rows (n,) of ids, 0 where unknown."""
        return self._rows.of(ids)

    def add(self, ids: Sequence[str], at: int | Ints) -> Ints:
        """Rows (n,) of ids, seen at ``at``, one time or (n,); those not yet known get rows, in order."""
        rows = self._rows.of(ids)
        for i in np.flatnonzero(rows == 0).tolist():
            rows[i] = self._row_for(ids[i])
        self.touch(rows, at)
        return rows

    def touch(self, rows: Ints, at: int | Ints) -> None:
        """Rows in use (n,) were seen at ``at``, one time or (n,)."""
        np.maximum.at(self._seen, rows, at)

    def expire(self, now: int) -> Ints:
        """Let go of ids not seen since ``now - ttl`` and, above ``capacity``, of those seen longest ago.

        Returns the rows that are free now, ascending; whoever keeps tables by row must clear them. Of ids seen at the
        same time the lower row goes first. A table never has more rows than ``capacity`` plus the ids added between
        two calls.
        """
        live = self.live_rows()
        seen = self._seen[live]
        gone = np.zeros(len(live), bool)
        if self._ttl is not None:
            gone = seen < now - self._ttl
        left = len(live) - int(np.count_nonzero(gone))
        if left > self._capacity:
            staying = np.flatnonzero(~gone)
            excess = left - self._capacity + self._capacity // _ROOM
            gone[staying[np.argsort(seen[staying], kind="stable")[:excess]]] = True
        rows = live[gone]
        for row in rows.tolist():
            id_ = self._ids[row]
            assert id_ is not None
            del self._rows[id_]
            self._ids[row] = None
            heapq.heappush(self._free, row)
        self._seen[rows] = 0
        return rows

    @property
    def over(self) -> bool:
        """Whether there are more ids than ``capacity``."""
        return len(self._rows) > self._capacity

    def live_rows(self) -> Ints:
        """Rows (n,) in use, ascending, row 0 left out."""
        live = np.ones(len(self._ids), bool)
        live[0] = False
        live[self._free] = False
        return np.flatnonzero(live)

    def live_ids(self) -> list[str]:
        """Ids parallel to :meth:`live_rows`."""
        return [i for i in self._ids if i is not None]

    def state(self) -> tuple[list[str | None], npt.NDArray[np.int64]]:
        """For a checkpoint: ids by row from row 1 on, None where a row is free, and when each was last seen (n,)."""
        return self._ids[1:], self._seen[1 : len(self._ids)].copy()

    def restore(self, ids: Sequence[str | None], seen: npt.NDArray[np.int64]) -> None:
        """Take over a saved table. Raises ValueError for an id that comes twice or unequal lengths."""
        if len(ids) != len(seen):
            raise ValueError(f"seen: {len(seen)} entries for {len(ids)} rows")
        self._ids = [None, *ids]
        self._seen = np.concatenate([np.zeros(1, np.int64), seen.astype(np.int64)])
        self._rows = RowOf(((i, row) for row, i in enumerate(self._ids) if i is not None))
        self._free = [row for row, i in enumerate(self._ids) if i is None and row]  # ascending: a heap
        if len(self._rows) + len(self._free) != len(ids):
            twice = next(i for row, i in enumerate(self._ids) if i is not None and self._rows[i] != row)
            raise ValueError(f"ids: {twice!r} comes twice")

    def _row_for(self, id_: str) -> int:
        row = self._rows.get(id_)
        if row is not None:  # it stands twice in one call
            return row
        if self._free:
            row = heapq.heappop(self._free)
            self._ids[row] = id_
        else:
            row = len(self._ids)
            self._ids.append(id_)
            if row == len(self._seen):
                self._seen = np.concatenate([self._seen, np.zeros(max(1024, row), np.int64)])
        self._rows[id_] = row
        return row
