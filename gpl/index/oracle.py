"""The index as a plain matrix product: exact, in memory, nothing to install. The others are tested against it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from gpl.index.base import Hit, checked_items, checked_queries, ranked


class ExactIndex:
    """``VectorIndex`` in numpy. Each search reads all vectors; nothing is kept when the process ends."""

    def __init__(self, dim: int) -> None:
        """An empty index of vectors (dim,)."""
        if dim < 1:
            raise ValueError(f"dim: {dim}, must be at least 1")
        self.dim = dim
        self._vectors: dict[str, npt.NDArray[np.float32]] = {}

    def upsert(self, ids: Sequence[str], vectors: npt.NDArray[np.float32], sids: npt.NDArray[np.integer]) -> None:
        items = checked_items(ids, vectors, sids, self.dim)
        self._vectors.update({item_id: vector for item_id, (vector, _) in items.items()})

    def delete(self, ids: Sequence[str]) -> None:
        for item_id in ids:
            self._vectors.pop(item_id, None)

    def retrieve(self, ids: Sequence[str]) -> dict[str, npt.NDArray[np.float32]]:
        return {item_id: self._vectors[item_id].copy() for item_id in ids if item_id in self._vectors}

    def nearest(
        self, vectors: npt.NDArray[np.float32], k: int, exclude: Sequence[str] | None = None
    ) -> list[list[Hit]]:
        queries = checked_queries(vectors, k, self.dim)
        excluded = frozenset(exclude or ())
        ids = [item_id for item_id in self._vectors if item_id not in excluded]
        if not ids:
            return [[] for _ in queries]
        cosines = queries @ np.stack([self._vectors[item_id] for item_id in ids]).T
        return [ranked(list(zip(ids, row, strict=True)))[:k] for row in cosines.tolist()]

    def count(self) -> int:
        return len(self._vectors)

    def close(self) -> None:
        self._vectors.clear()
