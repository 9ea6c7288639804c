"""Vectors of an index server that is away for a while, over Qdrant's wire."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from gpl.index.base import IndexUnavailable
from gpl.index.server import ServerIndex
from streams.contracts import ItemVector
from streams.labels.matrix import RecalledVectors
from streams.views import vector_bytes
from tests.crash.qdrant import Server

DIM = 4
AXES = np.eye(DIM, dtype=np.float32)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with Server(tmp_path / "qdrant", DIM) as server:
        yield server


@pytest.fixture
def recalled(server: Server) -> RecalledVectors:
    index = ServerIndex.connect("http://127.0.0.1:6333", None, "items", DIM, server.port, 2)
    index.upsert(["a", "b"], AXES[:2], np.zeros((2, 3), np.int32))
    return RecalledVectors(index, {"a", "b", "not yet written"}, DIM, 3)


def always() -> bool:
    return True


async def test_it_waits_until_the_index_is_back(server: Server, recalled: RecalledVectors) -> None:
    server.broken = True
    waiting = asyncio.ensure_future(recalled.have(["a", "b", "unknown"], always))
    while server.refused < 3:
        await asyncio.sleep(0.05)
    assert not waiting.done()
    with pytest.raises(IndexUnavailable):
        recalled.lookup(["a"])
    server.broken = False
    assert await waiting
    server.broken = True  # all is at hand now
    known, vectors = recalled.lookup(["b", "unknown", "a"])
    assert known == ["b", "a"]
    np.testing.assert_array_equal(vectors, AXES[[1, 0]])


async def test_it_waits_for_nobody_who_does_not(server: Server, recalled: RecalledVectors) -> None:
    server.broken = True
    wanted = True
    waiting = asyncio.ensure_future(recalled.have(["a"], lambda: wanted))
    while server.refused < 1:
        await asyncio.sleep(0.05)
    wanted = False
    assert not await waiting


async def test_what_is_known_and_not_yet_written_is_not_waited_for(recalled: RecalledVectors) -> None:
    assert await recalled.have(["a", "not yet written"], always)
    assert recalled.lookup(["a"])[0] == ["a"]


async def test_a_change_on_the_way_is_not_overwritten_by_what_was_before(
    server: Server, recalled: RecalledVectors
) -> None:
    server.delay = 0.3
    waiting = asyncio.ensure_future(recalled.have(["a"], always))
    await asyncio.sleep(0.1)  # the call is on its way
    changed = ItemVector("a", vector_bytes(AXES[2:3]), [0, 0, 0], "other", "e", "q")
    recalled.changed("a", changed)
    # Its writer puts a vector into the index before it tells of it.
    server._edge.upsert(["a"], AXES[2:3], np.zeros((1, 3), np.int32))
    assert await waiting
    np.testing.assert_array_equal(recalled.lookup(["a"])[1], AXES[2:3])
