"""Jester: ratings of 100 jokes, -10 to 10 (Goldberg et al. 2001); 99 is no rating.

As published: ``jester-data-1.csv``, -2 and -3 as far as they are there, the workbooks saved as CSV: a row a user, the
number of ratings, then the rating of each joke; ``init1.html`` and so on, beside them or in ``jokes``: a joke each.

Rearranged: ``ratings.csv`` user,joke,rating and ``jokes.csv`` joke,text. As published, ``jokes.csv`` may take the place
of the pages, its rows in the order of the columns.
"""

from __future__ import annotations

import csv
import re
from collections import defaultdict
from pathlib import Path

import numpy as np

from gpl.catalogue import ItemContent
from gpl.evaluation.dataset import DataError, Dataset, Truth
from gpl.evaluation.sources.table import encoding_of, find, number, opened, optional, plain, rows

RELEVANT_FROM = 5.0
"""Lowest rating that counts as relevant: about the highest quarter of all."""
_NOT_RATED = 99.0
_JOKE = re.compile(r"<!--\s*begin of joke\s*-->(.*?)<!--\s*end of joke\s*-->", re.DOTALL | re.IGNORECASE)


def read(source: Path) -> Dataset:
    """Users who rated every joke: their whole truth is known."""
    jokes = _jokes(source)
    listed = optional(source, "ratings.csv")
    path = listed or find(source, "ratings.csv", "jester-data-1.csv")
    found = _listed(path, jokes) if listed else _matrices(source, len(jokes))
    if not found:
        raise DataError(f"{path.name}: no user rated all {len(jokes)} jokes")
    ratings = np.array(list(found.values()))
    if not (ratings >= RELEVANT_FROM).any():
        raise DataError(f"{path.name}: no rating of at least {RELEVANT_FROM:g} of users who rated all jokes")
    user, item = np.indices(ratings.shape).reshape(2, -1).astype(np.int64)
    truth = Truth(user, item, (ratings >= RELEVANT_FROM).astype(np.float32).ravel(), every_cell=True)
    return Dataset("jester", [ItemContent(joke, text) for joke, text in jokes.items()], list(found), truth)


def _jokes(source: Path) -> dict[str, str]:
    first = find(source, "jokes.csv", "init1.html", "jokes/init1.html")
    if first.name.startswith("jokes.csv"):
        return {row["joke"]: row["text"] for row in rows(first, "joke", "text")}
    jokes: dict[str, str] = {}
    while (page := optional(first.parent, f"init{len(jokes) + 1}.html")) is not None:
        # Of pages without a declared encoding, Latin-1 is the default.
        with opened(page, encoding_of(page)) as handle:
            joke = _JOKE.search(handle.read())
        if joke is None:
            raise DataError(f"{page.name}: no joke between '<!--begin of joke -->' and '<!--end of joke -->'")
        jokes[f"j{len(jokes) + 1}"] = plain(joke[1])
    return jokes


def _listed(path: Path, jokes: dict[str, str]) -> dict[str, list[float]]:
    """All ratings of users who rated every joke, in the order of ``jokes``."""
    by_user: defaultdict[str, dict[str, float]] = defaultdict(dict)
    for row in rows(path, "user", "joke", "rating"):
        if row["joke"] in jokes and (rating := _rating(path, row["rating"])) != _NOT_RATED:
            by_user[row["user"]][row["joke"]] = rating
    users = sorted(user for user, mine in by_user.items() if len(mine) == len(jokes))
    return {user: [by_user[user][joke] for joke in jokes] for user in users}


def _matrices(source: Path, n_jokes: int) -> dict[str, list[float]]:
    """The same of the matrices; users are numbered through all of them."""
    found, user = {}, 0
    for part in range(1, 4):
        # Only the first must be there, but a later one as a workbook would be left out without a word.
        names = [f"jester-data-{part}.{kind}" for kind in ("csv", "xls", "xlsx")]
        if part > 1 and optional(source, *names) is None:
            continue
        path = find(source, names[0])
        with opened(path) as handle:
            for at, row in enumerate(csv.reader(handle), 1):
                if not any(row):
                    continue
                user += 1
                if len(row) != n_jokes + 1:
                    raise DataError(
                        f"{path.name}:{at}: {len(row)} columns, expected {n_jokes + 1}: the number of ratings, "
                        f"then those of the {n_jokes} jokes"
                    )
                ratings = [_rating(path, rating) for rating in row[1:]]
                if _NOT_RATED not in ratings:
                    found[f"u{user}"] = ratings
    return found


def _rating(path: Path, rating: str) -> float:
    value = number(path, "rating", rating)
    if not -10 <= value <= 10 and value != _NOT_RATED:
        raise DataError(f"{path.name}: rating {rating!r}, expected -10 to 10, or 99 where there is none")
    return value
