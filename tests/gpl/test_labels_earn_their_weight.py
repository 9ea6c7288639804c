"""Both ends on a planted world: anchors of the right user help, those of another change nothing at all."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gpl.labels.calibration import NoCalibration
from gpl.labels.evidence import Evidence
from gpl.labels.labeller import Config, PreparedAnchors, label
from gpl.preranker.batch import Batch, Example
from gpl.preranker.learner import Learner
from gpl.preranker.loss import LossConfig
from gpl.preranker.model import PreRanker

USERS, ITEMS, DIM, ROUNDS = 80, 300, 16, 6
LEARNING_RATE = 0.05  # one short pass must move the towers: a model still at its start ranks by the anchor score


def unit(x):
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


class World:
    """Users like items near three points of theirs, popular or not; the policy shows what is popular."""

    def __init__(self, seed):
        rng = np.random.default_rng(seed)
        self.vectors = unit(rng.standard_normal((ITEMS, DIM)))
        self.taste = unit(rng.standard_normal((USERS, 3, DIM)))
        near = (self.taste @ self.vectors.T).max(axis=1)
        popularity = np.exp(rng.normal(0, 1.5, ITEMS))
        chance = 1 / (1 + np.exp(-12 * (near - 0.5)))
        self.likes = rng.random((USERS, ITEMS)) < chance
        self.seen = np.zeros((USERS, ITEMS), bool)
        self.requests = []
        for _ in range(ROUNDS):
            for user in rng.permutation(USERS):
                candidates = rng.permutation(np.flatnonzero(~self.seen[user]))[:40]
                shown = candidates[np.argsort(-(2 * np.log(popularity[candidates]) + rng.gumbel(size=40)))[:8]]
                self.seen[user, shown] = True
                self.requests.append((user, shown, np.setdiff1d(candidates, shown)))

    def batches(self, anchors_of, size=16):
        logs = np.float32([-3.0, -3.3, -3.6])
        prepared = [
            PreparedAnchors.build(anchors_of[u], logs, np.ones(3, np.float32), 3, Config()) for u in range(USERS)
        ]
        examples = []
        for user, shown, hidden in self.requests:
            found = label(prepared[user], NoCalibration(), self.vectors[np.concatenate([shown, hidden])])
            m = len(shown)
            rows = np.concatenate([shown, hidden])
            clicked = self.likes[user, shown].astype(np.float32)
            examples.append(
                Example(int(user) + 1, rows + 1, rows, found.score, clicked, found.label[m:], found.confidence[m:])
            )
        self.scores = np.stack([label(p, NoCalibration(), self.vectors).score for p in prepared])
        return [Batch.collate(examples[at : at + size]) for at in range(0, len(examples), size)]

    def precision(self, model):
        """Of the ten best items not yet shown, how many the user likes."""
        rows, hits = np.arange(ITEMS), []
        for user in range(USERS):
            logits = model.score(user + 1, rows + 1, self.vectors, self.scores[user])
            best = np.argsort(-np.where(self.seen[user], -np.inf, logits))[:10]
            hits.append(self.likes[user, best].mean())
        return float(np.mean(hits))


def trained(world, batches, weight):
    """As the trainer does: evidence takes a batch in before the step that it scales."""
    model = PreRanker(DIM, 8, seed=0)
    model.grow(USERS + 1, ITEMS + 1)
    learner, evidence = Learner(model, LossConfig(pseudo_weight=weight), LEARNING_RATE, 1e-4), Evidence()
    for b in batches:
        evidence.observe(b.user_row, b.item_row[b.item], b.request, b.score, b.exposed, b.clicked)
        learner.step(b, world.vectors, evidence.read().weight)
    return learner, evidence.read()


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_the_right_anchors_open_the_gate_and_help():
    gains = []
    for seed in range(3):
        world = World(seed)
        batches = world.batches(world.taste)
        with_labels, reading = trained(world, batches, 3.0)
        without, _ = trained(world, batches, 0.0)
        assert reading.weight == 1.0
        gains.append(world.precision(with_labels.model) - world.precision(without.model))
    assert min(gains) > 0.05  # of about 0.5 without labels


def test_anchors_of_other_users_leave_training_as_it_is_without_pseudo_labels():
    for seed in range(3):
        world = World(seed)
        batches = world.batches(np.roll(world.taste, 1, axis=0))
        with_labels, reading = trained(world, batches, 3.0)
        without, _ = trained(world, batches, 0.0)
        assert reading.weight == 0.0
        one, other = with_labels.state_tensors(), without.state_tensors()
        for name, tensor in one.items():
            assert torch.equal(tensor, other[name]), name
