from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from gpl.preranker.batch import Batch, Example
from gpl.preranker.effects import ItemEffects, PairEffects
from gpl.preranker.learner import Learner
from gpl.preranker.loss import LossConfig, joint_loss
from gpl.preranker.model import Logits, PreRanker


def record(clicked, hidden_scores, labels=None, confidence=None):
    n, m = len(hidden_scores), len(clicked)
    rows = np.arange(m + n)
    return Example(
        1,
        rows + 1,
        rows,
        np.concatenate([np.full(m, np.nan), hidden_scores]).astype(np.float32),
        np.array(clicked, np.float32),
        np.array([0.5] * n if labels is None else labels, np.float32),
        np.array([1.0] * n if confidence is None else confidence, np.float32),
    )


def loss_of(records, logits, config):
    values = torch.tensor(logits, dtype=torch.float32, requires_grad=True)
    return joint_loss(Logits(values, values), Batch.collate(records), config), values


def bce(logit, target):
    return np.logaddexp(0, logit) - target * logit


def softmax(x):
    e = np.exp(x - np.max(x))
    return e / e.sum()


def test_actual_is_the_mean_cross_entropy_of_the_exposed():
    loss, _ = loss_of([record([1, 0], []), record([1], [])], [0.5, -1.0, 2.0], LossConfig())
    assert loss.actual.item() == pytest.approx((bce(0.5, 1) + bce(-1, 0) + bce(2, 1)) / 3)
    assert loss.total.item() == loss.actual.item()


def test_pointwise_by_hand():
    records = [record([1], [0.1, 0.2], [0.9, 0.3], [0.5, 0.25]), record([], [0.4], [0.1], [0.05])]
    loss, _ = loss_of(records, [0.3, 1.0, -2.0, 0.7], LossConfig("pointwise", 2.0, 0.0))
    expected = (0.5 * bce(1.0, 0.9) + 0.25 * bce(-2.0, 0.3) + 0.05 * bce(0.7, 0.1)) / 0.8
    assert loss.pseudo.item() == pytest.approx(expected, rel=1e-5)
    assert loss.total.item() == pytest.approx(bce(0.3, 1) + 2 * expected, rel=1e-5)


def test_listwise_by_hand():
    # Standardised (population), each request weighted by its mean confidence: 0.6 and 0.2.
    records = [record([0], [0.1, 0.3, 0.8], confidence=[0.9, 0.6, 0.3]), record([], [0.5, 0.2], confidence=[0.1, 0.3])]
    logits = [0.0, 1.0, -1.0, 0.5, 2.0, 0.0]
    loss, _ = loss_of(records, logits, LossConfig("listwise", 1.0, 0.0))

    def divergence(scores, model):
        scores = np.array(scores)
        p, q = softmax((scores - scores.mean()) / scores.std()), softmax(np.array(model))
        return (p * np.log(p / q)).sum()

    expected = (0.6 * divergence([0.1, 0.3, 0.8], logits[1:4]) + 0.2 * divergence([0.5, 0.2], logits[4:])) / 0.8
    assert loss.pseudo.item() == pytest.approx(expected, rel=1e-5)


def test_listwise_is_zero_and_at_rest_where_the_model_agrees():
    scores = np.array([0.1, 0.3, 0.8, 0.2])
    agreeing = (scores - scores.mean()) / scores.std() + 5.0
    loss, values = loss_of([record([], scores)], agreeing, LossConfig("listwise", 1.0, 0.0))
    loss.total.backward()
    assert loss.pseudo.item() == pytest.approx(0, abs=1e-6)
    assert values.grad.abs().max() < 1e-6


def test_listwise_labels_that_leave_nothing_to_the_others_have_a_loss():
    records = [record([], [0.9, *np.linspace(0.1, 0.2, 57)])]
    loss, values = loss_of(records, np.zeros(58), LossConfig("listwise", 1.0, 0.0, temperature=0.005))
    loss.total.backward()
    assert loss.pseudo.item() == pytest.approx(np.log(58), rel=1e-5)
    assert torch.isfinite(values.grad).all()


def test_pointwise_negatives_by_hand():
    config = LossConfig("listwise", 0.0, 0.5, negatives="pointwise")
    loss, _ = loss_of([record([1], [0.1, 0.2])], [0.0, 1.0, -1.0], config)
    expected = (bce(1, 0) + bce(-1, 0)) / 2
    assert loss.negatives.item() == pytest.approx(expected)
    assert loss.total.item() == pytest.approx(bce(0, 1) + 0.5 * expected)


