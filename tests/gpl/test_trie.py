import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gpl.codes.trie import SidTrie

SIZE = 5
sid_lists = st.integers(1, 4).flatmap(
    lambda levels: st.tuples(st.just(levels), st.lists(st.tuples(*[st.integers(0, SIZE - 1)] * levels), max_size=25))
)


def trie_of(levels, sids):
    return SidTrie(np.array(sids, np.int32).reshape(len(sids), levels), SIZE)


@given(sid_lists)
def test_walking_all_children_lists_exactly_the_sids(case):
    levels, sids = case
    trie = trie_of(levels, sids)
    nodes, prefixes = torch.tensor([SidTrie.root]), [()]
    for _ in range(levels):
        children = trie.step(nodes)
        assert children.shape == (len(prefixes), SIZE)
        assert children.dtype == torch.int64
        at, code = (children >= 0).nonzero(as_tuple=True)
        prefixes = [(*prefixes[i], c) for i, c in zip(at.tolist(), code.tolist(), strict=True)]
        nodes = children[at, code]
        assert len(set(nodes.tolist())) == len(nodes), "a node is one prefix"
    assert prefixes == sorted(set(sids))
    assert len(trie) == len(set(sids))
    assert not (trie.step(nodes) >= 0).any(), "a whole SID has no children"


@given(sid_lists, st.lists(st.integers(-1, SIZE), min_size=0, max_size=5))
def test_contains_whole_sids_only(case, probe):
    levels, sids = case
    trie = trie_of(levels, sids)
    assert all(trie.contains(sid) for sid in sids)
    assert trie.contains(probe) == (tuple(probe) in set(sids))
    if levels > 1 and sids:
        assert not trie.contains(sids[0][:-1])


def test_a_batch_of_beams_steps_as_each_alone_and_dead_beams_stay_dead():
    trie = trie_of(3, [(0, 1, 2), (0, 1, 3), (0, 4, 0), (2, 2, 2)])
    first = trie.step(torch.tensor(trie.root))
    assert first.shape == (SIZE,)
    beams = torch.stack([first, first.flip(0)])  # (2, SIZE), most of them -1
    children = trie.step(beams)

    assert children.shape == (2, SIZE, SIZE)
    assert children[1].equal(children[0].flip(0))
    assert (children[0, 1] == -1).all()
    assert (children[0, 0] >= 0).nonzero().flatten().tolist() == [1, 4]
    assert (children[0, 2] >= 0).nonzero().flatten().tolist() == [2]


def test_empty_trie_and_empty_batch():
    trie = trie_of(2, [])
    assert len(trie) == 0
    assert (trie.step(torch.tensor([0])) == -1).all()
    assert not trie.contains((0, 0))
    assert trie.step(torch.zeros((0, 3), dtype=torch.int64)).shape == (0, 3, SIZE)


def test_moved_trie_gives_the_same():
    trie = trie_of(2, [(0, 1), (3, 1)])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    moved = trie.to(device)
    children = moved.step(torch.tensor([0], device=device))
    assert children.device.type == device
    assert children.cpu().equal(trie.step(torch.tensor([0])))
    assert moved.contains((3, 1)) and not moved.contains((3, 0))


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (np.array([[0, 1], [0, SIZE]]), r"codes\[1\]\[1\]: 5, expected 0 to 4"),
        (np.array([[-1, 1]]), r"codes\[0\]\[0\]: -1"),
        (np.array([1, 2]), r"codes: shape \(2,\)"),
    ],
)
def test_names_what_it_refuses(codes, message):
    with pytest.raises(ValueError, match=message):
        SidTrie(codes, SIZE)


@given(sid_lists, st.lists(st.integers(0, 24), max_size=25))
def test_what_is_closed_is_what_only_leads_to_the_sids_left_out(case, picks):
    levels, sids = case
    trie = trie_of(levels, sids)
    out = {sids[pick] for pick in picks if pick < len(sids)}
    closed = trie.closed_by(np.array(sorted(out), np.int32).reshape(len(out), levels))
    assert closed.shape == (trie.nodes,)
    # Walking what stays open lists exactly the other SIDs, and never runs into a dead end.
    nodes, prefixes = torch.tensor([SidTrie.root]), [()]
    for _ in range(levels):
        children = trie.step(nodes)
        children = children.masked_fill(closed[children.clamp_min(0)], -1)
        if prefixes != [()]:
            assert (children >= 0).any(dim=1).all()
        at, code = (children >= 0).nonzero(as_tuple=True)
        prefixes = [(*prefixes[i], c) for i, c in zip(at.tolist(), code.tolist(), strict=True)]
        nodes = children[at, code]
    assert prefixes == sorted(set(sids) - out)
    assert bool(closed[SidTrie.root]) == (bool(sids) and set(sids) == out)


@given(sid_lists)
def test_leaves_are_found_and_placed_at_the_mean_of_their_items(case):
    levels, sids = case
    codes = np.array(sids, np.int32).reshape(len(sids), levels)
    vectors = np.random.default_rng(0).normal(size=(len(sids), 3)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    trie = SidTrie(codes, SIZE, vectors)
    every, places = trie.places()
    assert list(map(tuple, every.tolist())) == sorted(set(sids))
    assert (trie.leaves(every) >= 0).all()
    np.testing.assert_array_equal(trie.rows(every[::-1]), np.arange(len(every))[::-1])
    for sid, place in zip(every.tolist(), places, strict=True):
        mean = vectors[[other == tuple(sid) for other in sids]].sum(axis=0)
        np.testing.assert_allclose(place, mean / np.linalg.norm(mean), atol=1e-4)
    few = np.random.default_rng(1).permutation(len(every))[: len(every) // 2]
    again = SidTrie(codes, SIZE, vectors)
    moved = again.to("cpu")
    for wanted in (few, few[::-1], np.arange(len(every))):  # asked for in parts, and more than once
        np.testing.assert_array_equal(again.directions(every[wanted]), places[wanted])
        np.testing.assert_array_equal(moved.directions(every[wanted]), places[wanted])
    strange = np.full((2, levels), SIZE + 3)
    strange[1] = -1
    assert trie.leaves(strange).tolist() == [-1, -1]
    with pytest.raises(KeyError, match="no item of the catalogue carries it"):
        again.directions(strange)


def test_a_trie_without_vectors_cannot_place():
    with pytest.raises(ValueError, match="vectors"):
        trie_of(2, [(0, 1)]).places()
    with pytest.raises(ValueError, match=r"vectors: shape \(2, 3\), expected \(1, dim\)"):
        SidTrie(np.array([[0, 1]]), SIZE, np.zeros((2, 3), np.float32))
