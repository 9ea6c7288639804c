from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpl.catalogue import Catalogue
from streams.contracts import Calibration, ItemVector, UserAnchors, encode
from streams.views import AnchorsView, AsOf, CalibrationView, CatalogueView, vector_bytes, vectors_from


def record(value, key: bytes = b"k", partition: int = 0):
    return SimpleNamespace(key=key, value=None if value is None else encode(value), partition=partition)


@given(st.lists(st.integers(0, 50)), st.integers(-5, 60), st.integers(-5, 60))
def test_as_of_is_the_newest_not_later_also_after_forgetting(times, asked, forgotten):
    versions: AsOf[int] = AsOf()
    for ts in times:
        versions.put(ts, ts)
    assert versions.at(asked) == max((ts for ts in times if ts <= asked), default=None)
    assert versions.newest() == max(times, default=None)
    versions.forget_before(forgotten)
    if asked >= forgotten:
        assert versions.at(asked) == max((ts for ts in times if ts <= asked), default=None)


def test_a_redelivered_version_replaces_itself():
    versions: AsOf[str] = AsOf()
    versions.put(1, "a")
    versions.put(1, "b")
    assert versions.at(1) == "b"
    versions.forget_before(1)
    assert versions.at(1) == "b"


def item(item_id: str, vector: list[float], encoder: str = "space") -> ItemVector:
    data = vector_bytes(np.array(vector, np.float32))
    return ItemVector(item_id, data, [0, 1], "content", encoder, "codes")


def test_catalogue_view_follows_additions_changes_and_removals():
    told = []
    view = CatalogueView(Catalogue(2, 2), 2, "space", "codes", lambda i, v: told.append((i, v is not None)))
    view(record(item("a", [1, 0]), b"a"))
    view(record(item("a", [0, 1]), b"a"))
    view(record(item("of another space", [0, 1], "older"), b"x"))
    np.testing.assert_array_equal(view.catalogue.lookup(["a"])[1], [[0, 1]])
    assert (len(view.catalogue), view.foreign, view.content) == (1, 1, {"a": "content"})
    view(record(None, b"a"))
    view(record(None, b"never there"))
    assert len(view.catalogue) == 0 and view.content == {}
    assert told == [("a", True), ("a", True), ("a", False)]


def anchors(ts: int, version: int) -> UserAnchors:
    return UserAnchors("u", ts, version, [], [], b"", [], [], "g", "q", "e")


def test_anchors_view_answers_as_of_a_time():
    told = []
    view: AnchorsView[int] = AnchorsView(lambda a: a.version, lambda p, a: told.append((p, a.version)))
    view(record(anchors(10, 1), b"u", 2))
    view(record(anchors(20, 2), b"u", 2))
    assert [view.at(2, "u", ts) for ts in (9, 10, 19, 20, 99)] == [None, 1, 1, 2, 2]
    assert view.at(2, "nobody", 99) is None
    assert view.at(1, "u", 99) is None, "of another partition, which this worker may lose"
    assert told == [(2, 1), (2, 2)]
    view.forget_before({1: 25})
    assert view.at(2, "u", 15) == 1, "of another partition"
    view.forget_before({2: 25})
    assert view.at(2, "u", 30) == 2 and view.at(2, "u", 15) is None
    view(record(None, b"u", 2))
    assert len(view) == 0


def test_calibration_view_answers_as_of_a_time():
    changed = []
    view = CalibrationView(changed.append)
    view(record(Calibration("one", 0, "none")))
    view(record(Calibration("two", 100, "platt", 2.0, 0.0, 10)))
    assert view.at(99).version == "one"
    assert view.at(100).version == "two"
    assert changed == [0, 100]


def test_vectors_survive_the_wire_and_odd_lengths_are_refused():
    vectors = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)
    np.testing.assert_array_equal(vectors_from(vector_bytes(vectors), 5), vectors)
    with pytest.raises(ValueError, match="60 bytes"):
        vectors_from(vector_bytes(vectors), 4)
