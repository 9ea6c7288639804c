"""Worlds: nothing that is judged was exposed, history is causal, users are split once, the policy is biased."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from gpl.catalogue import ItemContent
from gpl.evaluation.dataset import DataError, Dataset, Events, Ragged, Requests, Truth
from gpl.evaluation.embed import embed, embedded_world
from gpl.evaluation.upstream import Recall, UpstreamConfig
from gpl.evaluation.world import World
from gpl.space import Space
from tests.gpl.evaluation import planted

CONFIG = UpstreamConfig(pages=4, recalled=20)


class NoEncoder:
    """Planted items bring their vectors."""

    name, dim = "none", planted.DIM

    def encode(self, texts: object) -> object:
        raise AssertionError("nothing here is text")


def world(dataset: Dataset, seed: int = 0) -> World:
    return embedded_world(dataset, NoEncoder(), seed, CONFIG)  # type: ignore[arg-type]


def logged(users: int = 60) -> Dataset:
    """A real log made of a simulated one, with its truth as positives only."""
    made = world(planted.full(users), seed=3)
    user = made.relevant.rows
    truth = Truth(user, made.relevant.values, np.ones(len(user), dtype=np.float32), every_cell=False)
    full = planted.full(users)
    return Dataset("logged", full.items, full.users, truth, log=made.log)


@pytest.fixture(params=["full", "events", "log"])
def dataset(request: pytest.FixtureRequest) -> Dataset:
    kinds = {"full": planted.full, "events": planted.events, "log": logged}
    return kinds[request.param]()


def test_what_is_judged_was_neither_exposed_nor_taken(dataset: Dataset) -> None:
    made = world(dataset)
    shown = Ragged.group(made.log.user[made.log.exposed.rows], made.log.exposed.values, made.n_users)
    for user in made.judged.tolist():
        relevant = set(made.relevant[user].tolist())
        assert not relevant & set(shown[user].tolist()) and not relevant & set(made.positives[user].tolist())
        assert made.candidates(user)[made.relevant[user]].all()


def test_history_of_a_request_holds_what_was_liked_before_it_and_nothing_of_its_own(dataset: Dataset) -> None:
    made = world(dataset)
    for row in range(len(made.log)):
        user = int(made.log.user[row])
        clicks = made.log.exposed[row][
            made.log.clicked[made.log.exposed.offsets[row] : made.log.exposed.offsets[row + 1]]
        ]
        before = made.positives[user][: made.known[row]].tolist()
        after = made.positives[user][made.known[row] :].tolist()
        assert set(clicks.tolist()) <= set(after) and not set(clicks.tolist()) & set(before)


def test_exposed_and_recalled_items_of_a_request_are_distinct(dataset: Dataset) -> None:
    made = world(dataset)
    for row in range(len(made.log)):
        items = [*made.log.exposed[row].tolist(), *made.log.recalled[row].tolist()]
        assert len(items) == len(set(items))


def test_recall_leaves_out_what_was_taken_before_and_not_what_will_be() -> None:
    """Otherwise to have been offered and not shown would tell that an item is not relevant."""
    made = world(planted.events())
    held = Ragged.group(made.held_out.user, np.arange(len(made.held_out)), made.n_users)
    offered_later, offered_truth, truth = 0, 0, 0
    for user in range(made.n_users):
        taken, relevant = made.positives[user], made.relevant[user]
        offered: list[int] = []
        for row in np.flatnonzero(made.log.user == user).tolist():
            shown, recalled, known = made.log.exposed[row], made.log.recalled[row], int(made.known[row])
            clicks = made.log.clicked[made.log.exposed.offsets[row] : made.log.exposed.offsets[row + 1]]
            assert not set(taken[:known]) & {*shown.tolist(), *recalled.tolist()}
            assert not {*taken, *relevant} & set(shown[~clicks].tolist())
            assert len(shown) == CONFIG.exposed and len(recalled) == CONFIG.recalled
            offered += recalled.tolist()
            offered_later += len(np.intersect1d(recalled, taken[known:]))
        for row in held[user].tolist():
            assert not set(taken) & {*made.held_out.exposed[row].tolist(), *made.held_out.recalled[row].tolist()}
        offered_truth += len(np.intersect1d(offered, relevant))
        truth += len(relevant)
    by_chance = np.mean([np.isin(np.arange(made.n_items), made.log.recalled[r]).mean() for r in range(len(made.log))])
    assert offered_later > 0 and offered_truth > by_chance * truth  # content is alike, so recall finds it more often


def test_held_out_requests_are_not_in_the_log(dataset: Dataset) -> None:
    made = world(dataset)
    pairs = set(zip(made.log.user[made.log.exposed.rows].tolist(), made.log.exposed.values.tolist(), strict=True))
    held = made.held_out
    clicked = zip(held.user[held.exposed.rows][held.clicked], held.exposed.values[held.clicked], strict=True)
    assert len(held) and not {(int(u), int(i)) for u, i in clicked} & pairs


def test_seeds_draw_other_exposures_of_the_same_users_split_the_same_way(dataset: Dataset) -> None:
    first, again, other = world(dataset, 0), world(dataset, 0), world(dataset, 1)
    assert np.array_equal(first.log.exposed.values, again.log.exposed.values)
    assert np.array_equal(first.log.recalled.values, again.log.recalled.values)
    # A real log with its recalls leaves nothing to draw.
    drawn = dataset.log is None
    assert np.array_equal(first.log.recalled.values, other.log.recalled.values) != drawn
    assert np.array_equal(first.validation, other.validation)
    assert 0.1 < first.validation.mean() < 0.45


def test_the_policy_exposes_in_proportion_to_popularity() -> None:
    popularity = np.array([0, 1, 3, 7, 15], dtype=np.float32)
    recall = Recall(np.eye(5, dtype=np.float32), popularity, UpstreamConfig())
    rng = np.random.default_rng(0)
    drawn = np.concatenate([recall.draw(1, np.ones(5, dtype=bool), rng) for _ in range(20_000)])
    share = np.bincount(drawn, minlength=5) / len(drawn)
    assert share == pytest.approx((popularity + 1) / (popularity + 1).sum(), abs=0.01)
    allowed = np.array([True, False, True, False, False])
    assert set(recall.draw(4, allowed, rng).tolist()) == {0, 2}


def test_irrelevant_pairs_in_the_truth_make_the_listed_pairs_the_candidates() -> None:
    full = logged()
    assert full.truth is not None and full.log is not None
    listed = Truth(full.truth.user, full.truth.item, full.truth.relevance.copy(), every_cell=False)
    listed.relevance[::2] = 0.0
    made = world(Dataset("listed", full.items, full.users, listed, log=full.log))
    assert made.listed is not None
    user = int(made.judged[0])
    assert set(np.flatnonzero(made.candidates(user))) == set(made.listed[user].tolist())


def test_what_a_log_exposed_is_no_candidate_and_users_without_a_rival_item_are_not_judged() -> None:
    full = logged()
    assert full.truth is not None and full.log is not None
    log, truth = full.log, full.truth
    # What was shown is listed too; irrelevant pairs are those of users with even numbers.
    users, items = log.user[log.exposed.rows], log.exposed.values
    rivals = np.array([(u, i) for u in range(0, len(full.users), 2) for i in (3, 4, 5)])
    listed = np.concatenate([np.stack([truth.user, truth.item], axis=1), np.stack([users, items], axis=1), rivals])
    listed, first = np.unique(listed, axis=0, return_index=True)
    relevance = (first < len(truth.user) + len(users)).astype(np.float32)
    made = world(Dataset("logged", full.items, full.users, Truth(*listed.T, relevance, every_cell=False), log=log))
    assert len(made.judged) and not (made.judged % 2).any()
    for user in made.judged.tolist():
        shown = made.candidates(user)[items[users == user]]
        assert not shown.any() and made.candidates(user).sum() > len(made.relevant[user]) > 0


def test_a_truth_of_relevant_pairs_alone_says_that_the_others_are_not() -> None:
    every = planted.full()
    assert every.truth is not None
    said = Truth(every.truth.user, every.truth.item, every.truth.relevance, every_cell=False)
    first, second = (world(replace(every, truth=truth)) for truth in (every.truth, said))
    assert second.listed is None and 0 < second.log.clicked.mean() < 0.5
    assert np.array_equal(first.log.exposed.values, second.log.exposed.values)


def test_popularity_counts_the_purchases_of_users_with_one_session() -> None:
    made = planted.events(40)
    assert made.events is not None
    extra, user = 30, np.arange(40, 240)
    once = Events(
        np.concatenate([made.events.user, user]),
        np.concatenate([made.events.item, np.full(200, extra)]),
        np.concatenate([made.events.session, 10_000 + user]),
    )
    many = world(Dataset("once", made.items, [f"u{u}" for u in range(240)], events=once))
    shown = np.bincount(many.log.exposed.values[many.log.user[many.log.exposed.rows] < 40], minlength=len(made.items))
    assert shown.argmax() == extra


def test_vectors_of_any_length_are_centred_as_the_product_does() -> None:
    base, rng = planted.full(4), np.random.default_rng(0)
    raw = rng.normal(size=(30, 6)) * 10 ** rng.uniform(-1, 1, size=(30, 1)) + 1.0
    items = [ItemContent(str(n), "", row.tolist()) for n, row in enumerate(raw)]
    small = Truth(np.array([0]), np.array([3]), np.ones(1, dtype=np.float32), every_cell=True)
    found, centred, _ = embed(Dataset("lengths", items, base.users, small), NoEncoder())  # type: ignore[arg-type]
    wanted = Space.fit("precomputed", raw.astype(np.float32)).project(raw.astype(np.float32))
    assert np.allclose(centred, wanted, atol=1e-6) and np.allclose(np.linalg.norm(found, axis=1), 1.0, atol=1e-5)


def test_truth_of_what_the_log_exposed_is_not_judged() -> None:
    full = logged()
    assert full.truth is not None and full.log is not None
    log = full.log
    clicked = np.stack([log.user[log.exposed.rows][log.clicked], log.exposed.values[log.clicked]])
    user, item = np.unique(np.concatenate([clicked, [full.truth.user, full.truth.item]], axis=1), axis=1)
    every = Truth(user, item, np.ones(len(user), dtype=np.float32), every_cell=False)
    made, before = world(Dataset("logged", full.items, full.users, every, log=log)), world(full)
    for one in range(made.n_users):
        assert np.array_equal(np.sort(made.relevant[one]), np.sort(before.relevant[one]))
        assert made.candidates(one)[made.relevant[one]].all()


def test_items_without_content_are_zero_rows_and_the_others_are_centred() -> None:
    class Letters:
        name, dim = "letters", 3

        def encode(self, texts: list[str]) -> np.ndarray:
            return np.array([[t.count(c) + 1.0 for c in "abc"] for t in texts], dtype=np.float32)

    base = planted.full(4)
    texts = ["a", "bb", "  ", "abc"]
    dataset = Dataset("text", [ItemContent(str(n), t) for n, t in enumerate(texts)], base.users, base.truth)
    raw, vectors, _ = embed(dataset, Letters())  # type: ignore[arg-type]
    assert not raw[2].any() and not vectors[2].any()
    assert np.linalg.norm(vectors[[0, 1, 3]], axis=1) == pytest.approx(1.0, abs=1e-5)
    assert (raw[[0, 1, 3]] > 0).all() and (vectors < 0).any()


def test_fewer_dimensions_change_the_vectors_and_not_the_log() -> None:
    dataset = planted.full(40)
    whole, reduced = (embedded_world(dataset, NoEncoder(), 0, CONFIG, dim) for dim in (None, 5))  # type: ignore[arg-type]
    assert reduced.vectors.shape == (whole.n_items, 5) and whole.vectors.shape == whole.raw.shape
    assert np.linalg.norm(reduced.vectors, axis=1) == pytest.approx(1.0, abs=1e-5)
    np.testing.assert_array_equal(whole.log.exposed.values, reduced.log.exposed.values)
    np.testing.assert_array_equal(whole.raw, reduced.raw)


def test_a_world_in_which_nobody_can_be_judged_is_an_error() -> None:
    full = planted.full(3)
    truth = Truth(np.array([0]), np.array([5]), np.ones(1, dtype=np.float32), every_cell=False)
    empty = Requests(np.array([1]), Ragged.of([[0, 1]]), np.array([True, False]), Ragged.of([[2]]))
    with pytest.raises(DataError, match="too few to judge on"):
        world(Dataset("nobody", full.items, full.users, truth, log=empty))


def test_sets_that_cannot_be_simulated_are_errors() -> None:
    full, events = planted.full(3), planted.events(3)
    few = Truth(np.zeros(20, np.int64), np.arange(20), np.arange(20).astype(np.float32) % 2, every_cell=False)
    with pytest.raises(DataError, match="few: of no user 25 pairs are known"):
        world(Dataset("few", full.items, full.users, few))
    with pytest.raises(DataError, match="both: events and a truth, but no log"):
        Dataset("both", full.items, full.users, full.truth, events=events.events)
