"""One contract over all adapters, then what is particular to each."""

import os
import subprocess
import sys
import uuid
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import numpy as np
import pytest

from gpl.index import IndexUnavailable
from gpl.index.oracle import ExactIndex

DIM = 8
# The client's local mode tells what it leaves out; it is only here to run the adapter without a server.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Payload indexes have no effect in the local Qdrant:UserWarning"),
    pytest.mark.filterwarnings("ignore:Local mode performs exact:UserWarning"),
]


def unit_rows(n, dim=DIM, seed=0):
    rows = np.random.default_rng(seed).standard_normal((n, dim)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def sids(n):
    return np.arange(3 * n, dtype=np.int32).reshape(n, 3)


def edge(path, dim=DIM):
    module = pytest.importorskip("gpl.index.edge", exc_type=ImportError)
    return module.EdgeIndex(path / "shard", dim)


def local_server(client, dim=DIM):
    from gpl.index.server import ServerIndex

    return ServerIndex(client, "items", dim)


@pytest.fixture(params=["oracle", "edge", "client-in-memory", "server"])
def index(request, tmp_path):
    if request.param == "oracle":
        made = ExactIndex(DIM)
    elif request.param == "edge":
        made = edge(tmp_path)
    elif request.param == "client-in-memory":
        from qdrant_client import QdrantClient

        made = local_server(QdrantClient(":memory:"))
    else:
        url = os.environ.get("QDRANT_URL")
        if url is None:
            pytest.skip("QDRANT_URL is not set")
        from qdrant_client import QdrantClient

        from gpl.index.server import ServerIndex

        key, collection = os.environ.get("QDRANT_API_KEY"), f"gpl-test-{uuid.uuid4().hex[:8]}"
        request.addfinalizer(lambda: QdrantClient(url=url, api_key=key).delete_collection(collection))
        made = ServerIndex.connect(url, key, collection, DIM)
    yield made
    made.close()


def test_starts_empty(index):
    assert index.dim == DIM
    assert index.count() == 0
    assert index.retrieve(["a"]) == {}
    assert index.nearest(unit_rows(2), 3) == [[], []]
    index.delete(["a"])
    index.upsert([], np.zeros((0, DIM), np.float32), sids(0))
    assert index.count() == 0


def test_retrieve_joins_by_id_and_leaves_out_what_is_unknown(index):
    vectors = unit_rows(600)  # more than one batch
    ids = [f"item/{i} \u00e9\u4e2d" for i in range(600)]
    index.upsert(ids, vectors, sids(600))
    assert index.count() == 600

    asked = [ids[599], "nobody", ids[0], ids[599], ids[300]]
    found = index.retrieve(asked)
    assert set(found) == {ids[599], ids[0], ids[300]}
    for item_id, vector in found.items():
        assert vector.dtype == np.float32
        np.testing.assert_allclose(vector, vectors[ids.index(item_id)], atol=1e-6)
    assert len(index.retrieve(ids)) == 600


def test_nearest_is_the_exact_ranking(index):
    vectors, queries = unit_rows(300, seed=1), unit_rows(5, seed=2)
    ids = [f"i{i}" for i in range(300)]
    index.upsert(ids, vectors, sids(300))
    for query, hits in zip(queries, index.nearest(queries * 3, 10), strict=True):
        cosines = vectors.astype(np.float64) @ query
        best = np.argsort(-cosines)[:10]
        assert [item_id for item_id, _ in hits] == [ids[i] for i in best]
        np.testing.assert_allclose([score for _, score in hits], cosines[best], atol=1e-5)
    assert index.nearest(np.zeros((0, DIM), np.float32), 3) == []


def test_nearest_leaves_excluded_items_out_and_gives_fewer_when_there_are_fewer(index):
    vectors = unit_rows(20, seed=3)
    ids = [f"i{i}" for i in range(20)]
    index.upsert(ids, vectors, sids(20))
    every = [item_id for item_id, _ in index.nearest(vectors[:1], 100)[0]]
    assert sorted(every) == sorted(ids)
    excluded = [every[0], every[3], every[3], "nobody"]
    rest = [item_id for item_id, _ in index.nearest(vectors[:1], 100, exclude=excluded)[0]]
    assert rest == [item_id for item_id in every if item_id not in excluded]
    assert index.nearest(vectors[:1], 5, exclude=ids) == [[]]
    assert len(index.nearest(vectors[:1], 5, exclude=[])[0]) == 5


def test_an_upsert_replaces_and_the_last_of_equal_ids_wins(index):
    vectors = unit_rows(4, seed=4)
    index.upsert(["a", "b"], vectors[:2], sids(2))
    index.upsert(["a", "a"], vectors[2:], sids(2))
    assert index.count() == 2
    np.testing.assert_allclose(index.retrieve(["a"])["a"], vectors[3], atol=1e-6)
    (nearest,) = index.nearest(vectors[3:], 1)
    assert nearest[0][0] == "a"
    assert nearest[0][1] == pytest.approx(1, abs=1e-5)


def test_deleted_items_are_gone_from_everything(index):
    vectors = unit_rows(300, seed=5)
    ids = [f"i{i}" for i in range(300)]
    index.upsert(ids, vectors, sids(300))
    index.delete([*ids[:290], "nobody"])
    assert index.count() == 10
    assert set(index.retrieve(ids)) == set(ids[290:])
    assert {item_id for item_id, _ in index.nearest(vectors[:1], 300)[0]} == set(ids[290:])
    index.upsert(ids[:1], vectors[1:2], sids(1))
    np.testing.assert_allclose(index.retrieve(ids[:1])[ids[0]], vectors[1], atol=1e-6)


def test_vectors_are_kept_at_unit_length_and_results_are_the_callers_own(index):
    vector = unit_rows(1, seed=6)
    index.upsert(["a"], 5 * vector, sids(1))
    found = index.retrieve(["a"])["a"]
    np.testing.assert_allclose(found, vector[0], atol=1e-6)
    found[:] = 0
    np.testing.assert_allclose(index.retrieve(["a"])["a"], vector[0], atol=1e-6)


@pytest.mark.parametrize(
    ("ids", "vectors", "codes", "message"),
    [
        (["a"], unit_rows(1, 5), sids(1), rf"vectors: shape \(1, 5\), expected \(n, {DIM}\)"),
        (["a"], unit_rows(1)[0], sids(1), r"vectors: shape"),
        (["a", "b"], unit_rows(1), sids(2), "ids: 2, vectors: 1"),
        (["a"], unit_rows(1), sids(2), "ids: 1, vectors: 1"),
        (["a"], np.full((1, DIM), np.nan), sids(1), r"vectors\[0\]: has length nan"),
        (["a", "b"], np.eye(2, DIM) * [[1], [0]], sids(2), r"vectors\[1\]: has length 0"),
        (["a"], np.full((1, DIM), np.inf), sids(1), r"vectors\[0\]: has length inf"),
    ],
)
def test_refuses_bad_items_and_keeps_none_of_them(index, ids, vectors, codes, message):
    with pytest.raises(ValueError, match=message):
        index.upsert(ids, vectors, codes)
    assert index.count() == 0


def test_refuses_bad_queries(index):
    with pytest.raises(ValueError, match="k: 0"):
        index.nearest(unit_rows(1), 0)
    with pytest.raises(ValueError, match="vectors: shape"):
        index.nearest(unit_rows(1)[0], 1)
    with pytest.raises(ValueError, match=r"vectors\[1\]"):
        index.nearest(np.eye(2, DIM, dtype=np.float32) * [[1], [0]], 1)


def test_closing_twice_is_harmless(index):
    index.close()
    index.close()


# --- edge


def test_shard_keeps_its_items_when_closed_and_opened(tmp_path):
    index = edge(tmp_path)
    vectors = unit_rows(3)
    index.upsert(list("abc"), vectors, sids(3))
    index.delete(["b"])
    index.close()

    again = edge(tmp_path)
    assert again.count() == 2
    np.testing.assert_allclose(again.retrieve(["c"])["c"], vectors[2], atol=1e-6)
    again.close()


def test_a_shard_that_is_open_is_refused_until_it_is_closed(tmp_path):
    first = edge(tmp_path)
    with pytest.raises(IndexUnavailable, match="shard: is open elsewhere; one process owns a shard"):
        edge(tmp_path)
    first.upsert(["a"], unit_rows(1), sids(1))
    first.close()
    second = edge(tmp_path)
    assert second.count() == 1
    second.close()


def test_a_shard_of_another_dimension_and_a_foreign_directory_are_refused(tmp_path):
    edge(tmp_path).close()
    with pytest.raises(ValueError, match="does not hold vectors of dimension 5"):
        edge(tmp_path, dim=5)
    edge(tmp_path).close()

    foreign = tmp_path / "foreign" / "shard"
    foreign.mkdir(parents=True)
    (foreign / "letter.txt").write_text("not yours")
    with pytest.raises(ValueError, match="neither empty nor a qdrant-edge shard"):
        edge(tmp_path / "foreign")


WRITER = """
import sys
from pathlib import Path
import numpy as np
from gpl.index.edge import EdgeIndex
index = EdgeIndex(Path(sys.argv[1]), 8)
rng = np.random.default_rng(0)
batch = 0
while True:
    vectors = rng.standard_normal((50, 8)).astype(np.float32)
    index.upsert([f"{batch}-{i}" for i in range(50)], vectors, np.full((50, 3), batch))
    if batch >= 3:
        index.delete([f"{batch - 3}-0"])
    print(batch, flush=True)
    batch += 1
"""


def test_a_killed_owner_loses_nothing_it_had_acknowledged_and_frees_the_shard(tmp_path):
    edge(tmp_path).close()
    command = [sys.executable, "-c", WRITER, str(tmp_path / "shard")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
        acknowledged = -1
        for line in writer.stdout:
            acknowledged = int(line)
            if acknowledged == 0:
                with pytest.raises(IndexUnavailable):
                    edge(tmp_path)
            if acknowledged >= 40:
                writer.kill()  # in the middle of its next write
                break
        rest = writer.stdout.read().split()
    acknowledged = int(rest[-1]) if rest else acknowledged
    assert writer.returncode == -9

    index = edge(tmp_path)
    rng = np.random.default_rng(0)
    for batch in range(acknowledged + 1):
        vectors = rng.standard_normal((50, 8)).astype(np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        deleted = batch + 3 <= acknowledged
        found = index.retrieve([f"{batch}-{i}" for i in range(50)])
        if batch + 3 == acknowledged + 1:
            found.setdefault(f"{batch}-0", vectors[0])  # its removal was under way
        assert set(found) == {f"{batch}-{i}" for i in range(int(deleted), 50)}
        for item_id, vector in found.items():
            np.testing.assert_allclose(vector, vectors[int(item_id.split("-")[1])], atol=1e-6)
    index.close()


def test_what_is_written_across_a_flush_is_all_there(tmp_path, monkeypatch):
    index = edge(tmp_path)
    monkeypatch.setattr("gpl.index.edge._FLUSH_EVERY", 100)
    vectors = unit_rows(700, seed=9)
    ids = [str(i) for i in range(700)]
    index.upsert(ids, vectors, sids(700))
    index.delete(ids[:300])
    index.close()
    again = edge(tmp_path)
    assert set(again.retrieve(ids)) == set(ids[300:])
    again.close()


# --- server


def test_payload_says_which_item_a_point_is():
    from qdrant_client import QdrantClient

    client = QdrantClient(":memory:")
    local_server(client).upsert(["a", "b"], unit_rows(2), sids(2))
    points, _ = client.scroll("items", with_payload=True)
    assert sorted((point.payload["item_id"], point.payload["sid"]) for point in points) == [
        ("a", [0, 1, 2]),
        ("b", [3, 4, 5]),
    ]


def test_a_collection_is_shared_and_one_of_another_kind_is_refused():
    from qdrant_client import QdrantClient, models

    client = QdrantClient(":memory:")
    local_server(client).upsert(["a"], unit_rows(1), sids(1))
    assert local_server(client).count() == 1
    with pytest.raises(ValueError, match=r"collection 'items': holds .*size=8.* expected one vector of size 5"):
        local_server(client, dim=5)
    client.delete_collection("items")
    client.create_collection("items", models.VectorParams(size=DIM, distance=models.Distance.DOT))
    with pytest.raises(ValueError, match="Dot"):
        local_server(client)


@contextmanager
def answering(status):
    """An HTTP server that refuses every request."""

    class Refusal(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status)
            self.send_header("Retry-After", "1")
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"{}")

        def log_message(self, *arguments):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Refusal) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.filterwarnings("ignore:Failed to obtain server version:UserWarning")
def test_a_server_that_is_not_there_is_unavailable(unused_tcp_port):
    from gpl.index.server import ServerIndex

    url = f"http://127.0.0.1:{unused_tcp_port}"
    with pytest.raises(IndexUnavailable, match=f"index server {url}: .*refused"):
        ServerIndex.connect(url, None, "items", DIM)


@pytest.mark.filterwarnings("ignore:Failed to obtain server version:UserWarning")
@pytest.mark.parametrize("status", [429, 500, 503])
def test_an_overloaded_or_failing_server_is_unavailable(status):
    from gpl.index.server import ServerIndex

    with answering(status) as url, pytest.raises(IndexUnavailable, match=f"index server {url}"):
        ServerIndex.connect(url, None, "items", DIM)


@pytest.mark.filterwarnings("ignore:Failed to obtain server version:UserWarning")
def test_a_refusal_that_will_not_pass_by_itself_is_not_called_unavailable():
    from qdrant_client.http.exceptions import UnexpectedResponse

    from gpl.index.server import ServerIndex

    with answering(401) as url, pytest.raises(UnexpectedResponse, match="401"):
        ServerIndex.connect(url, None, "items", DIM)
