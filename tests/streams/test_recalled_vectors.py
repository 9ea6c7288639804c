"""The matrix of recalled items: filled from the index, once for an item, and current."""

from __future__ import annotations

import numpy as np
import pytest

from gpl.index.oracle import ExactIndex
from streams.contracts import ItemVector
from streams.labels.matrix import RecalledVectors
from streams.views import vector_bytes

DIM = 8


def unit(rng, rows):
    x = rng.standard_normal((rows, DIM)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


@pytest.fixture
def world():
    vectors = unit(np.random.default_rng(0), 30)
    index = ExactIndex(DIM)
    index.upsert([f"i{n}" for n in range(30)], vectors, np.zeros((30, 3), np.int32))
    asked = []
    retrieve = index.retrieve
    index.retrieve = lambda ids: asked.append(list(ids)) or retrieve(ids)
    known = {f"i{n}" for n in range(30)} | {"not in the index"}
    return vectors, RecalledVectors(index, known, DIM, 3), asked


def test_what_is_known_comes_in_order_and_is_fetched_once(world):
    vectors, recalled, asked = world
    ids, found = recalled.lookup(["i3", "nobody", "i1", "not in the index", "i3"])
    assert ids == ["i3", "i1", "i3"]
    np.testing.assert_allclose(found, vectors[[3, 1, 3]], atol=1e-6)
    assert asked == [["i3", "i1", "not in the index", "i3"]]
    recalled.lookup(["i1", "i3"])
    assert len(asked) == 1
    assert recalled.lookup([])[1].shape == (0, DIM)
    assert recalled.lookup(["nobody"])[1].shape == (0, DIM)


def test_more_than_ever_before_are_gathered_whole(world):
    vectors, recalled, _ = world
    for count in (2, 30, 5):
        ids, found = recalled.lookup([f"i{n}" for n in range(count)])
        assert len(ids) == count
        np.testing.assert_allclose(found, vectors[:count], atol=1e-6)  # the index normalises


def test_a_changed_item_is_matched_as_it_is_now_and_a_removed_one_not_at_all(world):
    _, recalled, _ = world
    recalled.lookup(["i1", "i2"])
    new = unit(np.random.default_rng(1), 1)
    recalled.changed("i1", ItemVector("i1", vector_bytes(new), [0, 0, 0], "c", "e", "q"))
    np.testing.assert_array_equal(recalled.lookup(["i1"])[1], new)
    recalled.changed("i1", None)
    recalled._known.discard("i1")
    assert recalled.lookup(["i1", "i2"])[0] == ["i2"]