def test_softmax_negatives_by_hand():
    # The second request has two clicks, which share its weight; the third has none and does not count.
    records = [record([1, 0], [0.1, 0.2]), record([1, 1], [0.3]), record([0], [0.5])]
    logits = np.array([0.5, -1.0, 1.0, 0.0, 2.0, -0.5, 0.3, 0.1, 0.9])
    loss, _ = loss_of(records, logits, LossConfig(pseudo_weight=0.0, negatives_weight=2.0))
    first = -np.log(softmax(logits[:4])[0])
    second = -np.log(softmax(logits[4:7])[:2]).mean()
    assert loss.negatives.item() == pytest.approx((first + second) / 2, rel=1e-5)
    assert loss.total.item() == pytest.approx(loss.actual.item() + 2 * loss.negatives.item(), rel=1e-5)


def test_item_effects_are_taken_out_of_targets_and_negatives():
    batch = Batch.collate([record([1], [0.1, 0.9, 0.4])])
    values = torch.tensor([0.5, -1.0, 1.0, 0.0])
    effects = PairEffects(np.log(np.float32([9, 3, 1, 6])), np.float32([0.0, 0.1, 0.6, 0.0]))
    loss = joint_loss(Logits(values, values), batch, LossConfig(temperature=0.5), effects)
    corrected = np.array([0.5, -1.0, 1.0, 0.0]) - np.log([9, 3, 1, 6])
    assert loss.negatives.item() == pytest.approx(-np.log(softmax(corrected)[0]), rel=1e-5)
    score = np.array([0.0, 0.3, 0.4])
    p, q = softmax((score - score.mean()) / score.std() / 0.5), softmax(np.array([-1.0, 1.0, 0.0]))
    assert loss.pseudo.item() == pytest.approx((p * np.log(p / q)).sum(), rel=1e-5)
    plain = joint_loss(Logits(values, values), batch, LossConfig(centred=False, log_odds=False), effects)
    bare = joint_loss(Logits(values, values), batch, LossConfig())
    assert plain.total.item() == bare.total.item()


def test_personal_labels_leave_what_the_model_tells_everybody_to_clicks():
    batch = Batch.collate([record([1], [0.1, 0.9, 0.4]), record([], [0.7, 0.2])])
    content = np.random.default_rng(0).standard_normal((8, 4)).astype(np.float32)
    config = LossConfig("listwise", 1.0, 0.0, centred=False, personal=True)

    def learner(popularity):
        model = PreRanker(4, 3, 0)
        model.grow(5, 8)
        with torch.no_grad():
            model.users[1:5] = torch.linspace(-1, 1, 12).reshape(4, 3)
            model.default += torch.tensor([0.3, -0.2, popularity])
            model.item_bias[1:8] = popularity * torch.arange(7.0)[:, None]
        return Learner(model, config, 0.01, 0.0)

    plain, popular = learner(0.0), learner(2.0)
    by_hand = plain.model.score(1, batch.item_row, content[batch.content_row], None)[batch.item]
    by_hand -= plain.model.score(0, batch.item_row, content[batch.content_row], None)[batch.item]
    got = plain.step(batch, content).pseudo.item()
    # The anchor score's cross input is personal: it stays in.
    z = (batch.score - np.nanmean(batch.score)) / np.nanstd(batch.score)
    divergence = []
    for hidden in ([1, 2, 3], [4, 5]):
        score = batch.score[hidden]
        p, q = softmax((score - score.mean()) / score.std()), softmax((by_hand + z)[hidden])
        divergence.append((p * np.log(p / q)).sum())
    assert got == pytest.approx(np.mean(divergence), rel=1e-4)
    # How good items are to everybody changes nothing, nor do labels teach it.
    assert popular.step(batch, content).pseudo.item() == pytest.approx(got, rel=1e-4)
    clicked = batch.item_row[batch.item[batch.exposed]]
    moved = np.flatnonzero(popular.model.item_bias.detach().numpy()[1:8, 0] != 2.0 * np.arange(7)) + 1
    assert moved.tolist() == clicked.tolist()


