from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpl.preranker.ids import GrowingIds, IdTable

ids = st.lists(st.text(min_size=1, max_size=3), max_size=40)
calls = st.lists(
    st.tuples(st.lists(st.sampled_from("abcdefghijklmnop"), max_size=6), st.integers(0, 60), st.booleans()), max_size=25
)


def test_unknown_ids_are_row_zero() -> None:
    table = IdTable.from_list(["a", "b"])
    assert table.rows(["b", "x", "a"]).tolist() == [2, 0, 1]
    assert (table.row("b"), table.row("x")) == (2, 0)
    assert "x" not in table
    assert "a" in table
    assert len(table) == 2
    assert table.to_list() == ["a", "b"]
    assert table.rows([]).dtype == "int64"


def test_a_repeated_id_in_a_saved_table_is_named() -> None:
    with pytest.raises(ValueError, match="'a' comes twice"):
        IdTable.from_list(["a", "b", "a"])
    with pytest.raises(ValueError, match="'a' comes twice"):
        GrowingIds(5).restore(["a", "b", "a"], np.zeros(3, np.int64))
    with pytest.raises(ValueError, match="1 entries for 2 rows"):
        GrowingIds(5).restore(["a", "b"], np.zeros(1, np.int64))


@given(st.lists(ids, max_size=6))
def test_without_expiry_rows_are_dense_in_order_of_first_appearance_and_never_change(batches: list[list[str]]) -> None:
    table, expected = GrowingIds(10_000), {}
    for batch in batches:
        for i in batch:
            expected.setdefault(i, len(expected) + 1)
        assert table.add(batch, 7).tolist() == [expected[i] for i in batch]
        assert len(table) == len(expected) == table.size - 1
        assert len(table.expire(10**12)) == 0
    assert table.live_ids() == list(expected)


class Model:
    """The same in the plainest words: a dict of id -> (row, last seen)."""

    def __init__(self, capacity: int, ttl: int) -> None:
        self.capacity, self.ttl = capacity, ttl
        self.of: dict[str, tuple[int, int]] = {}
        self.free: set[int] = set()
        self.size = 1

    def add(self, batch: list[str], at: int) -> list[int]:
        for i in batch:
            if i in self.of:
                row, seen = self.of[i]
                self.of[i] = (row, max(seen, at))
                continue
            if self.free:
                row = min(self.free)
                self.free.remove(row)
            else:
                row = self.size
                self.size += 1
            self.of[i] = (row, at)
        return [self.of[i][0] for i in batch]

    def expire(self, now: int) -> list[int]:
        gone = [i for i, (_, seen) in self.of.items() if seen < now - self.ttl]
        left = sorted((seen, row, i) for i, (row, seen) in self.of.items() if i not in gone)
        if len(left) > self.capacity:
            gone += [i for _, _, i in left[: len(left) - self.capacity + self.capacity // 20]]
        rows = sorted(self.of.pop(i)[0] for i in gone)
        self.free |= set(rows)
        return rows


@given(calls, st.integers(1, 8), st.integers(1, 40))
def test_expiry_and_reuse_are_those_of_a_plain_model_also_across_restarts(
    made: list[tuple[list[str], int, bool]], capacity: int, ttl: int
) -> None:
    table, model, now = GrowingIds(capacity, ttl), Model(capacity, ttl), 0
    for batch, at, restart in made:
        assert table.add(batch, at).tolist() == model.add(batch, at)
        now = max(now, at)
        assert table.over == (len(model.of) > capacity)
        assert table.expire(now).tolist() == model.expire(now)
        assert len(table) <= capacity and table.size <= capacity + 17
        if restart:
            state, seen = table.state()
            table = GrowingIds(capacity, ttl)
            table.restore(json.loads(json.dumps(state)), seen)
        assert {i: table.row(i) for i in model.of} == {i: row for i, (row, _) in model.of.items()}
        assert dict(zip(table.live_ids(), table.live_rows().tolist(), strict=True)) == {
            i: row for i, (row, _) in model.of.items()
        }
        assert "zzz" not in table and table.row("zzz") == 0
    # No two ids share a row.
    assert len(set(table.live_rows().tolist())) == len(table)


def test_over_the_cap_a_twentieth_more_leaves_so_that_not_every_batch_pays() -> None:
    table = GrowingIds(100)
    for n in range(101):
        table.add([f"u{n}"], n)
    assert table.over
    assert table.expire(101).tolist() == [1, 2, 3, 4, 5, 6]
    assert table.add(["new", "u6"], 200).tolist() == [1, 7]


@pytest.mark.parametrize(("capacity", "ttl"), [(0, None), (5, 0)])
def test_limits_below_one_are_refused(capacity: int, ttl: int | None) -> None:
    with pytest.raises(ValueError, match="expected at least 1"):
        GrowingIds(capacity, ttl)
