"""The upstream of a real site, simulated from ratings and named so: simulated recall, simulated impressions.

A user's ratings are cut into sessions and pages; each page is one request. Its candidates come from popularity and
co-occurrence as of that moment, from chance, and from what the user really met on this page and next; only the last
source sees the future. Impressions are what was really rated on the page, a click is a high rating. Everything follows
from the ratings and the seed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from streams.contracts import Feedback, Recall

# Ratings carry whole seconds, often many in one: a user's events are spread so that no two share a time.
_STEP_MS = 10
_RECALL_LEAD_MS = 2
_CLICK_LAG_MS = 3

POPULARITY, COOCCURRENCE, RANDOM, MET = "popular", "cooccur", "random", "met"


@dataclass(frozen=True, slots=True)
class Rating:
    """One rating; ``ts`` in milliseconds since the epoch."""

    user_id: str
    item_id: str
    ts: int
    value: float


@dataclass(frozen=True)
class UpstreamConfig:
    """``popular`` and ``cooccur`` are the most that each source gives; chance fills up to ``candidates``."""

    candidates: int = 500
    popular: int = 150
    cooccur: int = 150
    ahead: int = 20  # ratings after the page that recall finds too
    page: int = 10
    session_gap_ms: int = 30 * 60 * 1000
    click_from: float = 4.0
    history: int = 20  # newest clicks that co-occurrence starts from
    seed: int = 0

    def __post_init__(self) -> None:
        if self.page < 1 or self.candidates < self.page + self.ahead:
            raise ValueError(f"candidates: {self.candidates} must hold page + ahead = {self.page} + {self.ahead}")


@dataclass(frozen=True)
class Page:
    """The ratings of one page in order, each with its event time, and the items rated next."""

    user_id: str
    number: int
    ratings: list[Rating]
    ahead: list[str]

    @property
    def recall_ts(self) -> int:
        return self.ratings[0].ts - _RECALL_LEAD_MS


def pages(ratings: Sequence[Rating], config: UpstreamConfig) -> list[Page]:
    """Pages of all users by time. A user's second rating of an item is left out."""
    by_user: defaultdict[str, dict[str, Rating]] = defaultdict(dict)
    for rating in sorted(ratings, key=lambda r: (r.ts, r.user_id, r.item_id)):
        by_user[rating.user_id].setdefault(rating.item_id, rating)
    found = [page for mine in by_user.values() for page in _pages_of(_spread(list(mine.values())), config)]
    return sorted(found, key=lambda page: (page.recall_ts, page.user_id))


def _spread(mine: list[Rating]) -> list[Rating]:
    spread: list[Rating] = []
    for rating in mine:
        ts = max(rating.ts, spread[-1].ts + _STEP_MS) if spread else rating.ts
        spread.append(Rating(rating.user_id, rating.item_id, ts, rating.value))
    return spread


def _pages_of(mine: list[Rating], config: UpstreamConfig) -> Iterator[Page]:
    starts = [0, *(at for at, (a, b) in enumerate(pairwise(mine), 1) if b.ts - a.ts > config.session_gap_ms), len(mine)]
    number = 0
    for begin, end in pairwise(starts):
        for at in range(begin, end, config.page):
            stop = min(at + config.page, end)
            ahead = [rating.item_id for rating in mine[stop : stop + config.ahead]]
            yield Page(mine[0].user_id, number, mine[at:stop], ahead)
            number += 1