@given(seed=st.integers(0, 99), size=st.integers(1, 3))
@settings(max_examples=20, deadline=None)
def test_item_effects_are_counts_and_shrunk_means(seed, size):
    rng = np.random.default_rng(seed)
    effects, seen = ItemEffects(), []
    for _ in range(4):
        records = []
        for _ in range(size):
            rows = rng.permutation(6)[:4] + 1
            score = rng.random(4).astype(np.float32)
            score[: rng.integers(0, 3)] = np.nan
            clicked = np.zeros(2, np.float32)
            records.append(Example(1, rows, rows - 1, score, clicked, np.zeros(2, np.float32), np.ones(2, np.float32)))
            seen += list(zip(rows, score, strict=True))
        batch = Batch.collate(records)
        found = effects.observe(batch)
    known = np.array([s for _, s in seen if not np.isnan(s)], np.float64)
    usual = len(seen) / len({r for r, _ in seen}) + 2
    for p, row in enumerate(batch.item_row[batch.item]):
        own = [float(s) for r, s in seen if r == row and not np.isnan(s)]
        assert found.log_odds[p] == pytest.approx(np.log((sum(r == row for r, _ in seen) + 2) / usual), abs=1e-5)
        assert found.mean_score[p] == pytest.approx((sum(own) + 5 * known.mean()) / (len(own) + 5), rel=1e-5)


def drawn(rng, items, popularity, requests=8):
    """Requests of six candidates of ``items``, the first two exposed, one of them clicked."""
    share = popularity / popularity.sum()
    return Batch.collate(
        [
            Example(1, rows, rows - 1, rng.random(6).astype(np.float32), np.float32([1, 0]), *np.ones((2, 4), "f4"))
            for rows in (rng.choice(items, 6, replace=False, p=share) + 1 for _ in range(requests))
        ]
    )


def test_pointwise_negatives_do_not_fade_with_time():
    rng, effects, force = np.random.default_rng(0), ItemEffects(), []
    popularity = 1 / np.arange(1.0, 31.0)
    config = LossConfig(pseudo_weight=0.0, negatives="pointwise")
    for step in range(400):
        batch = drawn(rng, 30, popularity)
        values = torch.zeros(len(batch.request), requires_grad=True)
        joint_loss(Logits(values, values), batch, config, effects.observe(batch)).negatives.backward()
        if step in (20, 399):
            force.append(float(values.grad[torch.from_numpy(~batch.exposed)].sum()))
    assert force[1] == pytest.approx(force[0], rel=0.1)  # a twentieth with counts alone


