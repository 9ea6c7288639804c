"""Jester: ratings of 100 jokes, -10 to 10 (Goldberg et al. 2001).

``jokes.csv`` joke,text; ``ratings.csv`` user,joke,rating.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import numpy as np

from gpl.catalogue import ItemContent
from gpl.evaluation.dataset import DataError, Dataset, Truth
from gpl.evaluation.sources.table import find, number, rows

RELEVANT_FROM = 5.0
"""Lowest rating that counts as relevant: about the highest quarter of all."""


def read(source: Path) -> Dataset:
    """Users who rated every joke: their whole truth is known."""
    jokes = {row["joke"]: row["text"] for row in rows(find(source, "jokes.csv"), "joke", "text")}
    path = find(source, "ratings.csv")
    by_user: defaultdict[str, dict[str, float]] = defaultdict(dict)
    for row in rows(path, "user", "joke", "rating"):
        if row["joke"] in jokes:
            by_user[row["user"]][row["joke"]] = number(path, "rating", row["rating"])
    users = sorted(user for user, mine in by_user.items() if len(mine) == len(jokes))
    if not users:
        raise DataError(f"{path.name}: no user rated all {len(jokes)} jokes")
    ratings = np.array([[by_user[user][joke] for joke in jokes] for user in users])
    user, item = np.indices(ratings.shape).reshape(2, -1).astype(np.int64)
    truth = Truth(user, item, (ratings >= RELEVANT_FROM).astype(np.float32).ravel(), every_cell=True)
    return Dataset("jester", [ItemContent(joke, text) for joke, text in jokes.items()], users, truth)
