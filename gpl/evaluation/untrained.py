"""Scorers that train no pre-ranker: popularity, EASE, and the anchor score itself."""

from __future__ import annotations

import numpy as np

from gpl.evaluation.anchors import AnchorSpec, Generator
from gpl.evaluation.bench import Bench
from gpl.evaluation.dataset import Floats, Ints
from gpl.evaluation.judge import Scores
from gpl.evaluation.world import World
from gpl.labels.labeller import Config, Matching

_BELOW_ALL = -2.0
"""A cosine is at least -1, a kernel's sum above 0."""


def popularity(bench: Bench) -> Scores:
    """Number of clicks in the log and positives before it; exposures are the policy's, not people's."""
    count = np.bincount(bench.world.positives.values, minlength=bench.world.n_items).astype(np.float32)
    return lambda users: np.tile(count, (len(users), 1))


def ease(bench: Bench, regularisation: float) -> Scores:
    """Item-item weights in closed form (Steck, "Embarrassingly Shallow Autoencoders for Sparse Data", WWW 2019)."""
    world = bench.world
    liked = _liked(world, np.arange(world.n_users)).astype(np.float64)
    gram = liked.T @ liked
    gram[np.diag_indices_from(gram)] += regularisation
    inverse = np.linalg.inv(gram)
    weights = (-inverse / np.diag(inverse)).astype(np.float32)
    np.fill_diagonal(weights, 0.0)
    return lambda users: _liked(world, users) @ weights


def anchor_score(bench: Bench, generator: Generator, matching: Matching = "max") -> Scores:
    """Raw anchor scores as a ranking, items without content last; a user without anchors ranks all items alike."""
    scores_of = bench.scores(AnchorSpec(generator), Config(matching))
    return lambda users: np.nan_to_num(scores_of(users), nan=_BELOW_ALL)


def _liked(world: World, users: Ints) -> Floats:
    matrix = np.zeros((len(users), world.n_items), dtype=np.float32)
    for row, user in enumerate(users.tolist()):
        matrix[row, world.positives[user]] = 1.0
    return matrix
