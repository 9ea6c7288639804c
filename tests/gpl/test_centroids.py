import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpl.catalogue import Catalogue
from gpl.codes import SidCentroids


def unit_rows(n, dim, seed):
    rows = np.random.default_rng(seed).standard_normal((n, dim)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=20), st.randoms())
def test_is_the_normalised_mean_of_the_carriers_in_any_order(sids, random):
    vectors = unit_rows(len(sids), 6, len(sids))
    centroids = SidCentroids(np.array(sids), vectors)
    assert len(centroids) == len(set(sids))
    for sid in set(sids):
        mean = vectors[[other == sid for other in sids]].astype(np.float64).mean(axis=0)
        actual = centroids.vectors_of(np.array([sid]))[0]
        np.testing.assert_allclose(actual, mean / np.linalg.norm(mean), atol=1e-6)

    order = list(range(len(sids)))
    random.shuffle(order)
    shuffled = SidCentroids(np.array(sids)[order], vectors[order])
    np.testing.assert_array_equal(shuffled.vectors_of(np.array(sids)), centroids.vectors_of(np.array(sids)))


def test_follows_a_catalogue_and_leaves_removed_items_out():
    vectors = unit_rows(3, 4, 0)
    catalogue = Catalogue(4, 2)
    for name, vector, sid in zip("abc", vectors, [(1, 2), (1, 2), (0, 0)], strict=True):
        catalogue.put(name, vector, sid)
    catalogue.remove("a")
    catalogue.remove("c")
    centroids = SidCentroids.of(catalogue)

    assert len(centroids) == 1
    assert (1, 2) in centroids and (0, 0) not in centroids and (-1, -1) not in centroids
    result = centroids.vectors_of(np.array([[1, 2], [1, 2]], np.int32))
    assert result.dtype == np.float32
    np.testing.assert_allclose(result, [vectors[1]] * 2, atol=1e-7)

    catalogue.put("d", vectors[0], (1, 2))
    after = SidCentroids.of(catalogue).vectors_of(np.array([[1, 2]]))[0]
    assert after @ vectors[0] == pytest.approx(after @ vectors[1], abs=1e-6)


def test_an_unknown_sid_is_named():
    centroids = SidCentroids(np.array([[1, 2]]), unit_rows(1, 4, 0))
    with pytest.raises(KeyError, match=r"sid \[1, 3\]"):
        centroids.vectors_of(np.array([[1, 2], [1, 3]]))


def test_opposite_vectors_leave_one_of_them_whatever_their_order():
    vectors = np.array([[1, 0], [-1, 0], [0, 1]], np.float32)
    sids = np.array([[7], [7], [3]])
    centroids = SidCentroids(sids, vectors)
    np.testing.assert_array_equal(centroids.vectors_of(np.array([[7], [3]])), [[-1, 0], [0, 1]])
    reversed_ = SidCentroids(sids[::-1], vectors[::-1])
    np.testing.assert_array_equal(reversed_.vectors_of(np.array([[7]])), [[-1, 0]])


def test_empty_catalogue_has_no_centroids():
    centroids = SidCentroids.of(Catalogue(4, 2))
    assert len(centroids) == 0
    assert centroids.vectors_of(np.zeros((0, 2), np.int32)).shape == (0, 4)


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"sids \(2, 1\), vectors \(3, 4\)"):
        SidCentroids(np.zeros((2, 1), int), unit_rows(3, 4, 0))
