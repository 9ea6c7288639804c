"""Remembered anchor scores against those of labels, while items and anchors change."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpl.catalogue import Catalogue
from gpl.labels import labeller
from gpl.labels.labeller import PreparedAnchors
from streams.scoring import memo
from streams.scoring.memo import AnchorScores

DIM, ITEMS = 8, 40


def unit(rows: int, seed: int) -> np.ndarray:
    vectors = np.random.default_rng(seed).normal(size=(rows, DIM)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def prepared(seed: int) -> PreparedAnchors:
    ones = np.ones(3, np.float32)
    return PreparedAnchors.build(unit(3, seed), -ones, ones, 2, labeller.Config())


def filled(items: int = ITEMS) -> Catalogue:
    catalogue = Catalogue(DIM, 2)
    for n, vector in enumerate(unit(items, 0)):
        catalogue.put(f"i{n}", vector, [0, 0])
    return catalogue


USERS = st.sampled_from(["u1", "u2", "u3"])
ITEM_IDS = st.integers(0, ITEMS + 5).map(lambda n: f"i{n}")
STEPS = st.one_of(
    st.tuples(st.just("score"), USERS, st.lists(ITEM_IDS, max_size=60)),
    st.tuples(st.just("put"), ITEM_IDS, st.integers(0, 9)),
    st.tuples(st.just("remove"), ITEM_IDS, st.none()),
    st.tuples(st.just("anchors"), USERS, st.integers(0, 9)),
)


@given(st.lists(STEPS, max_size=25), st.sampled_from([0, 12 * 30, 12 * 90, 1 << 20]))
def test_a_remembered_score_is_the_one_that_would_be_made(steps: list, max_bytes: int) -> None:
    catalogue, scores = filled(), AnchorScores(max_bytes)
    anchors = {user: prepared(10 + n) for n, user in enumerate(("u1", "u2", "u3"))}
    for step, name, argument in steps:
        if step == "put":
            catalogue.put(name, unit(1, 100 + argument)[0], [0, 0])
        elif step == "remove":
            catalogue.remove(name)
        elif step == "anchors":
            anchors[name] = prepared(argument)
        else:
            rows = catalogue.rows(argument)
            rows = rows[rows >= 0]
            expected = labeller.score(anchors[name], catalogue.vectors[rows])[0]
            got = scores.of(name, anchors[name], catalogue, rows)
            np.testing.assert_allclose(got, expected, rtol=0, atol=2e-6)


def test_only_what_is_new_is_made_and_users_who_stayed_away_longest_are_forgotten(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[int] = []
    real = memo.anchor_scores

    def counted(anchors: PreparedAnchors, items: np.ndarray, rows: np.ndarray) -> np.ndarray:
        made.append(len(rows))
        return real(anchors, items, rows)

    monkeypatch.setattr(memo, "anchor_scores", counted)
    catalogue, scores, anchors = filled(), AnchorScores(12 * 40), prepared(1)

    def ask(user: str, first: int, last: int) -> int:
        made.clear()
        scores.of(user, anchors, catalogue, np.arange(first, last))
        return sum(made)

    assert ask("u1", 0, 20) == 20
    assert ask("u1", 0, 20) == 0
    assert ask("u1", 10, 30) == 10
    catalogue.put("i3", unit(1, 100)[0], [0, 0])
    assert ask("u1", 0, 30) == 1
    assert ask("u2", 0, 10) == 10  # 40 pairs are held
    assert ask("u1", 0, 30) == 0
    assert ask("u3", 0, 10) == 10  # in the place of u2's
    assert ask("u1", 0, 30) == 0
    assert ask("u2", 0, 10) == 10
    assert ask("u4", 0, 40) == 40
    assert ask("u4", 0, 40) == 0
    assert ask("u1", 0, 30) == 30
