"""Coat Shopping: ratings 1 to 5 of coats that users chose, and of random ones (Schnabel et al. 2016).

``train.ascii``: users x items, 0 is no rating. ``test.ascii``, where it is there: the same of a random exposure, the
truth without selection bias. Without it, a third of a user's own ratings is held out instead. A coat's text is made of
its features: ``item_features.ascii`` and ``item_features_map.txt``, beside the others or, as published, in
``user_item_features``.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import numpy as np
import numpy.typing as npt

from gpl.catalogue import ItemContent
from gpl.evaluation.dataset import DataError, Dataset, Ragged, Requests, Truth
from gpl.evaluation.sources.table import find, opened, optional

RELEVANT_FROM = 4
HELD_OUT = 3
"""One rating in this many is held out where there is no random exposure."""
_SEED = 0


def read(source: Path) -> Dataset:
    """All a user's ratings are one request, which recalled every coat; a rating of at least 4 is a click."""
    ratings = _ratings(find(source, "train.ascii"))
    n_users, n_items = ratings.shape
    rng = np.random.default_rng(_SEED)
    if (exposure := optional(source, "test.ascii")) is not None:
        test = _ratings(exposure)
        if test.shape != ratings.shape:
            raise DataError(f"test.ascii: {test.shape[0]} x {test.shape[1]}, train.ascii is {n_users} x {n_items}")
        test[ratings > 0] = 0  # exposed: its feedback is in the log
        user, item = np.nonzero(test)
        relevance = (test[user, item] >= RELEVANT_FROM).astype(np.float32)
    else:
        order = np.argsort(np.where(ratings > 0, rng.random(ratings.shape), 2.0), axis=1)
        held = np.zeros(ratings.shape, dtype=bool)
        for row, count in enumerate((ratings > 0).sum(axis=1) // HELD_OUT):
            held[row, order[row, :count]] = True
        user, item = np.nonzero(held & (ratings >= RELEVANT_FROM))
        relevance = np.ones(len(user), dtype=np.float32)
        ratings = np.where(held, 0, ratings)
    if not relevance.any():
        judged = "train.ascii" if exposure is None else exposure.name
        raise DataError(f"{judged}: no rating to judge on is at least {RELEVANT_FROM}")
    shown = [np.flatnonzero(row) for row in ratings]
    return Dataset(
        "coat",
        [ItemContent(f"c{at}", text) for at, text in enumerate(_texts(source, n_items))],
        [f"u{at}" for at in range(n_users)],
        Truth(user.astype(np.int64), item.astype(np.int64), relevance, every_cell=False),
        log=Requests(
            np.arange(n_users),
            Ragged.of(shown),
            np.concatenate([row[mine] >= RELEVANT_FROM for row, mine in zip(ratings, shown, strict=True)]),
            Ragged.of(np.flatnonzero(row == 0) for row in ratings),
        ),
    )


def _texts(source: Path, n_items: int) -> list[str]:
    """ "women's pea coat, black"."""
    with opened(_features(source, "item_features_map.txt")) as handle:
        names = [line.strip() for line in handle if line.strip()]
    features = _matrix(_features(source, "item_features.ascii"))
    if features.shape != (n_items, len(names)):
        raise DataError(f"item_features.ascii: shape {features.shape}, expected {n_items} x {len(names)}")
    texts = []
    for row in features:
        of: defaultdict[str, list[str]] = defaultdict(list)
        for at in np.flatnonzero(row):
            kind, _, value = names[at].partition(":")
            of[kind].append(value)
        front = ", on the front page" if of["onfrontpage"] == ["yes"] else ""
        texts.append(f"{'/'.join(of['gender'])}'s {'/'.join(of['jackettype'])} jacket, {'/'.join(of['color'])}{front}")
    return texts


def _features(source: Path, name: str) -> Path:
    return find(source, name, f"user_item_features/{name}")


def _ratings(path: Path) -> npt.NDArray[np.int64]:
    ratings = _matrix(path)
    if not ratings.any():
        raise DataError(f"{path.name}: no ratings")
    if ((ratings < 0) | (ratings > 5)).any():
        wrong = ratings[(ratings < 0) | (ratings > 5)][0]
        raise DataError(f"{path.name}: rating {wrong}, expected 1 to 5, or 0 where there is none")
    return ratings


def _matrix(path: Path) -> npt.NDArray[np.int64]:
    with opened(path) as handle:
        lines = [line for line in handle if line.strip()]
    try:
        # An empty file is a matrix of nothing, without a warning.
        return np.loadtxt(lines or ["0"], dtype=np.int64, ndmin=2)
    except ValueError as error:
        raise DataError(f"{path.name}: {error}") from None