def test_pointwise_negatives_weigh_alike_whatever_is_often_a_candidate():
    """A logit for each item, full batch: log(C / (E + w m)), so two items clicked and shown alike have one."""
    # Item: exposures, clicks, unexposed candidacies. The first two differ in the last alone.
    exposures, clicks, hidden = np.array([[100, 100, 50, 150], [3, 3, 1, 4], [8_000, 1_000, 2_000, 3_000]])
    item = np.repeat(np.tile(np.arange(4), 2), np.concatenate([exposures, hidden]))
    exposed = np.arange(len(item)) < exposures.sum()
    clicked = np.zeros(len(item), np.float32)
    for i in range(4):
        clicked[np.flatnonzero(exposed & (item == i))[: clicks[i]]] = 1.0
    nothing = np.zeros(len(item), np.float32)
    none, rows = np.zeros(0, np.int64), np.arange(1, 5)
    request = np.zeros(len(item), np.int64)
    batch = Batch(
        np.ones(1, np.int64), none, none, rows, rows - 1, request, item, nothing, exposed, clicked, nothing, nothing
    )
    effects, config = ItemEffects().observe(batch), LossConfig(pseudo_weight=0.0, negatives="pointwise")
    table = torch.full((4,), -3.0, requires_grad=True)
    optimiser = torch.optim.LBFGS([table], max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        optimiser.zero_grad()
        every = table[torch.from_numpy(item)]
        total = joint_loss(Logits(every, every), batch, config, effects).total
        total.backward()
        return total

    optimiser.step(closure)
    found = table.detach().numpy()
    assert found == pytest.approx(np.log(clicks / (exposures + exposures.mean())), abs=0.1)
    assert found[0] == pytest.approx(found[1], abs=0.1)


@given(seed=st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_item_effects_go_on_from_their_state_as_if_not_interrupted(seed):
    rng = np.random.default_rng(seed)
    effects, popularity = ItemEffects(), np.ones(12)
    for _ in range(6):
        batch = drawn(rng, 12, popularity, 2)
        again = ItemEffects()
        again.load_state_arrays(effects.state_arrays(13))
        for one in (effects, again):
            one.forget(np.array([3, 3, 7, 5_000]))
        for mine, other in zip(*(vars(one.observe(batch)).values() for one in (effects, again)), strict=True):
            assert np.array_equal(mine, other)


@pytest.mark.parametrize("form", ["listwise", "pointwise"])
def test_without_pseudo_labels_or_weight_the_loss_is_the_actual_loss_exactly(form):
    shown, both = [record([1, 0, 1], [])], [record([1, 0, 1], [0.2, 0.7])]
    logits = [0.123, -0.456, 0.789, 3.0, -3.0]
    alone, a = loss_of(shown, logits[:3], LossConfig(form, 1.0, 1.0))
    off, b = loss_of(both, logits, LossConfig(form, 0.0, 0.0))
    unsure, c = loss_of([record([1, 0, 1], [0.2, 0.7], confidence=[0, 0])], logits, LossConfig(form, 1.0, 0.0))
    for loss in (alone, off, unsure):
        loss.total.backward()
        assert loss.total.item() == alone.actual.item()
        assert loss.pseudo.item() == loss.negatives.item() == 0
    for values in (b, c):
        assert torch.equal(values.grad[:3], a.grad)
        assert (values.grad[3:] == 0).all()


def test_requests_whose_scores_do_not_differ_are_left_out():
    same, one, real = record([], [0.4, 0.4, 0.4]), record([], [0.9]), record([], [0.1, 0.6])
    loss, values = loss_of([same, one, real], [1.0, 2, 3, 4, 0.2, -0.3], LossConfig("listwise", 1.0, 0.0))
    alone, _ = loss_of([real], [0.2, -0.3], LossConfig("listwise", 1.0, 0.0))
    loss.total.backward()
    assert loss.pseudo.item() == pytest.approx(alone.pseudo.item())
    assert (values.grad[:4] == 0).all()
    nothing, _ = loss_of([same, one], [1.0, 2, 3, 4], LossConfig("listwise", 1.0, 0.0))
    assert nothing.total.item() == 0


@pytest.mark.parametrize("form", ["listwise", "pointwise"])
def test_confidence_counts_only_relative_to_the_batch(form):
    def with_scale(scale):
        records = [
            record([1], [0.1, 0.5], [0.2, 0.8], [0.9 * scale, 0.5 * scale]),
            record([], [0.3, 0.4], None, [0.1 * scale] * 2),
        ]
        return loss_of(records, [0.1, 0.2, -0.4, 0.8, -1.0], LossConfig(form, 1.0, 0.0))[0].total.item()

    assert with_scale(1.0) == pytest.approx(with_scale(1e-3), rel=1e-5)


@given(
    form=st.sampled_from(["listwise", "pointwise"]),
    negatives=st.sampled_from(["softmax", "pointwise"]),
    sizes=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 6)), min_size=1, max_size=4).filter(
        lambda s: any(m + n for m, n in s)
    ),
    seed=st.integers(0, 999),
)
@settings(max_examples=40, deadline=None)
def test_gradients_agree_with_finite_differences(form, negatives, sizes, seed):
    rng = np.random.default_rng(seed)
    records = [record(rng.integers(0, 2, m), rng.random(n), rng.random(n), rng.uniform(0.1, 1, n)) for m, n in sizes]
    logits = rng.normal(0, 1.5, sum(m + n for m, n in sizes))
    config = LossConfig(form, 0.7, 0.3, negatives)
    loss, values = loss_of(records, logits, config)
    assert torch.isfinite(loss.total)
    assert loss.pseudo.item() >= -1e-6
    assume(loss.total.requires_grad)  # nothing exposed or clicked, and no order to learn
    loss.total.backward()
    step = 1e-2
    for i in range(len(logits)):
        ahead, behind = logits.copy(), logits.copy()
        ahead[i] += step
        behind[i] -= step
        slope = (loss_of(records, ahead, config)[0].total - loss_of(records, behind, config)[0].total).item() / (
            2 * step
        )
        assert values.grad[i].item() == pytest.approx(slope, abs=2e-4)


def test_the_number_of_candidates_does_not_change_the_scale():
    rng = np.random.default_rng(0)
    for form in ("pointwise", "listwise"):
        short, long = (
            loss_of([record([], rng.random(n), rng.random(n))], rng.normal(0, 1, n), LossConfig(form, 1, 1))[
                0
            ].total.item()
            for n in (50, 2000)
        )
        assert long == pytest.approx(short, rel=0.3)


@pytest.mark.parametrize("bad", [{"pseudo": "pairwise"}, {"pseudo_weight": -1.0}, {"negatives_weight": float("nan")}])
def test_bad_configuration_is_named(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        LossConfig(**bad)


def test_evidence_scales_lambda_and_sharpness_flattens_targets():
    scaled = LossConfig(pseudo_weight=3.0, temperature=2.0).scaled(0.5, 0.25)
    assert (scaled.pseudo_weight, scaled.temperature) == (1.5, 8.0)
    for bad in (0.0, -1.0, 1.5, float("nan")):
        with pytest.raises(ValueError, match="sharpness"):
            LossConfig().scaled(1.0, bad)
