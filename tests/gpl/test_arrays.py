"""``HashedRows`` against a plain dict: the same whatever was put, replaced and removed, and however ids hash."""

import copy

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpl.arrays import HashedRows


class Hashing(str):
    """A string whose hash is chosen: ``"3:7"`` has hash 3 in all bits."""

    def __hash__(self) -> int:
        return int(self.partition(":")[0])

    __eq__ = str.__eq__


def ids(hashes: st.SearchStrategy[int], twins: int) -> st.SearchStrategy[str]:
    return st.builds(lambda key, twin: Hashing(f"{key}:{twin}"), hashes, st.integers(0, twins))


# Hashes that want few slots, so that they stand in runs; negative ones; and none of two ids the same.
crowded = st.integers(0, 40).map(lambda n: (n % 8) + (n << 20)) | st.integers(-5, -2)
steps = st.lists(st.tuples(st.sampled_from(("put", "remove")), st.integers(0, 10**6)), max_size=80)


@pytest.mark.parametrize("twins", [0, 1])
@given(data=st.data())
def test_rows_are_those_of_a_dict(twins: int, data: st.DataObject) -> None:
    """With twins, ids that differ share all of their hash: those that are there are told apart all the same."""
    rows, expected = HashedRows(), {}
    every = data.draw(st.lists(ids(crowded, twins), min_size=1, max_size=30, unique=True))
    for at, (step, row) in enumerate(data.draw(steps)):
        id_ = every[(row + at) % len(every)]
        if step == "put":
            rows[id_] = expected[id_] = row
        else:
            assert rows.pop(id_, None) == expected.pop(id_, None)
        asked = list(expected) if twins else every
        assert rows.of(asked).tolist() == [expected.get(i, -1) for i in asked]
    assert dict(rows) == expected and list(rows) == list(expected) and len(rows) == len(expected)


@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_many_ids_come_and_go(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows, expected = HashedRows(), {}
    for n in range(6000):
        id_ = f"item-{n}"
        rows[id_] = expected[id_] = n
        if rng.random() < 0.4:
            gone = f"item-{rng.integers(n + 1)}"
            assert rows.pop(gone, None) == expected.pop(gone, None)
    wanted = [f"item-{n}" for n in rng.permutation(8000)]
    assert rows.of(wanted).tolist() == [expected.get(i, -1) for i in wanted]
    assert rows.of([]).tolist() == []


def test_removed_ids_do_not_make_the_table_grow() -> None:
    rows = HashedRows()
    for n in range(20_000):
        rows[f"item-{n}"] = n
        del rows[f"item-{n}"]
    assert len(rows._table) == 1024 and rows.of(["item-1"]).tolist() == [-1]


def test_a_copy_has_a_table_of_its_own() -> None:
    rows = HashedRows()
    rows.update({f"item-{n}": n for n in range(2000)})
    for other in (rows.copy(), copy.copy(rows), copy.deepcopy(rows)):
        other["new"] = 5
        assert other.of(["new", "item-7"]).tolist() == [5, 7]
        assert rows.of(["new", "item-7"]).tolist() == [-1, 7]
