import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpl.catalogue import Catalogue

DIM, LEVELS = 4, 2


def unit(seed, dim=DIM):
    vector = np.random.default_rng(seed).standard_normal(dim).astype(np.float32)
    return vector / np.linalg.norm(vector)


def test_rows_and_lookup_follow_the_order_asked_for_and_mark_what_is_unknown():
    catalogue = Catalogue(DIM, LEVELS)
    for name in "abc":
        catalogue.put(name, unit(ord(name)), [1, ord(name)])

    rows = catalogue.rows(["c", "nobody", "a", "c"])
    known, vectors = catalogue.lookup(["c", "nobody", "a", "c"])

    assert rows.dtype == np.int64
    assert rows[1] == -1
    assert [catalogue.id_at(row) for row in rows[[0, 2, 3]]] == ["c", "a", "c"]
    assert known == ["c", "a", "c"]
    assert vectors.dtype == np.float32
    np.testing.assert_array_equal(vectors, [unit(ord("c")), unit(ord("a")), unit(ord("c"))])
    np.testing.assert_array_equal(catalogue.sids[rows[0]], [1, ord("c")])
    assert catalogue.lookup([])[1].shape == (0, DIM)
    assert catalogue.rows([]).shape == (0,)


@given(st.lists(st.sampled_from("abcdef"), max_size=8), st.sets(st.sampled_from("abcdef")))
def test_rows_are_those_of_a_plain_dict_and_a_question_adds_nothing(asked, known):
    catalogue = Catalogue(DIM, LEVELS)
    for name in sorted(known):
        catalogue.put(name, unit(ord(name)), [1, 1])
    row_of = {name: row for row, name in enumerate(sorted(known))}

    assert catalogue.rows(asked).tolist() == [row_of.get(name, -1) for name in asked]
    assert catalogue.ids() == sorted(known)
    assert not any(name in catalogue for name in set(asked) - known)


def test_grows_past_its_first_capacity_and_keeps_every_row():
    catalogue = Catalogue(DIM, LEVELS)
    for i in range(3000):
        catalogue.put(str(i), unit(i), [i, 0])

    assert len(catalogue) == 3000
    assert catalogue.vectors.shape == (3000, DIM)
    np.testing.assert_array_equal(catalogue.sids[:, 0], range(3000))
    for i in (0, 1023, 1024, 2999):
        np.testing.assert_array_equal(catalogue.vectors[catalogue.rows([str(i)])[0]], unit(i))


def test_an_update_keeps_the_row_and_a_removed_row_leaves_nothing_behind():
    catalogue = Catalogue(DIM, LEVELS)
    catalogue.put("a", unit(1), [1, 1])
    catalogue.put("b", unit(2), [2, 2])
    row = catalogue.rows(["a"])[0]

    catalogue.put("a", unit(3), [3, 3])
    assert catalogue.rows(["a"])[0] == row
    np.testing.assert_array_equal(catalogue.vectors[row], unit(3))

    assert catalogue.remove("a") is True
    assert catalogue.remove("a") is False
    assert "a" not in catalogue
    assert catalogue.rows(["a"])[0] == -1
    assert not catalogue.vectors[row].any()
    np.testing.assert_array_equal(catalogue.sids[row], [-1, -1])
    with pytest.raises(LookupError, match=f"row: {row} holds no item"):
        catalogue.id_at(row)

    catalogue.put("new", unit(4), [4, 4])
    assert catalogue.rows(["new"])[0] == row, "a freed row is used again, so that churn does not grow the matrix"
    assert catalogue.rows(["a"])[0] == -1


def test_generation_moves_with_changes_only():
    catalogue = Catalogue(DIM, LEVELS)
    seen = [catalogue.generation]
    catalogue.put("a", unit(1), [1, 1])
    seen.append(catalogue.generation)
    catalogue.put("a", unit(1), [1, 2])
    seen.append(catalogue.generation)
    catalogue.put("a", unit(2), [1, 2])
    seen.append(catalogue.generation)
    assert len(set(seen)) == 4

    catalogue.put("a", unit(2), [1, 2])
    catalogue.remove("nobody")
    assert catalogue.generation == seen[-1]
    assert catalogue.changed.tolist() == [seen[-1]]
    catalogue.remove("a")
    assert catalogue.generation not in seen
    assert catalogue.changed.tolist() == [catalogue.generation]


@pytest.mark.parametrize(
    ("vector", "sid", "message"),
    [
        (np.ones(DIM), [0, 0], "'x': vector has length 2"),
        (np.zeros(DIM), [0, 0], "'x': vector has length 0"),
        (np.full(DIM, np.nan), [0, 0], "'x': vector has length nan"),
        ([np.inf, 0, 0, 0], [0, 0], "'x': vector has length inf"),
        (unit(0, 3), [0, 0], r"'x': vector has shape \(3,\)"),
        (unit(0), [0, 0, 0], r"'x': sid has shape \(3,\)"),
        (unit(0), [0, -1], r"'x': sid \[0, -1\]"),
        (unit(0), [0, 2**40], r"'x': sid \[0, 1099511627776\]"),
        (unit(0), np.array([0, 2**40]), r"'x': sid .*1099511627776.* no whole number of 32 bits"),
        (unit(0), [0, 1.7], r"'x': sid \[0, 1\.7\] has a code that is no whole number"),
    ],
)
def test_refuses_what_is_not_a_unit_vector_and_a_sid_and_stays_as_it_was(vector, sid, message):
    catalogue = Catalogue(DIM, LEVELS)
    catalogue.put("kept", unit(0), [0, 0])
    before = catalogue.generation
    with pytest.raises(ValueError, match=message):
        catalogue.put("x", vector, sid)
    assert catalogue.ids() == ["kept"]
    assert catalogue.generation == before


def test_views_cannot_be_written_and_lookup_is_a_copy():
    catalogue = Catalogue(DIM, LEVELS)
    catalogue.put("a", unit(1), [1, 1])
    with pytest.raises(ValueError, match="read-only"):
        catalogue.vectors[0, 0] = 1.0
    with pytest.raises(ValueError, match="read-only"):
        catalogue.sids[0, 0] = 1
    catalogue.lookup(["a"])[1][:] = 0.0
    np.testing.assert_array_equal(catalogue.vectors[0], unit(1))


@given(st.lists(st.tuples(st.sampled_from(["put", "remove"]), st.sampled_from("abcdef"), st.integers(0, 5))))
def test_behaves_as_a_dictionary(operations):
    catalogue, model = Catalogue(DIM, LEVELS), {}
    for operation, name, seed in operations:
        if operation == "put":
            catalogue.put(name, unit(seed), [seed, 0])
            model[name] = seed
        else:
            assert catalogue.remove(name) == (model.pop(name, None) is not None)
    assert set(catalogue.ids()) == set(model)
    assert len(catalogue) == len(model)
    known, vectors = catalogue.lookup(list("abcdef"))
    assert known == [name for name in "abcdef" if name in model]
    for name, vector in zip(known, vectors, strict=True):
        row = catalogue.rows([name])[0]
        assert catalogue.id_at(row) == name
        np.testing.assert_array_equal(vector, unit(model[name]))
        np.testing.assert_array_equal(catalogue.sids[row], [model[name], 0])
    empty = np.setdiff1d(np.arange(len(catalogue.vectors)), catalogue.rows(known))
    assert not catalogue.vectors[empty].any()
