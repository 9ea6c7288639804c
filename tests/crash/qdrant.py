"""A Qdrant server on loopback, gRPC only: the calls that a worker makes, kept in a qdrant-edge shard.

Faults can be put in: calls that are refused, calls that are late, and no server at all.
"""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc as rpc
import numpy as np
from qdrant_client import grpc

from gpl.index.edge import EdgeIndex
from tests.integration.pipeline import free_port


class Server(grpc.PointsServicer, grpc.CollectionsServicer):
    """``broken``: every call answers UNAVAILABLE. ``delay``: seconds before each answer. A context manager."""

    def __init__(self, directory: Path, dim: int) -> None:
        directory.mkdir()
        self._edge = EdgeIndex(directory / "shard", dim)
        self._dim = dim
        self._collections: set[str] = set()
        self._names: dict[str, str] = {}
        self._lock = threading.Lock()
        self.port = free_port()
        self.broken = False
        self.delay = 0.0
        self.refused = 0
        self._server: Any = None

    def start(self) -> None:
        self._server = rpc.server(ThreadPoolExecutor(8))
        grpc.add_PointsServicer_to_server(self, self._server)
        grpc.add_CollectionsServicer_to_server(self, self._server)
        assert self._server.add_insecure_port(f"127.0.0.1:{self.port}") == self.port
        self._server.start()

    def stop(self) -> None:
        self._server.stop(0).wait()

    def lose(self, share: float) -> None:
        """As after an old backup: so much of what it held is gone, and one item has the vector of before."""
        with self._lock:
            *gone, changed = sorted(self._names)[: int(share * len(self._names)) + 1]
            self._edge.delete([self._names.pop(point) for point in gone])
            self._edge.upsert([self._names[changed]], np.eye(1, self._dim, dtype=np.float32), np.zeros((1, 1), int))

    def vectors(self, ids: list[str]) -> dict[str, Any]:
        with self._lock:
            return self._edge.retrieve(ids)

    def __enter__(self) -> Server:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._edge.close()

    def _fault(self, context: rpc.ServicerContext) -> None:
        time.sleep(self.delay)
        if self.broken:
            self.refused += 1
            context.abort(rpc.StatusCode.UNAVAILABLE, "the shard is recovering, say")

    # --- collections ---

    def CollectionExists(self, request: Any, context: rpc.ServicerContext) -> Any:
        self._fault(context)
        exists = grpc.CollectionExists(exists=request.collection_name in self._collections)
        return grpc.CollectionExistsResponse(result=exists)

    def Create(self, request: Any, context: rpc.ServicerContext) -> Any:
        self._fault(context)
        self._collections.add(request.collection_name)
        return grpc.CollectionOperationResponse(result=True)

    def Get(self, request: Any, context: rpc.ServicerContext) -> Any:
        """Both services have a call of this name."""
        self._fault(context)
        if isinstance(request, grpc.GetCollectionInfoRequest):
            params = grpc.VectorParams(size=self._dim, distance=grpc.Cosine)
            config = grpc.CollectionConfig(
                params=grpc.CollectionParams(vectors_config=grpc.VectorsConfig(params=params)),
                hnsw_config=grpc.HnswConfigDiff(m=16, ef_construct=100, full_scan_threshold=10_000),
                optimizer_config=grpc.OptimizersConfigDiff(
                    deleted_threshold=0.2, vacuum_min_vector_number=1000, default_segment_number=0, flush_interval_sec=5
                ),
                wal_config=grpc.WalConfigDiff(wal_capacity_mb=32, wal_segments_ahead=0),
            )
            return grpc.GetCollectionInfoResponse(result=grpc.CollectionInfo(status=grpc.Green, config=config))
        with self._lock:
            wanted = {self._names[point.uuid]: point for point in request.ids if point.uuid in self._names}
            found = self._edge.retrieve(list(wanted))
        points = [
            grpc.RetrievedPoint(
                id=wanted[name],
                vectors=grpc.VectorsOutput(vector=grpc.VectorOutput(dense=grpc.DenseVector(data=row.tolist()))),
            )
            for name, row in found.items()
        ]
        return grpc.GetResponse(result=points)

    # --- points ---

    def CreateFieldIndex(self, request: Any, context: rpc.ServicerContext) -> Any:
        self._fault(context)
        return _done()

    def Upsert(self, request: Any, context: rpc.ServicerContext) -> Any:
        self._fault(context)
        names, rows, sids = [], [], []
        for point in request.points:
            names.append(point.payload["item_id"].string_value)
            vector = point.vectors.vector
            rows.append(list(vector.dense.data) or list(vector.data))
            sids.append([value.integer_value for value in point.payload["sid"].list_value.values])
            self._names[point.id.uuid] = names[-1]
        with self._lock:
            self._edge.upsert(names, np.array(rows, np.float32), np.array(sids, np.int32))
        return _done()

    def Delete(self, request: Any, context: rpc.ServicerContext) -> Any:
        self._fault(context)
        with self._lock:
            self._edge.delete([self._names.pop(p.uuid) for p in request.points.points.ids if p.uuid in self._names])
        return _done()

    def Count(self, request: Any, context: rpc.ServicerContext) -> Any:
        self._fault(context)
        return grpc.CountResponse(result=grpc.CountResult(count=self._edge.count()))


def _done() -> Any:
    return grpc.PointsOperationResponse(result=grpc.UpdateResult(status=grpc.Completed))
