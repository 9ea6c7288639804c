"""What a request's 1,000 vectors cost, by where they come from.

Run: ``pytest tests/gpl/bench_index.py -o addopts=--import-mode=importlib -o python_functions='bench_*'``
"""

import numpy as np
import pytest

from gpl.catalogue import Catalogue

ITEMS, DIM, CANDIDATES, ANCHORS = 10_000, 384, 1000, 10


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((ITEMS, DIM)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    ids = [f"item-{i}" for i in range(ITEMS)]
    # New string objects, as a decoded record has them.
    candidates = [f"item-{i}" for i in rng.choice(ITEMS, CANDIDATES, replace=False)]
    return ids, vectors, np.zeros((ITEMS, 3), np.int32), candidates


@pytest.fixture(scope="module")
def catalogue(data):
    ids, vectors, sids, _ = data
    filled = Catalogue(DIM, 3)
    for item_id, vector, sid in zip(ids, vectors, sids, strict=True):
        filled.put(item_id, vector, sid)
    return filled


@pytest.fixture(scope="module")
def edge(data, tmp_path_factory):
    ids, vectors, sids, _ = data
    index = pytest.importorskip("gpl.index.edge").EdgeIndex(tmp_path_factory.mktemp("bench") / "shard", DIM)
    index.upsert(ids, vectors, sids)
    yield index
    index.close()


def bench_catalogue_rows(benchmark, catalogue, data):
    assert len(benchmark(catalogue.rows, data[3])) == CANDIDATES


def bench_catalogue_lookup(benchmark, catalogue, data):
    assert benchmark(catalogue.lookup, data[3])[1].shape == (CANDIDATES, DIM)


def bench_catalogue_max_cosine(benchmark, catalogue, data):
    anchors = data[1][:ANCHORS]
    scores = benchmark(lambda: (catalogue.lookup(data[3])[1] @ anchors.T).max(axis=1))
    assert scores.shape == (CANDIDATES,)


def bench_edge_retrieve(benchmark, edge, data):
    assert len(benchmark(edge.retrieve, data[3])) == CANDIDATES


def bench_edge_nearest(benchmark, edge, data):
    assert len(benchmark(edge.nearest, data[1][:ANCHORS], 100)) == ANCHORS
