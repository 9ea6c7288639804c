"""The index embedded in this process: a qdrant-edge shard on local disk."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import qdrant_edge as qe

from gpl.index.base import (
    Hit,
    IndexUnavailable,
    batches,
    checked_items,
    checked_queries,
    point_id,
    ranked,
)

_SHARD_FILES = ("edge_config.json", "segments", "wal")
# The binding holds the GIL for a whole call (about 20 ms for this many points of 384 dimensions).
_BATCH = 256
# Points written between two flushes: bounds the write-ahead log, and what a start has to read of it.
_FLUSH_EVERY = 10_000
_SEARCH_WIDTH = 256  # HNSW ef, for a shard that was optimised offline


class EdgeIndex:
    """``VectorIndex`` in a shard directory that this process alone owns.

    What was written when a call returned survives the process being killed (write-ahead log), and a loss of power
    from the next flush on: every 10,000 points and at ``close``. Search reads all vectors and is exact: no optimiser
    runs by itself, and ``optimize()``, which blocks, is not called. Not thread-safe.

    If payload flags are ever added: integers 0/1, for ``MatchValue(True)`` never matches here.
    """

    def __init__(self, path: Path, dim: int) -> None:
        """Open the shard at ``path``, made if it is not there.

        Raises IndexUnavailable if another process (or another object of this one) has it open, ValueError if it
        holds vectors of another dimension or ``path`` is a directory of something else.
        """
        self.dim = dim
        self._unflushed = 0
        self._shard = _opened(path, dim)
        self._closed = False

    def upsert(self, ids: Sequence[str], vectors: npt.NDArray[np.float32], sids: npt.NDArray[np.integer]) -> None:
        items = checked_items(ids, vectors, sids, self.dim)
        for batch in batches(list(items), _BATCH):
            points = []
            for item_id in batch:
                vector, sid = items[item_id]
                points.append(qe.Point(point_id(item_id), vector.tolist(), {"item_id": item_id, "sid": sid}))
            self._write(qe.UpdateOperation.upsert_points(points), len(batch))

    def delete(self, ids: Sequence[str]) -> None:
        for batch in batches(ids, _BATCH):
            self._write(qe.UpdateOperation.delete_points([point_id(item_id) for item_id in batch]), len(batch))

    def retrieve(self, ids: Sequence[str]) -> dict[str, npt.NDArray[np.float32]]:
        found: dict[str, npt.NDArray[np.float32]] = {}
        for batch in batches(ids, _BATCH):
            wanted = {point_id(item_id): item_id for item_id in batch}
            # Unknown ids are left out of the answer without a word, so it is joined by id, never by position.
            for record in self._shard.retrieve(list(wanted), with_payload=False, with_vector=True):
                found[wanted[str(record.id)]] = np.asarray(record.vector, np.float32)
        return found

    def nearest(
        self, vectors: npt.NDArray[np.float32], k: int, exclude: Sequence[str] | None = None
    ) -> list[list[Hit]]:
        queries = checked_queries(vectors, k, self.dim)
        without = None
        if exclude:
            without = qe.Filter(must_not=[qe.HasIdCondition({point_id(item_id) for item_id in exclude})])
        requests = [
            qe.QueryRequest(
                limit=k,
                query=qe.Query.Nearest(query.tolist()),
                filter=without,
                params=qe.SearchParams(hnsw_ef=_SEARCH_WIDTH),
                with_payload=["item_id"],
            )
            for query in queries
        ]
        if not requests:
            return []
        answers = self._shard.query_batch(qe.QueryBatchRequest(requests))
        return [ranked([((point.payload or {})["item_id"], point.score) for point in answer]) for answer in answers]

    def count(self) -> int:
        return int(self._shard.count(qe.CountRequest(exact=True)))

    def close(self) -> None:
        """Flush to disk and let another process open the shard."""
        if not self._closed:
            self._shard.flush()
            self._shard.close()
            self._closed = True

    def _write(self, operation: qe.UpdateOperation, points: int) -> None:
        self._shard.update(operation)
        self._unflushed += points
        if self._unflushed >= _FLUSH_EVERY:
            self._shard.flush()
            self._unflushed = 0


def _opened(path: Path, dim: int) -> qe.EdgeShard:
    config = qe.EdgeConfig(vectors=qe.EdgeVectorParams(size=dim, distance=qe.Distance.Cosine))
    exists = any((path / name).exists() for name in _SHARD_FILES)
    if not exists and path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"index path {path}: is neither empty nor a qdrant-edge shard")
    path.mkdir(parents=True, exist_ok=True)
    try:
        if exists:
            return qe.EdgeShard.load(str(path), config)
        return qe.EdgeShard.create(str(path), config)
    except Exception as error:  # the binding raises bare Exceptions
        if "WouldBlock" in str(error):
            raise IndexUnavailable(
                f"index shard {path}: is open elsewhere; one process owns a shard. Stop the other one, give this one "
                'another [index] path, or share a server with kind = "server"'
            ) from error
        if "Incompatible config" in str(error):
            raise ValueError(f"index shard {path}: does not hold vectors of dimension {dim}: {error}") from error
        raise OSError(f"index shard {path}: {error}") from error
