from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.torch import load, save

from gpl.labels.matching import Floats
from gpl.preranker.batch import Batch, Example
from gpl.preranker.learner import Learner
from gpl.preranker.loss import LossConfig
from gpl.preranker.model import PreRanker, gather_content

DIM_CONTENT, DIM = 12, 5
USERS, ITEMS = 9, 30


def example(rng, users=USERS, items=ITEMS, exposed=3, hidden=6, anchors=True):
    n = exposed + hidden
    item_row = rng.permutation(items)[:n] + 1
    score = rng.uniform(-0.2, 0.9, n).astype(np.float32) if anchors else np.full(n, np.nan, np.float32)
    history = rng.integers(1, items + 1, rng.integers(0, 5))  # none, and one item twice, among them
    return Example(
        history=history,
        user_row=int(rng.integers(1, users + 1)),
        item_row=item_row,
        content_row=item_row - 1,
        score=score,
        clicked=rng.integers(0, 2, exposed).astype(np.float32),
        label=rng.random(hidden).astype(np.float32),
        confidence=rng.random(hidden).astype(np.float32),
    )


def batches(count, seed=0, **kw):
    rng = np.random.default_rng(seed)
    return [Batch.collate([example(rng, **kw) for _ in range(4)]) for _ in range(count)]


def content_of(items=ITEMS, seed=7):
    x = np.random.default_rng(seed).standard_normal((items, DIM_CONTENT)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def learner(users=USERS, items=ITEMS, config=None, seed=1):
    model = PreRanker(DIM_CONTENT, DIM, seed)
    model.grow(users + 1, items + 1)
    return Learner(model, config or LossConfig(), learning_rate=0.01, weight_decay=1e-3)


def assert_same_state(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


# --- the formula


def test_logits_are_the_documented_formula_in_training_and_in_serving():
    trained = learner()
    content = content_of()
    data = batches(6)
    for batch in data:
        trained.step(batch, content)
    model = trained.model
    w = {name: t.double().numpy() for name, t in model.state_tensors().items()}
    batch = data[0]
    seen = np.concatenate([b.score for b in data]).astype(np.float64)
    np.testing.assert_allclose(w["score_moments"][:2], [len(seen), seen.mean()], rtol=1e-9)

    full = model(batch, content).full.detach().numpy()
    towers = model(batch, content).towers.detach().numpy()
    for p in range(len(full)):
        user, item = batch.user_row[batch.request[p]], batch.item_row[batch.item[p]]
        vector = w["content"] @ content[batch.content_row[batch.item[p]]] + w["items"][item]
        liked = batch.history[batch.history_request == batch.request[p]]
        past = w["history"][liked].sum(axis=0) / max(len(liked), 1) ** 0.5
        tower = (w["default"] + w["users"][user] + past) @ vector + w["item_bias"][item, 0] + w["bias"]
        z = (batch.score[p] - seen.mean()) / seen.std()
        assert towers[p] == pytest.approx(tower, abs=1e-5)
        assert full[p] == pytest.approx(tower + w["w_score"] * z, abs=1e-5)

    for r, user in enumerate(batch.user_row):
        mine = batch.request == r
        rows = batch.item[mine]
        served = model.score(
            int(user),
            batch.item_row[rows],
            content[batch.content_row[rows]],
            batch.score[mine],
            batch.history[batch.history_request == r],
        )
        np.testing.assert_allclose(served, full[mine], atol=1e-5)


def test_an_unseen_user_scores_as_the_default_and_an_unseen_item_from_content():
    trained = learner()
    content = content_of()
    for batch in batches(5):
        trained.step(batch, content)
    model = trained.model
    model.grow(USERS + 2, ITEMS + 2)
    items, vectors = np.arange(1, 6), content[:5]
    np.testing.assert_array_equal(model.score(USERS + 1, items, vectors, None), model.score(0, items, vectors, None))
    new = np.full(5, ITEMS + 1)
    by_content = model.score(1, new, vectors, None)
    np.testing.assert_array_equal(by_content, model.score(1, np.zeros(5, int), vectors, None))
    assert len(set(by_content.tolist())) == 5


def test_what_others_with_the_same_history_clicked_is_told_to_an_unseen_user():
    """Clicks go to item 2 after item 1 and to item 4 after item 3; contents and users say nothing of it."""
    trained = learner(config=LossConfig(negatives="pointwise"))
    rng, content = np.random.default_rng(0), content_of()
    for _ in range(150):
        examples = []
        for user in rng.integers(1, USERS + 1, size=8):
            liked = rng.choice([1, 3])
            shown = np.array([2, 4])
            clicked = (shown == liked + 1).astype(np.float32)
            nothing = np.zeros(0, np.float32)
            score = np.full(2, np.nan, np.float32)
            examples.append(Example(int(user), shown, shown - 1, score, clicked, nothing, nothing, np.array([liked])))
        trained.step(Batch.collate(examples), content)
    for liked, better, worse in ((1, 2, 4), (3, 4, 2)):
        rows = np.array([better, worse])
        first, second = trained.model.score(0, rows, content[rows - 1], None, np.array([liked]))
        assert first > second + 1


def test_a_history_is_part_of_its_requests_alone():
    batch = batches(1)[0]
    sizes = np.bincount(batch.history_request, minlength=len(batch.user_row))
    assert len(set(sizes.tolist())) > 1
    for request in range(len(batch.user_row)):
        own = batch.pairs(batch.request == request)
        assert own.history.tolist() == batch.history[batch.history_request == request].tolist()
        assert own.history_request.tolist() == [0] * sizes[request]
    with pytest.raises(IndexError, match="history: 99"):
        learner().model(replace(batch, history=np.full_like(batch.history, 99)), content_of())


@given(st.lists(st.integers(0, ITEMS), max_size=60), st.integers(0, USERS))
def test_a_served_user_is_the_trained_one_to_the_last_bit(history: list[int], user: int):
    model = PreRanker(DIM_CONTENT, DIM, seed=0)
    model.grow(USERS + 1, ITEMS + 1)
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for table in (model.default, model.users, model.history):
            table.copy_(torch.randn(table.shape, generator=rng))
        model.history[0] = 0.0  # unknown
    one = torch.zeros(1, dtype=torch.int64)
    bag = torch.nn.functional.embedding_bag(torch.tensor(history, dtype=torch.int64), model.history, one, mode="sum")
    liked = bag[0].detach() / np.float32(max(len(history), 1) ** 0.5)
    expected = torch.cat([model.default + model.users[user] + liked, torch.ones(1)]).detach().numpy()
    np.testing.assert_array_equal(model.user_side(user, np.array(history, np.int64)), expected)
    with pytest.raises(IndexError, match=f"history: {ITEMS + 1}, expected 0 to {ITEMS}"):
        model.user_side(user, np.array([*history, ITEMS + 1]))


@given(hnp.arrays(np.float32, st.integers(0, 40), elements=st.floats(-1, 1, width=32) | st.just(np.nan)), st.data())
def test_a_served_logit_is_the_trained_one_to_the_last_bit(scores: Floats, data: st.DataObject):
    model = PreRanker(DIM_CONTENT, DIM, seed=0)
    weights = st.floats(-8, 8, width=32)
    with torch.no_grad():
        for weight in (model.bias, model.w_score, model.w_missing):
            weight.fill_(data.draw(weights))
    model.observe(data.draw(hnp.arrays(np.float32, st.integers(0, 5), elements=st.floats(-1, 1, width=32))))
    towers = data.draw(hnp.arrays(np.float32, len(scores), elements=st.floats(-99, 99, width=32)))
    for some in (scores, np.full_like(scores, np.nan)):
        trained = model._combine(torch.from_numpy(towers) + model.bias, torch.from_numpy(some)).full.detach().numpy()
        np.testing.assert_array_equal(model.combine(towers, some), trained)
    np.testing.assert_array_equal(model.combine(towers, None), trained)


def test_an_untrained_model_ranks_by_the_anchor_score():
    model = PreRanker(DIM_CONTENT, DIM, seed=0)
    scores = np.random.default_rng(0).uniform(-1, 1, 20).astype(np.float32)
    logits = model.score(0, np.zeros(20, int), content_of(20), scores)
    assert np.argsort(logits).tolist() == np.argsort(scores).tolist()


def test_missing_anchors_are_none_or_nan_and_learn_their_own_weight():
    trained = learner()
    for batch in batches(4, anchors=False, hidden=0):
        trained.step(batch, content_of())
    model, items, vectors = trained.model, np.arange(1, 4), content_of()[:3]
    assert model.w_missing.item() != 0
    assert model.w_score.item() == 1
    nothing = model.score(1, items, vectors, None)
    np.testing.assert_array_equal(nothing, model.score(1, items, vectors, np.full(3, np.nan, np.float32)))
    some = model.score(1, items, vectors, np.float32([np.nan, 0.5, np.nan]))
    assert (some == nothing).tolist() == [True, False, True]


def test_scores_are_standardised_whatever_way_they_come_in_batches():
    rng = np.random.default_rng(0)
    scores = rng.normal(0.3, 0.01, 500).astype(np.float32)
    scores[::7] = np.nan
    one, many = PreRanker(2, 2, 0), PreRanker(2, 2, 0)
    one.observe(scores)
    for part in np.split(scores, [1, 2, 100, 101, 400]):
        many.observe(part)
    known = scores[~np.isnan(scores)].astype(np.float64)
    for model in (one, many):
        count, mean, squares = model.score_moments.tolist()
        assert (count, mean) == (len(known), pytest.approx(known.mean()))
        assert (squares / count) ** 0.5 == pytest.approx(known.std())


# --- growth and lazy updates


def test_only_rows_in_the_batch_move():
    trained = learner()
    content = content_of()
    warm, batch = batches(2)
    trained.step(warm, content)
    before = trained.state_tensors()
    trained.step(batch, content)
    after = trained.state_tensors()
    for table, rows in (("users", batch.user_row), ("items", batch.item_row), ("item_bias", batch.item_row)):
        for part in ("", "optimizer."):
            names = [n for n in after if n == table or (part and n.startswith(f"{part}{table}."))]
            for name in names:
                moved = (before[name] != after[name]).any(dim=1).numpy()
                assert moved[np.unique(rows)].all(), name
                assert not np.delete(moved, np.unique(rows)).any(), name
    assert set(np.unique(warm.item_row)) - set(np.unique(batch.item_row))


def test_the_row_of_unknown_ids_stays_zero():
    rng = np.random.default_rng(0)
    known = example(rng)
    unknown = Example(0, np.zeros(9, int), known.content_row, known.score, known.clicked, known.label, known.confidence)
    trained = learner()
    for _ in range(3):
        trained.step(Batch.collate([known, unknown]), content_of())
    state = trained.state_tensors()
    assert all((state[name][0] == 0).all() for name in ("users", "items", "item_bias"))
    assert (state["default"] != 0).any()


def test_growing_in_the_middle_changes_nothing_for_those_already_there():
    # Tables that are outgrown several times against tables that were large from the start.
    small, large = learner(), learner()
    large.model.grow(5000, 9000)
    content = content_of()
    for step, batch in enumerate(batches(8)):
        small.model.grow(10 ** (step // 2), 3 ** (step + 1))
        small.step(batch, content)
        large.step(batch, content)
    one, other = small.state_tensors(), large.state_tensors()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name][: len(tensor)] if tensor.dim() else other[name]), name
    assert len(one["users"]) == 1000 and len(one["items"]) == 3**8


def test_new_rows_are_zero_after_growth_past_capacity():
    trained = learner()
    trained.step(batches(1)[0], content_of())
    before = trained.state_tensors()["items"]
    trained.model.grow(0, 5000)
    after = trained.state_tensors()["items"]
    assert torch.equal(after[: len(before)], before)
    assert (after[len(before) :] == 0).all() and len(after) == 5000


# --- determinism and state


def test_the_same_batches_give_the_same_weights_bit_for_bit():
    runs = []
    for _ in range(2):
        trained = learner()
        for batch in batches(10):
            trained.step(batch, content_of())
        runs.append(trained.state_tensors())
    assert_same_state(*runs)
    assert not torch.equal(runs[0]["content"], learner(seed=2).model.content)


@given(
    stop=st.integers(0, 11),
    config=st.sampled_from([LossConfig(), LossConfig("pointwise", 0.5, 0), LossConfig("listwise", 0, 0)]),
)
@settings(max_examples=12, deadline=None)
def test_training_goes_on_bit_for_bit_after_a_round_trip(stop, config):
    content = content_of(3000)
    data = batches(12, users=1500, items=3000)
    whole = learner(0, 0, config)
    first, second = learner(0, 0, config), learner(0, 0, config, seed=99)
    for step, batch in enumerate(data):
        # Ids appear as the stream goes on; capacities differ between the runs after the round trip.
        users, items = int(batch.user_row.max()) + 1, int(batch.item_row.max()) + 1
        if step == stop:
            second.load_state_tensors(load(save(first.state_tensors())))
            first = second
        for one in (whole, first):
            one.model.grow(users, items)
            one.step(batch, content)
    assert first.steps == 12
    assert_same_state(whole.state_tensors(), first.state_tensors())


def test_a_forgotten_row_is_as_it_was_before_its_first_step_and_others_stay():
    trained, data = learner(), batches(6)
    for batch in data:
        trained.step(batch, content_of())
    before = trained.state_tensors()
    trained.forget(users=np.array([2, 5]), items=np.array([7]))
    after = trained.state_tensors()
    rows = {"users": [2, 5], "items": [7], "history": [7], "item_bias": [7], "effects.items": [7]}
    for name, value in before.items():
        table = name if name in rows else name.removeprefix("optimizer.").partition(".")[0]
        expected = value.clone()
        if table in rows:
            assert (expected[rows[table]] != 0).any()
            expected[rows[table]] = 0
        assert torch.equal(after[name], expected), name
    # Rows that have come since the last step have no moments to clear.
    trained.model.grow(5000, 5000)
    trained.forget(users=np.array([4999]), items=np.array([4999]))
    trained.step(data[0], content_of())


def test_the_logits_of_a_step_are_those_before_it():
    trained, data = learner(), batches(3)
    trained.step(data[0], content_of())
    trained.model.observe(data[1].score)  # the step does so too, before it scores
    expected = trained.model(data[1], content_of()).full.detach().numpy()
    again = learner()
    again.step(data[0], content_of())
    again.step(data[1], content_of())
    np.testing.assert_array_equal(again.logits, expected)


def test_a_model_alone_round_trips_and_scores_the_same():
    trained = learner()
    for batch in batches(3):
        trained.step(batch, content_of())
    served = PreRanker.of_state(load(save(trained.model.state_tensors())), DIM_CONTENT)
    args = (3, np.arange(1, 31), content_of(), np.linspace(0, 1, 30, dtype=np.float32))
    np.testing.assert_array_equal(served.score(*args), trained.model.score(*args))


def test_a_saved_state_does_not_follow_the_model():
    trained = learner()
    data = batches(2)
    trained.step(data[0], content_of())
    saved = trained.state_tensors()
    copies = {name: tensor.clone() for name, tensor in saved.items()}
    trained.step(data[1], content_of())
    assert_same_state(saved, copies)


@pytest.mark.parametrize("name", ["items", "w_score", "score_moments", "optimizer.users.exp_avg", "optimizer.steps"])
def test_a_damaged_state_is_named_and_nothing_is_loaded(name):
    trained = learner()
    trained.step(batches(1)[0], content_of())
    state = trained.state_tensors()
    other = learner(seed=5)
    before = other.state_tensors()
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        other.load_state_tensors({n: t for n, t in state.items() if n != name})
    if state[name].dim():
        with pytest.raises(ValueError, match=name.replace(".", r"\.")):
            other.load_state_tensors({**state, name: state[name].new_zeros(3, 2, 2)})
    assert_same_state(before, other.state_tensors())


def test_rows_that_came_after_the_last_step_are_part_of_the_state():
    trained = learner()
    trained.step(batches(1)[0], content_of())
    trained.model.grow(3000, 5000)  # no step follows: nothing was exposed
    state = load(save(trained.state_tensors()))
    again, older = learner(seed=5), learner(seed=6)
    again.load_state_tensors(state)
    older.load_state_tensors(
        {n: t[:1024] if n.startswith("optimizer.") and t.dim() == 2 else t for n, t in state.items()}
    )
    for learnt in (again, older):
        assert_same_state(trained.state_tensors(), learnt.state_tensors())


@pytest.mark.parametrize("name", ["history", "item_bias"])
def test_tables_of_the_same_ids_have_the_same_rows(name):
    state = learner().model.state_tensors()
    with pytest.raises(
        ValueError, match=f"{name}: {len(state[name]) - 1} rows, expected {len(state['items'])} as items"
    ):
        PreRanker.of_state({**state, name: state[name][:-1]}, DIM_CONTENT)


# --- batches


def test_exposed_only_training_equals_training_on_records_without_unexposed():
    rng = np.random.default_rng(3)
    full, bare = learner(config=LossConfig("listwise", 0, 0)), learner()
    for _ in range(6):
        records = [example(rng) for _ in range(4)]
        shown = [
            replace(
                e,
                item_row=e.item_row[:3],
                content_row=e.content_row[:3],
                score=e.score[:3],
                label=e.label[:0],
                confidence=e.confidence[:0],
            )
            for e in records
        ]
        full.step(Batch.collate(records), content_of())
        bare.step(Batch.collate(shown), content_of())
    assert_same_state(full.state_tensors(), bare.state_tensors())


@pytest.mark.parametrize("negatives", [0.0, 1.0])
def test_without_evidence_training_equals_training_without_pseudo_labels(negatives):
    gated = learner(config=LossConfig(pseudo_weight=2.0, negatives_weight=negatives))
    without = learner(config=LossConfig(pseudo_weight=0.0, negatives_weight=negatives))
    convinced = learner(config=LossConfig(pseudo_weight=2.0, negatives_weight=negatives))
    halved = learner(config=LossConfig(pseudo_weight=1.0, negatives_weight=negatives))
    for batch in batches(6):
        gated.step(batch, content_of(), evidence=0.0)
        without.step(batch, content_of())
        convinced.step(batch, content_of(), evidence=0.5)
        halved.step(batch, content_of())
    assert_same_state(gated.state_tensors(), without.state_tensors())
    assert_same_state(convinced.state_tensors(), halved.state_tensors())
    assert not torch.equal(gated.model.content, convinced.model.content)
    with pytest.raises(ValueError, match=r"evidence: 1\.5"):
        gated.step(batches(1)[0], content_of(), evidence=1.5)


def test_a_batch_with_nothing_to_learn_from_changes_nothing():
    trained = learner(config=LossConfig("listwise", 0, 0))
    before = trained.state_tensors()
    assert trained.step(batches(1, exposed=0)[0], content_of()) is None
    assert_same_state(before, trained.state_tensors())


@pytest.mark.parametrize("config", [LossConfig(negatives_weight=0.0), LossConfig()])
@pytest.mark.parametrize("evidence", [0.0, 1.0])
def test_labels_without_confidence_and_without_exposure_move_no_weight(config, evidence):
    rng = np.random.default_rng(0)
    hidden = example(rng, exposed=0)
    hidden = replace(hidden, confidence=np.zeros_like(hidden.confidence))
    one = learner(config=config)
    one.step(batches(1)[0], content_of())
    before = {name: t.clone() for name, t in one.model.state_tensors().items()}
    assert one.step(Batch.collate([hidden]), content_of(), evidence) is None
    moved = {name for name, t in one.model.state_tensors().items() if not torch.equal(t, before[name])}
    assert moved <= {"score_moments"}
    assert one.steps == 1
    assert one.step(batches(1)[0], content_of()) is not None


@given(sizes=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 8)), min_size=1, max_size=6), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_collate_keeps_every_pair(sizes, seed):
    rng = np.random.default_rng(seed)
    records = [example(rng, exposed=m, hidden=n) for m, n in sizes]
    batch = Batch.collate(records)
    start = 0
    for r, e in enumerate(records):
        rows = slice(start, start + len(e.item_row))
        start = rows.stop
        assert (batch.request[rows] == r).all()
        assert batch.user_row[r] == e.user_row
        np.testing.assert_array_equal(batch.item_row[batch.item[rows]], e.item_row)
        np.testing.assert_array_equal(batch.content_row[batch.item[rows]], e.content_row)
        np.testing.assert_array_equal(batch.score[rows], e.score)
        m = len(e.clicked)
        assert batch.exposed[rows].tolist() == [True] * m + [False] * (len(e.item_row) - m)
        np.testing.assert_array_equal(batch.clicked[rows][:m], e.clicked)
        np.testing.assert_array_equal(batch.label[rows][m:], e.label)
        np.testing.assert_array_equal(batch.confidence[rows][m:], e.confidence)
    assert start == len(batch.request)
    assert len(np.unique(batch.item_row)) == len(batch.item_row)