class SimulatedRecall:
    """Popularity and item-item co-occurrence, counted as ratings come. ``catalogue``: all item ids, in order."""

    def __init__(self, catalogue: Sequence[str], config: UpstreamConfig) -> None:
        self._config = config
        self._ids = list(catalogue)
        self._row = {item_id: row for row, item_id in enumerate(self._ids)}
        size = len(self._ids)
        self._popularity = np.zeros(size, dtype=np.int64)
        self._clicks = np.zeros(size, dtype=np.int64)
        self._together = np.zeros((size, size), dtype=np.float32)
        self._seen: defaultdict[str, list[int]] = defaultdict(list)
        self._clicked: defaultdict[str, list[int]] = defaultdict(list)

    def learn(self, rating: Rating) -> None:
        """Take one rating into the counts."""
        row = self._row[rating.item_id]
        self._popularity[row] += 1
        self._seen[rating.user_id].append(row)
        if rating.value >= self._config.click_from:
            past = self._clicked[rating.user_id]
            self._together[row, past] += 1
            self._together[past, row] += 1
            self._clicks[row] += 1
            past.append(row)

    def recall(self, page: Page, rng: np.random.Generator) -> tuple[list[str], list[str]]:
        """(candidates, sources) for the page: distinct, without what the user has met before, in random order.

        A candidate that several sources found names them all, joined by "+".
        """
        config = self._config
        fresh = np.ones(len(self._ids), dtype=bool)
        fresh[self._seen[page.user_id]] = False
        sources: defaultdict[int, list[str]] = defaultdict(list)
        for item_id in [*(rating.item_id for rating in page.ratings), *page.ahead]:
            sources[self._row[item_id]].append(MET)
        self._add(sources, POPULARITY, _top(np.where(fresh, self._popularity, 0), config.popular))
        self._add(sources, COOCCURRENCE, _top(np.where(fresh, self._affinity(page.user_id), 0), config.cooccur))
        missing = config.candidates - len(sources)
        fresh[list(sources)] = False
        rest = np.flatnonzero(fresh)
        if missing > 0 and len(rest):
            for row in rng.choice(rest, size=min(missing, len(rest)), replace=False).tolist():
                sources[row].append(RANDOM)
        rows = sorted(sources)
        rng.shuffle(rows)
        return [self._ids[row] for row in rows], ["+".join(sources[row]) for row in rows]

    def _add(self, sources: defaultdict[int, list[str]], name: str, rows: list[int]) -> None:
        for row in rows:
            if row in sources or len(sources) < self._config.candidates:
                sources[row].append(name)

    def _affinity(self, user_id: str) -> NDArray[np.float32]:
        """(items,) co-occurrence with the user's newest clicks, damped by how often each item is clicked at all."""
        newest = self._clicked[user_id][-self._config.history :]
        total: NDArray[np.float32] = self._together[newest].sum(axis=0) / np.sqrt(1.0 + self._clicks)
        return total


def _top(values: NDArray[Any], count: int) -> list[int]:
    """Rows of the largest positive values, the lower row first among equals."""
    order = np.argsort(-values.astype(np.float64), kind="stable")[:count]
    rows: list[int] = order[values[order] > 0].tolist()
    return rows


def simulate(
    ratings: Sequence[Rating], catalogue: Sequence[str], config: UpstreamConfig
) -> Iterator[tuple[Recall, list[Feedback]]]:
    """Requests by time, each with the feedback of its page. Raises KeyError for a rated item not in the catalogue."""
    recall = SimulatedRecall(catalogue, config)
    requests = pages(ratings, config)
    history = sorted((rating for page in requests for rating in page.ratings), key=lambda r: (r.ts, r.user_id))
    learnt = 0
    for index, page in enumerate(requests):
        while learnt < len(history) and history[learnt].ts < page.recall_ts:
            recall.learn(history[learnt])
            learnt += 1
        candidates, sources = recall.recall(page, np.random.default_rng([config.seed, index]))
        request_id = f"u{page.user_id}-{page.number}"
        yield (
            Recall(request_id, page.user_id, page.recall_ts, candidates, sources),
            list(_feedback(request_id, page, config)),
        )


def _feedback(request_id: str, page: Page, config: UpstreamConfig) -> Iterator[Feedback]:
    for position, rating in enumerate(page.ratings):

        def event(kind: Literal["impression", "click"], ts: int, at: int = position, of: Rating = rating) -> Feedback:
            return Feedback(f"{request_id}-{at}-{kind}", of.user_id, of.item_id, ts, kind, request_id, at)

        yield event("impression", rating.ts)
        if rating.value >= config.click_from:
            yield event("click", rating.ts + _CLICK_LAG_MS)
