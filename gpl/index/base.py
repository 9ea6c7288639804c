"""What an index of item vectors does, and what its adapters share."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence
from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt

Hit = tuple[str, float]
"""Item id and cosine."""

# Fixed for good: stored points are found by it.
_NAMESPACE = uuid.UUID("6a9d5d0e-57b5-5d0e-9f3c-2f6f6b1c8a10")
T = TypeVar("T")


class IndexUnavailable(RuntimeError):
    """The index cannot be reached or opened at the moment: another process owns it, or the server does not answer.
    Nothing is wrong with the arguments; the same call may succeed later.
    """


class VectorIndex(Protocol):
    """Item id -> unit vector, searched by cosine. One contract for all adapters (tests/gpl/test_index.py).

    A call that returned is durable as far as the adapter promises; writes are idempotent, so repeat one that raised.
    Calls raise ValueError naming the argument for a wrong shape, a value not finite or a vector without direction.
    """

    @property
    def dim(self) -> int:
        """Dimension of the vectors."""

    def upsert(self, ids: Sequence[str], vectors: npt.NDArray[np.float32], sids: npt.NDArray[np.integer]) -> None:
        """Add or replace items: vectors (n, dim), kept at unit length; sids (n, levels). The last of equal ids wins."""

    def delete(self, ids: Sequence[str]) -> None:
        """Remove items; unknown ids are passed over."""

    def retrieve(self, ids: Sequence[str]) -> dict[str, npt.NDArray[np.float32]]:
        """Unit vectors (dim,) by id; ids that are not in the index are not in the result."""

    def nearest(
        self, vectors: npt.NDArray[np.float32], k: int, exclude: Sequence[str] | None = None
    ) -> list[list[Hit]]:
        """For each query (m, dim) the k items of largest cosine (fewer if there are fewer), largest first and by id
        where equal, without ``exclude``. Exact, or approximate where the adapter says so.
        """

    def count(self) -> int:
        """Number of items."""

    def close(self) -> None:
        """Release what is held. Closing twice is harmless."""


def point_id(item_id: str) -> str:
    """Qdrant's id of an item: a UUID, for it takes only integers and UUIDs. The item's own id is in the payload."""
    return str(uuid.uuid5(_NAMESPACE, item_id))


def batches(values: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """Consecutive slices of at most ``size`` values."""
    for start in range(0, len(values), size):
        yield values[start : start + size]


def ranked(hits: list[Hit]) -> list[Hit]:
    """Hits by falling cosine, equal ones by id."""
    return sorted(hits, key=lambda hit: (-hit[1], hit[0]))


def checked_items(
    ids: Sequence[str], vectors: npt.NDArray[np.float32], sids: npt.NDArray[np.integer], dim: int
) -> dict[str, tuple[npt.NDArray[np.float32], list[int]]]:
    """Items of an upsert by id: unit vector and SID. Raises ValueError as ``VectorIndex`` says."""
    unit = checked_vectors(vectors, dim, "vectors")
    sids = np.asarray(sids)
    if len(unit) != len(ids) or sids.ndim != 2 or len(sids) != len(ids):
        raise ValueError(f"ids: {len(ids)}, vectors: {len(unit)}, sids: shape {sids.shape}; they are parallel")
    return dict(zip(ids, zip(unit, sids.tolist(), strict=True), strict=True))


def checked_queries(vectors: npt.NDArray[np.float32], k: int, dim: int) -> npt.NDArray[np.float32]:
    """Unit query vectors (m, dim). Raises ValueError as ``VectorIndex`` says, and for k below 1."""
    if k < 1:
        raise ValueError(f"k: {k}, must be at least 1")
    return checked_vectors(vectors, dim, "vectors")


def checked_vectors(vectors: npt.NDArray[np.float32], dim: int, name: str) -> npt.NDArray[np.float32]:
    """Rows (n, dim) at unit length. Qdrant would take NaN and zero vectors, so they are refused here."""
    vectors = np.asarray(vectors, np.float32)
    if vectors.ndim != 2 or vectors.shape[1] != dim:
        raise ValueError(f"{name}: shape {vectors.shape}, expected (n, {dim})")
    lengths = np.linalg.norm(vectors.astype(np.float64), axis=1)
    wrong = np.flatnonzero(~(np.isfinite(lengths) & (lengths > 0)))
    if len(wrong):
        raise ValueError(f"{name}[{wrong[0]}]: has length {lengths[wrong[0]]:g}, so it has no direction")
    unit: npt.NDArray[np.float32] = (vectors / lengths[:, None]).astype(np.float32)
    return unit
