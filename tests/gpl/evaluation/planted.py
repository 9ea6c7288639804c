"""Small worlds whose right answer is known: users like the items of their own topics, and content says the topic."""

from __future__ import annotations

import numpy as np

from gpl.catalogue import ItemContent
from gpl.evaluation.dataset import Dataset, Events, Truth

TOPICS, PER_TOPIC, DIM = 12, 25, 24


def items(rng: np.random.Generator, noise: float) -> list[ItemContent]:
    """``TOPICS * PER_TOPIC`` items; those of a topic follow each other and, but for ``noise``, have one content."""
    centres = rng.normal(size=(TOPICS, DIM))
    vectors = np.repeat(centres, PER_TOPIC, axis=0) + noise * rng.normal(size=(TOPICS * PER_TOPIC, DIM))
    return [ItemContent(f"i{at}", "", row.tolist()) for at, row in enumerate(vectors)]


def full(users: int = 160, noise: float = 0.4, seed: int = 0) -> Dataset:
    """A user likes a third of the items of two topics, and nothing else."""
    rng = np.random.default_rng(seed)
    liked = np.zeros((users, TOPICS * PER_TOPIC), dtype=bool)
    for user in range(users):
        for topic in rng.choice(TOPICS, 2, replace=False):
            mine = topic * PER_TOPIC + rng.choice(PER_TOPIC, PER_TOPIC // 2, replace=False)
            liked[user, mine] = True
    user, item = np.nonzero(liked)
    truth = Truth(user, item, np.ones(len(user), dtype=np.float32), every_cell=True)
    popularity = 1.0 / (1.0 + rng.permutation(TOPICS * PER_TOPIC)).astype(np.float32)
    return Dataset("planted", items(rng, noise), [f"u{u}" for u in range(users)], truth, popularity=1000 * popularity)


def events(users: int = 240, length: int = 7, noise: float = 0.4, seed: int = 0) -> Dataset:
    """A user takes ``length`` items of two topics, one after the other; within a topic, some items more than others."""
    rng = np.random.default_rng(seed)
    weight = 1.0 / (1.0 + rng.permutation(PER_TOPIC))
    rows: list[tuple[int, int]] = []
    for user in range(users):
        topics = rng.choice(TOPICS, 2, replace=False)
        every = np.concatenate([topic * PER_TOPIC + np.arange(PER_TOPIC) for topic in topics])
        taken = rng.choice(every, length, replace=False, p=np.tile(weight, 2) / (2 * weight.sum()))
        rows += [(user, int(item)) for item in taken]
    user, item = np.array(rows, dtype=np.int64).T
    taken_in_order = Events(user, item, np.arange(len(rows)))
    return Dataset("planted-events", items(rng, noise), [f"u{u}" for u in range(users)], events=taken_in_order)
