"""Ids to dense rows, growing as ids appear."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt


class IdTable:
    """Maps ids to rows 1, 2, ... in order of first appearance. Row 0 stands for every id that is not in the table.

    No hashing, so no collisions; the same ids in the same order give the same rows.
    """

    def __init__(self) -> None:
        self._rows: dict[str, int] = {}

    @classmethod
    def from_list(cls, ids: Iterable[str]) -> IdTable:
        """The table that ``to_list`` wrote. Raises ValueError for an id that comes twice."""
        table = cls()
        for i in ids:
            if i in table._rows:
                raise ValueError(f"ids: {i!r} comes twice")
            table._rows[i] = len(table._rows) + 1
        return table

    def to_list(self) -> list[str]:
        """Ids in row order; the first has row 1."""
        return list(self._rows)

    def __len__(self) -> int:
        """Number of ids; rows in use are ``len + 1`` with row 0."""
        return len(self._rows)

    def __contains__(self, item: object) -> bool:
        return item in self._rows

    def row(self, id_: str) -> int:
        """Row of an id, 0 when it is unknown."""
        return self._rows.get(id_, 0)

    def rows(self, ids: Sequence[str]) -> npt.NDArray[np.int64]:
        """Rows (n,) of ids, 0 where unknown."""
        get = self._rows.get
        return np.fromiter((get(i, 0) for i in ids), dtype=np.int64, count=len(ids))

    def add(self, ids: Sequence[str]) -> npt.NDArray[np.int64]:
        """Rows (n,) of ids; those not yet known are appended, in order."""
        rows = self._rows
        return np.fromiter((rows.setdefault(i, len(rows) + 1) for i in ids), dtype=np.int64, count=len(ids))
