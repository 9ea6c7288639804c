"""Recall of anchors and the throughput benchmark, on inputs whose answers are known."""

from __future__ import annotations

import numpy as np
import pytest

from gpl.anchors.history import HistoryClusters
from gpl.anchors.quality import Split, anchor_scores, mean_history_scores, recall
from gpl.anchors.throughput import measure
from gpl.codes import ResidualKMeans
from gpl.codes.trie import SidTrie

GROUPS, EACH, DIM = 6, 20, 8


def world() -> tuple[np.ndarray, list[np.ndarray]]:
    """Items in groups; each user takes six of one group."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(GROUPS, DIM))
    vectors = np.repeat(centres, EACH, axis=0) + 0.1 * rng.normal(size=(GROUPS * EACH, DIM))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    return vectors, [EACH * (user % GROUPS) + rng.choice(EACH, 6, replace=False) for user in range(30)]


def test_split_keeps_order_and_judges_only_what_is_new():
    split = Split.of([np.array([3, 1, 2, 1, 4]), np.array([7]), np.array([5, 5])], items=8, held_out=0.4)
    assert [p.tolist() for p in split.past] == [[3, 1, 2], [7], [5]]
    assert [f.tolist() for f in split.future] == [[4], [], []]
    assert split.judged.tolist() == [0]
    assert split.popularity.tolist() == [0, 1, 1, 1, 0, 1, 0, 1]
    assert split.tail.sum() == 4


def test_recall_counts_hits_among_what_was_not_met():
    split = Split([np.array([0])], [np.array([1, 59])], 60)
    scores = np.arange(60, 0, -1).astype(np.float32)  # the met item would be first, 59 is last
    result = recall(split, iter([scores]))
    assert (result.users, result.recall_10, result.recall_50) == (1, 0.5, 0.5)
    assert (result.tail_users, result.tail_recall_50) == (1, 0.0)
    perfect = np.zeros(60, np.float32)
    perfect[[1, 59]] = 1
    assert recall(split, iter([perfect])).recall_10 == 1.0


@pytest.mark.parametrize("tau", [None, 0.1])
def test_anchors_of_the_right_group_find_the_future_and_random_scores_do_not(tau):
    vectors, sequences = world()
    split = Split.of(sequences, len(vectors), held_out=0.34)
    sids = ResidualKMeans.fit(vectors, 2, 8, 0).encode(vectors)
    trie = SidTrie(sids, 8, vectors)
    found = recall(split, anchor_scores(split, HistoryClusters(), sids, vectors, trie, 4, 50, tau))
    rng = np.random.default_rng(1)
    chance = recall(split, (rng.random(len(vectors)).astype(np.float32) for _ in split.judged))
    mean = recall(split, mean_history_scores(split, vectors, 50))
    assert found.users == 30
    assert found.recall_10 > 0.4 > chance.recall_10
    assert found.recall_50 > 0.9
    assert mean.recall_50 > 0.9


@pytest.mark.parametrize("model", ["small-lm", "smollm2-135m"])
def test_throughput_is_within_the_limit_it_is_compared_with(model):
    made = measure(model, history=4, beams=3, users=4, batch_users=4, items=50, device="cpu", repetitions=1)
    assert made.users_per_second > 0
    assert 0 < made.share < 1
    if model == "smollm2-135m":
        assert made.parameters == 106_168_320  # all linear layers of SmolLM2-135M; the rest of the 135 M are words
        positions = 5 + 3 + 3
        assert made.flops_per_user == pytest.approx(2 * made.parameters * positions, rel=0.02)
