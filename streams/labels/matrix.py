"""The vectors that labelling needs, at hand: a matrix of what was recalled, filled from the index."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable
from functools import partial

import numpy as np
from numpy.typing import NDArray

from gpl.catalogue import Catalogue
from gpl.index.base import VectorIndex
from streams.contracts import ItemVector
from streams.labels.outage import when_available
from streams.views import vectors_from


class RecalledVectors:
    """Dense rows for the items that requests ask for; what is missing is fetched from the index, in one batch.

    ``known``: ids that the catalogue has; others are not looked for. ``waits``: what is missing is fetched by ``have``
    only, since the index is a server, which would keep a caller of ``lookup`` waiting.
    """

    def __init__(self, index: VectorIndex, known: Container[str], dim: int, levels: int, waits: bool = False) -> None:
        self._index = index
        self._waits = waits
        self._known = known
        self._matrix = Catalogue(dim, levels)
        # The matrix is asked for vectors only, codes do not matter here.
        self._no_sid = [0] * levels
        # What changed while a fetch was on its way.
        self._fetching: list[set[str]] = []
        self._gathered = np.empty((0, dim), np.float32)

    def lookup(self, ids: list[str]) -> tuple[list[str], NDArray[np.float32]]:
        """The known ones among ``ids``, in order, and their unit vectors (n known, dim).

        The vectors are good until the next call: they are gathered into the same memory every time, since fresh
        megabytes for each request cost as much as filling them.
        """
        rows = self._matrix.rows(ids)
        if len(rows) and rows.min() < 0:
            if not self._waits:
                self._fetch([ids[i] for i in np.flatnonzero(rows < 0).tolist()])
                rows = self._matrix.rows(ids)
            if rows.min() < 0:
                found = rows >= 0
                ids, rows = [ids[i] for i in np.flatnonzero(found).tolist()], rows[found]
        if len(rows) > len(self._gathered):
            self._gathered = np.empty((2 * len(rows), self._matrix.dim), np.float32)
        # "clip" lets numpy write into the buffer directly; no row is out of range.
        vectors = np.take(self._matrix.vectors, rows, axis=0, out=self._gathered[: len(rows)], mode="clip")
        return ids, vectors

    def _fetch(self, missing: list[str]) -> None:
        wanted = [item for item in missing if item in self._known]
        if wanted:
            for item, vector in self._index.retrieve(wanted).items():
                self._matrix.put(item, vector, self._no_sid)

    async def have(self, ids: Iterable[str], wanted: Callable[[], bool]) -> bool:
        """Make ``lookup`` of these ids need no index: fetch what is missing, however long the index is away.

        False as soon as ``wanted`` says that nobody waits for it any more.
        """
        while missing := [item for item in ids if item not in self._matrix and item in self._known]:
            changed: set[str] = set()
            self._fetching.append(changed)
            found = await when_available(partial(self._index.retrieve, missing), wanted)
            self._fetching.remove(changed)
            if found is None:
                return False
            if not found:
                break  # in the catalogue and not yet in the index
            for item, vector in found.items():
                if item not in changed:  # or it would be the vector of before
                    self._matrix.put(item, vector, self._no_sid)
        return True

    def changed(self, item_id: str, item: ItemVector | None) -> None:
        """An item was added, replaced or removed (None): the row, if there is one, follows."""
        for changed in self._fetching:
            changed.add(item_id)
        if item_id not in self._matrix:
            return
        if item is None:
            self._matrix.remove(item_id)
        else:
            self._matrix.put(item_id, vectors_from(item.vector, self._matrix.dim)[0], self._no_sid)
