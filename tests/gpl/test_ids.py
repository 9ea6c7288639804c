from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpl.preranker.ids import IdTable

ids = st.lists(st.text(min_size=1, max_size=3), max_size=40)


@given(st.lists(ids, max_size=6))
def test_rows_are_dense_in_order_of_first_appearance_and_never_change(batches):
    table, expected = IdTable(), {}
    for batch in batches:
        for i in batch:
            expected.setdefault(i, len(expected) + 1)
        assert table.add(batch).tolist() == [expected[i] for i in batch]
        assert len(table) == len(expected)
    assert table.to_list() == list(expected)
    assert table.rows(list(expected)).tolist() == list(range(1, len(expected) + 1))


@given(ids)
def test_round_trip_goes_on_where_it_was(first):
    table = IdTable()
    table.add(first)
    copy = IdTable.from_list(json.loads(json.dumps(table.to_list())))
    assert copy.add([*first, "a new one"]).tolist() == table.add([*first, "a new one"]).tolist()
    assert copy.to_list() == table.to_list()


def test_unknown_ids_are_row_zero_and_looking_does_not_add():
    table = IdTable.from_list(["a", "b"])
    assert table.rows(["b", "x", "a"]).tolist() == [2, 0, 1]
    assert (table.row("b"), table.row("x")) == (2, 0)
    assert "x" not in table
    assert "a" in table
    assert len(table) == 2
    assert table.rows([]).dtype == table.add([]).dtype == "int64"


def test_a_repeated_id_in_a_saved_table_is_named():
    with pytest.raises(ValueError, match="'a' comes twice"):
        IdTable.from_list(["a", "b", "a"])