def test_items_without_content_count_as_zero_vectors():
    content = content_of(3)
    gathered = gather_content(content, np.array([2, -1, 0]))
    np.testing.assert_array_equal(
        gathered.numpy(), np.stack([content[2], np.zeros(DIM_CONTENT, np.float32), content[0]])
    )
    assert gather_content(content[:0], np.array([-1])).tolist() == [[0.0] * DIM_CONTENT]


# --- errors


def test_bad_input_is_named():
    good = example(np.random.default_rng(0))
    columns = (good.user_row, good.item_row, good.content_row, good.score, good.clicked, good.label, good.confidence)
    with pytest.raises(ValueError, match="confidence: 2 entries, expected 6"):
        Example(*columns[:-1], good.confidence[:2])
    with pytest.raises(ValueError, match="score: nan"):
        Example(*columns[:3], np.full(9, np.nan, np.float32), *columns[4:])
    with pytest.raises(ValueError, match="examples"):
        Batch.collate([])
    with pytest.raises(ValueError, match="dim: 0"):
        PreRanker(3, 0, 0)
    with pytest.raises(ValueError, match="learning_rate: 0"):
        Learner(PreRanker(3, 2, 0), LossConfig(), 0, 0)
    with pytest.raises(ValueError, match=r"weight_decay: -1"):
        Learner(PreRanker(3, 2, 0), LossConfig(), 0.1, -1)
    model = PreRanker(DIM_CONTENT, DIM, 0)
    with pytest.raises(IndexError, match="user_row"):
        model.score(1, np.array([0]), content_of(1), None)
    with pytest.raises(IndexError, match="item_row: 4"):
        model.score(0, np.array([4]), content_of(1), None)
    with pytest.raises(IndexError, match="item_row: -1"):
        model.score(0, np.array([-1]), content_of(1), None)
    with pytest.raises(ValueError, match="content: shape"):
        model.score(0, np.array([0]), content_of(2), None)
    with pytest.raises(ValueError, match="anchor_score"):
        model.score(0, np.array([0]), content_of(1), np.zeros(2, np.float32))
    with pytest.raises(IndexError, match="user_row"):
        model(batches(1)[0], content_of())
    with pytest.raises(IndexError, match="content_row"):
        learner().step(batches(1)[0], content_of(2))


def test_it_learns_what_was_clicked():
    # Users 1..USERS like the even items when they are even, else the odd ones: only ids and their product can tell.
    rng = np.random.default_rng(0)
    trained = learner(config=LossConfig("listwise", 0, 0))
    content = content_of()
    losses = []
    for _ in range(400):
        records = []
        for _ in range(8):
            e = example(rng, exposed=8, hidden=0, anchors=False)
            clicked = (e.item_row % 2 == e.user_row % 2).astype(np.float32)
            records.append(Example(e.user_row, e.item_row, e.content_row, e.score, clicked, e.label, e.confidence))
        loss = trained.step(Batch.collate(records), content)
        losses.append(loss.actual.item())
    assert np.mean(losses[:20]) > 0.6
    assert np.mean(losses[-20:]) < 0.2
