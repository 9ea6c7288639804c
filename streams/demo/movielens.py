"""MovieLens-100K, read from the installed ``recbole`` wheel, which carries it, without importing recbole.

Harper and Konstan, "The MovieLens Datasets: History and Context", ACM TiiS 5(4), 2015.
"""

from __future__ import annotations

import csv
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

from streams.contracts import Item
from streams.demo.upstream import Rating

# "Horseman on the Roof, The (Hussard sur le toit, Le)": the article is put back in front.
_MOVED_ARTICLE = re.compile(r"^(?P<title>[^(]*), (?P<article>The|A|An|Le|La|Les|Il|Das|Der|Die)(?P<rest> \(.*\))?$")


class DatasetMissingError(RuntimeError):
    """MovieLens-100K is not installed; the message says how to get it."""


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


def items(folder: Path) -> list[Item]:
    """The films in id order; the text is "Title (year). Genre, genre"."""
    found = [Item(row["item_id"], _text(row), attributes=_attributes(row)) for row in _rows(folder / "ml-100k.item")]
    return sorted(found, key=lambda item: int(item.item_id))


def ratings(folder: Path) -> list[Rating]:
    """The 100,000 ratings by time, then user and item; ``ts`` in milliseconds, whole seconds in the source."""
    found = [
        Rating(row["user_id"], row["item_id"], int(float(row["timestamp"])) * 1000, float(row["rating"]))
        for row in _rows(folder / "ml-100k.inter")
    ]
    return sorted(found, key=lambda rating: (rating.ts, rating.user_id, rating.item_id))


def _rows(path: Path) -> Iterator[dict[str, str]]:
    """Rows of an atomic file of RecBole: tab separated, header ``name:type``."""
    with path.open(encoding="utf-8", newline="") as handle:
        table = csv.reader(handle, delimiter="\t", quoting=csv.QUOTE_NONE)
        names = [column.partition(":")[0] for column in next(table)]
        for row in table:
            yield dict(zip(names, row, strict=True))


def _genres(row: dict[str, str]) -> list[str]:
    return [genre for genre in row["class"].split() if genre != "unknown"]


def _attributes(row: dict[str, str]) -> dict[str, object] | None:
    year = row["release_year"]
    attributes = {"year": int(year) if year.isdigit() else None, "genres": _genres(row) or None}
    return {name: value for name, value in attributes.items() if value is not None} or None


def _text(row: dict[str, str]) -> str:
    title = row["movie_title"].strip()
    if found := _MOVED_ARTICLE.match(title):
        title = f"{found['article']} {found['title']}{found['rest'] or ''}"
    year = f" ({row['release_year']})" if row["release_year"].isdigit() else ""
    genres = ", ".join(_genres(row))
    return f"{title}{year}. {genres}" if genres else f"{title}{year}"
