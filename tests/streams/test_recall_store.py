"""The two stores of recalls behave alike, and labels do not depend on which one is used."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from streams.contracts import Feedback, Recall
from streams.labels.joiner import Joiner, Source
from streams.labels.store import DiskStore, MemoryStore, open_store
from streams.settings import LabelSettings


@pytest.fixture(params=["memory", "disk"])
def store(request, tmp_path):
    opened = open_store(LabelSettings(store=request.param, store_path=tmp_path / "recalls"))
    yield opened
    opened.close()


def test_what_was_put_is_there_until_it_is_removed(store):
    store.put("r1", b"one")
    store.put("r/2 \N{SNOWMAN}", b"\x00two")
    assert store.get("r1") == b"one"
    assert store.get("r/2 \N{SNOWMAN}") == b"\x00two"
    store.remove(["r1"])
    with pytest.raises(KeyError):
        store.get("r1")
    store.clear()
    with pytest.raises(KeyError):
        store.get("r/2 \N{SNOWMAN}")
    store.put("r1", b"again")
    assert store.get("r1") == b"again"


def test_the_directory_of_a_process_goes_with_it_and_those_of_dead_ones_too(tmp_path):
    left = tmp_path / "4194304"  # above the largest process id that Linux gives
    left.mkdir()
    (left / "CURRENT").write_text("")
    store = DiskStore(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [str(os.getpid())]
    store.close()
    assert list(tmp_path.iterdir()) == []


def test_requests_join_alike_in_memory_and_on_disk(tmp_path: Path):
    joined = []
    stores = [MemoryStore(), DiskStore(tmp_path)]
    for store in stores:
        joiner = Joiner(100, 50, store)
        for n in range(50):
            recall = Recall(f"r{n}", f"u{n % 3}", n, [f"i{(n * k) % 17}" for k in range(1, 9)])
            joiner.add_recall(recall, Source(n, n))
            joiner.add_feedback(Feedback(f"e{n}", f"u{n % 3}", f"i{n % 17}", n + 5, "click"), Source(n, n))
        joined.append([*joiner.close(120), joiner.rejoin("r3")])
        joiner.forget(1000)
        with pytest.raises(KeyError):
            store.get("r3")
        store.close()
    assert joined[0] == joined[1] and any(j.exposed for j in joined[0])
