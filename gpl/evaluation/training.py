"""Training a pre-ranker on a world's log, the same way for every method; only what a step does differs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from gpl.evaluation.anchors import HISTORY, refreshed
from gpl.evaluation.dataset import Floats, Ints
from gpl.evaluation.judge import Judge, Scores
from gpl.evaluation.pairs import Columns, Pairs, batches
from gpl.evaluation.world import World
from gpl.preranker.batch import Batch
from gpl.preranker.learner import Learner
from gpl.preranker.loss import LossConfig
from gpl.preranker.model import PreRanker

Step = Callable[[Learner, Batch, Ints], None]
"""One step of training on a batch; the positions of its pairs in the log tell what else is known of them."""


@dataclass(frozen=True)
class TrainConfig:
    """The same for all trained methods. ``hidden``: unexposed pairs of a request in an epoch, another stretch each; 60
    are all that a simulated recall leaves, as the stream trains on all.

    Training stops when the `Judge.goal` of the validation users has not risen for ``patience`` epochs; the best epoch
    is kept.
    """

    dim: int = 32
    learning_rate: float = 1e-2
    weight_decay: float = 1e-3
    batch_requests: int = 256
    hidden: int = 60
    epochs: int = 10
    patience: int = 2


@dataclass(frozen=True)
class Trained:
    """A pre-ranker and what it takes as input: raw anchor scores of users' items (None: none)."""

    model: PreRanker
    world: World
    scores_of: Scores | None
    epochs: int

    def scores(self, users: Ints) -> Floats:
        """(len(users), n) logits of all items."""
        return model_scores(self.model, self.world, users, self.scores_of)


def content_rows(world: World) -> Ints:
    """(n,) row of each item's content, -1 where it has none."""
    return np.where(world.has_content, np.arange(world.n_items), -1)


def histories(world: World) -> list[Ints]:
    """Of each request of the log, what anchors in force at it were made of: so it is in the stream."""
    known = refreshed(world.known).tolist()
    return [_liked(world, user, k) for user, k in zip(world.log.user.tolist(), known, strict=True)]


def _liked(world: World, user: int, known: int | None = None) -> Ints:
    """The newest of the user's first ``known`` positives that anchors can be made of."""
    items = world.positives[user][:known]
    return items[world.has_content[items]][-HISTORY:]


def model_scores(model: PreRanker, world: World, users: Ints, scores_of: Scores | None) -> Floats:
    n = world.n_items
    items = model.item_side(np.arange(1, n + 1), world.vectors)
    sides = [model.user_side(user + 1, _liked(world, user) + 1) for user in users.tolist()]
    towers = np.stack(sides) @ items.T
    anchor = None if scores_of is None else scores_of(users).ravel()
    return model.combine(np.ascontiguousarray(towers.ravel()), anchor).reshape(len(users), n)


def train(
    world: World,
    pairs: Pairs,
    columns: Columns,
    scores_of: Scores | None,
    step: Step,
    loss: LossConfig,
    config: TrainConfig,
    seed: int,
    validation: Judge,
) -> Trained:
    """``columns.score`` NaN and ``scores_of`` None: the model does without the anchor score. Deterministic on one
    thread."""
    rng = np.random.default_rng(seed)
    model = PreRanker(world.vectors.shape[1], config.dim, seed)
    model.grow(world.n_users + 1, world.n_items + 1)
    learner = Learner(model, loss, config.learning_rate, config.weight_decay)
    content, liked = content_rows(world), histories(world)
    best, best_goal, kept = 0, -1.0, model.state_tensors()
    for epoch in range(1, config.epochs + 1):
        for batch, at in batches(pairs, columns, liked, content, config.batch_requests, config.hidden, rng):
            step(learner, batch, at)
        goal = validation.goal(lambda users: model_scores(model, world, users, scores_of))
        if goal > best_goal:
            best, best_goal, kept = epoch, goal, model.state_tensors()
        elif epoch - best >= config.patience:
            break
    model.load_state_tensors(kept)
    return Trained(model, world, scores_of, best)


def one_thread() -> None:
    """Studies run side by side: each keeps to one core, and results do not depend on the number of them."""
    torch.set_num_threads(1)
