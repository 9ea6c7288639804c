"""A batch divided among ranks trains as the whole does."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from gpl.preranker.batch import Batch, Example
from gpl.preranker.division import Division, Each, in_one_process
from gpl.preranker.effects import ItemEffects
from gpl.preranker.learner import Learner
from gpl.preranker.loss import LossConfig, Mass
from gpl.preranker.model import PreRanker

USERS, ITEMS, DIM = 7, 25, 6
CONTENT = np.random.default_rng(0).normal(size=(ITEMS, DIM)).astype(np.float32)
CONFIGS = {
    "listwise, softmax": LossConfig(),
    "pointwise": LossConfig("pointwise", negatives="pointwise"),
    "exposed only": LossConfig(pseudo_weight=0, negatives_weight=0),
    "no negatives": LossConfig(negatives_weight=0, centred=False),
    "personal": LossConfig(personal=True),
}


def batch(rng: np.random.Generator, requests: int) -> Batch:
    """Requests of unequal length, some without clicks, without scores, or with exposed items alone."""
    made = []
    for _ in range(requests):
        exposed, hidden = int(rng.integers(1, 5)), int(rng.integers(0, 9))
        rows = rng.permutation(ITEMS)[: exposed + hidden] + 1
        score = rng.uniform(-0.2, 0.9, len(rows)).astype(np.float32)
        score[:exposed][rng.random(exposed) < 0.2] = np.nan
        made.append(
            Example(
                user_row=int(rng.integers(1, USERS + 1)),
                item_row=rows,
                content_row=rows - 1,
                score=score,
                clicked=(rng.random(exposed) < 0.3).astype(np.float32),
                label=rng.random(hidden).astype(np.float32),
                confidence=rng.random(hidden).astype(np.float32),
                history=rng.integers(1, ITEMS + 1, rng.integers(0, 4)),
            )
        )
    return Batch.collate(made)


def learner(config: LossConfig) -> Learner:
    model = PreRanker(DIM, 5, seed=1)
    model.grow(USERS + 1, ITEMS + 1)
    return Learner(model, config, learning_rate=0.01, weight_decay=1e-3)


def as_over_a_wire(ranks: int) -> Each:
    """What arrives in another process."""
    return lambda compute: [load(save(dict(compute(rank)))) for rank in range(ranks)]


@pytest.mark.parametrize("name", CONFIGS)
@given(seed=st.integers(0, 2**32 - 1), ranks=st.integers(1, 4))
@hypothesis_settings(max_examples=15)
def test_the_gradient_of_the_parts_is_that_of_the_whole(name: str, seed: int, ranks: int) -> None:
    rng = np.random.default_rng(seed)
    whole, divided, sent = (learner(CONFIGS[name]) for _ in range(3))
    for _ in range(3):
        every = batch(rng, int(rng.integers(1, 7)))
        whose = rng.integers(0, ranks, len(every.user_row))  # a rank may have nothing
        whole.load_state_tensors(divided.state_tensors())
        expected = whole.step(every, CONTENT, 0.5)
        found = divided.step(every, CONTENT, 0.5, Division(whose, in_one_process(ranks)))
        again = sent.step(every, CONTENT, 0.5, Division(whose, as_over_a_wire(ranks)))
        assert expected is not None and found is not None and again is not None
        for term in ("total", "actual", "pseudo", "negatives"):
            assert float(getattr(found, term)) == pytest.approx(float(getattr(expected, term)), rel=1e-4, abs=1e-5)
        np.testing.assert_allclose(divided.logits, whole.logits, rtol=1e-4, atol=1e-4)
        one, other, third = whole.state_tensors(), divided.state_tensors(), sent.state_tensors()
        for key in one:
            # The moments tell of the gradient; Adam makes a whole step of the sign of what is rounding noise.
            if "exp_avg" in key:
                torch.testing.assert_close(one[key], other[key], rtol=1e-3, atol=1e-6)
            assert torch.equal(other[key], third[key]), key


def test_what_teaches_nothing_moves_nothing() -> None:
    rows = np.array([1])
    score, none = np.array([0.5], np.float32), np.zeros(0, np.float32)
    # One unexposed item: nothing was shown or clicked, and there is no order.
    alone = Batch.collate([Example(1, rows, rows - 1, score, none, score, score)] * 2)
    for division in (None, Division(np.array([0, 1]), in_one_process(3))):
        trained = learner(LossConfig())
        before = trained.model.users.detach().clone(), trained.model.content.detach().clone()
        assert trained.step(alone, CONTENT, 1.0, division) is None
        assert torch.equal(trained.model.users, before[0]) and torch.equal(trained.model.content, before[1])
        assert trained.steps == 0 and len(trained.logits) == 2


@given(seed=st.integers(0, 2**32 - 1))
@hypothesis_settings(max_examples=30)
def test_shares_of_mass_add_up(seed: int) -> None:
    rng = np.random.default_rng(seed)
    every = batch(rng, 5)
    effects = ItemEffects().observe(every)
    for config in CONFIGS.values():
        whole = Mass.of(every, config, effects)
        shares = []
        for r in range(5):
            chosen = every.request == r
            shares.append(Mass.of(every.pairs(chosen), config, effects.pairs(chosen), is_part=True).share(whole))
        for term, mass in vars(whole).items():
            assert sum(getattr(s, term) for s in shares) == pytest.approx(1.0 if mass > 0 else 0.0)
