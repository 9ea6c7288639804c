"""The index on a Qdrant server, shared by processes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import grpc
import httpx
import numpy as np
import numpy.typing as npt
from qdrant_client import QdrantClient, models
from qdrant_client.common.client_exceptions import ResourceExhaustedResponse
from qdrant_client.http.exceptions import ResponseHandlingException, UnexpectedResponse

from gpl.index.base import (
    Hit,
    IndexUnavailable,
    batches,
    checked_items,
    checked_queries,
    point_id,
    ranked,
)

_BATCH = 256  # points a request: about 2 MB of JSON at 384 dimensions
_TIMEOUT_SECONDS = 30  # a server under heavy upserts answers late (qdrant 2822, 5319)
_SEARCH_WIDTH = 256  # HNSW ef: recall before speed, searches here are batched and off the request path

_PASSING = {
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.ABORTED,
    grpc.StatusCode.INTERNAL,
}


class ServerIndex:
    """``VectorIndex`` in one collection of a server. Search is approximate (HNSW) once the server has built its graph.

    Writes wait until the server has applied them. A server that does not answer, is overloaded or fails raises
    IndexUnavailable.
    """

    def __init__(self, client: QdrantClient, collection: str, dim: int, where: str = "index server") -> None:
        """Use ``collection``, made if it is not there. Raises ValueError if it holds vectors of another kind.
        ``where``: what errors call the server.
        """
        self.dim = dim
        self._client = client
        self._collection = collection
        self._where = where
        with _translated(where):
            if not client.collection_exists(collection):
                self._create()
            self._check()

    @classmethod
    def connect(
        cls,
        url: str,
        api_key: str | None,
        collection: str,
        dim: int,
        grpc_port: int | None = None,
        timeout: int = _TIMEOUT_SECONDS,
    ) -> ServerIndex:
        """Connect over HTTP, or over gRPC where ``grpc_port`` is given. ``timeout``: seconds a call may take.

        Raises IndexUnavailable when nobody answers there.
        """
        # Without explicit limits the client turns keep-alive off on localhost: a connection a request.
        limits = httpx.Limits(max_connections=32, max_keepalive_connections=8)
        client = QdrantClient(
            url=url,
            api_key=api_key,
            timeout=timeout,
            limits=limits,
            prefer_grpc=grpc_port is not None,
            grpc_port=grpc_port or 6334,
            check_compatibility=grpc_port is None,  # asks over HTTP
        )
        return cls(client, collection, dim, where=f"index server {url}")

    def upsert(self, ids: Sequence[str], vectors: npt.NDArray[np.float32], sids: npt.NDArray[np.integer]) -> None:
        items = checked_items(ids, vectors, sids, self.dim)
        for batch in batches(list(items), _BATCH):
            points = []
            for item_id in batch:
                vector, sid = items[item_id]
                payload = {"item_id": item_id, "sid": sid}
                points.append(models.PointStruct(id=point_id(item_id), vector=vector.tolist(), payload=payload))
            with _translated(self._where):
                self._client.upsert(self._collection, points, wait=True)

    def delete(self, ids: Sequence[str]) -> None:
        for batch in batches(ids, _BATCH):
            with _translated(self._where):
                self._client.delete(self._collection, [point_id(item_id) for item_id in batch], wait=True)

    def retrieve(self, ids: Sequence[str]) -> dict[str, npt.NDArray[np.float32]]:
        found: dict[str, npt.NDArray[np.float32]] = {}
        for batch in batches(ids, _BATCH):
            wanted = {point_id(item_id): item_id for item_id in batch}
            with _translated(self._where):
                records = self._client.retrieve(self._collection, list(wanted), with_payload=False, with_vectors=True)
            for record in records:
                found[wanted[str(record.id)]] = np.asarray(record.vector, np.float32)
        return found

    def nearest(
        self, vectors: npt.NDArray[np.float32], k: int, exclude: Sequence[str] | None = None
    ) -> list[list[Hit]]:
        queries = checked_queries(vectors, k, self.dim)
        without = None
        if exclude:
            without = models.Filter(
                must_not=[models.HasIdCondition(has_id=[point_id(item_id) for item_id in dict.fromkeys(exclude)])]
            )
        requests = [
            models.QueryRequest(
                query=query.tolist(),
                filter=without,
                params=models.SearchParams(hnsw_ef=_SEARCH_WIDTH),
                limit=k,
                with_payload=["item_id"],
            )
            for query in queries
        ]
        if not requests:
            return []
        with _translated(self._where):
            answers = self._client.query_batch_points(self._collection, requests)
        return [
            ranked([(str((point.payload or {})["item_id"]), point.score) for point in answer.points])
            for answer in answers
        ]

    def count(self) -> int:
        with _translated(self._where):
            return self._client.count(self._collection, exact=True).count

    def close(self) -> None:
        self._client.close()

    def _create(self) -> None:
        try:
            self._client.create_collection(
                self._collection,
                vectors_config=models.VectorParams(size=self.dim, distance=models.Distance.COSINE),
            )
        except UnexpectedResponse as error:
            if error.status_code != 409:  # another process made it between the two calls
                raise
        # Before the first upload: the graph is then built with the field in view, and filters on it stay fast.
        self._client.create_payload_index(self._collection, "item_id", models.PayloadSchemaType.KEYWORD)

    def _check(self) -> None:
        vectors = self._client.get_collection(self._collection).config.params.vectors
        expected = models.VectorParams(size=self.dim, distance=models.Distance.COSINE)
        if not isinstance(vectors, models.VectorParams) or (vectors.size, vectors.distance) != (
            expected.size,
            expected.distance,
        ):
            raise ValueError(
                f"collection {self._collection!r}: holds {vectors!r}, expected one vector of size {self.dim}, Cosine"
            )


@contextmanager
def _translated(where: str) -> Iterator[None]:
    """What may pass by itself as IndexUnavailable; other refusals (4xx) as they are."""
    try:
        yield
    except (ResponseHandlingException, ResourceExhaustedResponse) as error:
        raise IndexUnavailable(f"{where}: {error}") from error
    except grpc.RpcError as error:
        if isinstance(error, grpc.Call) and error.code() in _PASSING:
            raise IndexUnavailable(f"{where}: {error.code().name}: {error.details()}") from error
        raise
    except UnexpectedResponse as error:
        if error.status_code is None or error.status_code >= 500 or error.status_code == 429:
            raise IndexUnavailable(f"{where}: {error}") from error
        raise
