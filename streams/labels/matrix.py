"""The vectors that labelling needs, at hand: a matrix of what was recalled, filled from the index."""

from __future__ import annotations

from collections.abc import Container

import numpy as np
from numpy.typing import NDArray

from gpl.catalogue import Catalogue
from gpl.index.base import VectorIndex
from streams.contracts import ItemVector
from streams.views import vectors_from


class RecalledVectors:
    """Dense rows for the items that requests ask for; what is missing is fetched from the index, in one batch.

    ``known``: ids that the catalogue has; others are not looked for. A worker holds what its requests touch, not
    the whole catalogue.
    """

    def __init__(self, index: VectorIndex, known: Container[str], dim: int, levels: int) -> None:
        self._index = index
        self._known = known
        self._matrix = Catalogue(dim, levels)
        # The matrix is asked for vectors only, codes do not matter here.
        self._no_sid = [0] * levels

    def lookup(self, ids: list[str]) -> tuple[list[str], NDArray[np.float32]]:
        """The known ones among ``ids``, in order, and their unit vectors (n known, dim)."""
        missing = [item for item in ids if item not in self._matrix and item in self._known]
        if missing:
            for item, vector in self._index.retrieve(missing).items():
                self._matrix.put(item, vector, self._no_sid)
        return self._matrix.lookup(ids)

    def changed(self, item_id: str, item: ItemVector | None) -> None:
        """An item was added, replaced or removed (None): the row, if there is one, follows."""
        if item_id not in self._matrix:
            return
        if item is None:
            self._matrix.remove(item_id)
        else:
            self._matrix.put(item_id, vectors_from(item.vector, self._matrix.dim)[0], self._no_sid)
