"""The upstream of a site: recall, and a policy that exposes what is popular. Simulated, from truth or from purchases.

Recall returns popular items, items near in content to what the user liked last, and random ones. The policy exposes
recalled items in proportion to popularity + 1. Feedback is revealed for exposed items only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from gpl.evaluation.dataset import Bools, DataError, Dataset, Events, Floats, Ints, Ragged, Requests, Truth

Generator = np.random.Generator


@dataclass(frozen=True)
class UpstreamConfig:
    """``pages`` requests a user (full truth), ``exposed`` items each; ``recalled``: candidates that are not exposed."""

    pages: int = 8
    exposed: int = 10
    recalled: int = 60
    popularity_power: float = 1.0
    """Items are exposed in proportion to popularity + 1 to this power."""
    log_requests: int = 6
    """Newest requests of a user that are logged (purchases in order); what came before is history."""
    clicks: int = 4
    """Most clicks of one request (purchases in order): a larger basket is several requests."""
    near: int = 5
    """Newest positives whose neighbours recall returns."""


class Made(NamedTuple):
    """What an upstream made, as `World` has it."""

    positives: Ragged
    log: Requests
    known: Ints
    held_out: Requests
    relevant: Ragged
    listed: Ragged | None
    seen: Ragged


class _Recorder:
    """Requests as they are made."""

    def __init__(self) -> None:
        self.user: list[int] = []
        self.shown: list[Ints] = []
        self.clicked: list[Bools] = []
        self.recalled: list[Ints] = []
        self.known: list[int] = []

    def add(self, user: int, shown: Ints, clicked: Bools, recalled: Ints, known: int) -> None:
        self.user.append(user)
        self.shown.append(shown)
        self.clicked.append(clicked)
        self.recalled.append(recalled)
        self.known.append(known)

    def requests(self) -> Requests:
        clicked = np.concatenate(self.clicked) if self.clicked else np.zeros(0, dtype=bool)
        return Requests(np.array(self.user, dtype=np.int64), Ragged.of(self.shown), clicked, Ragged.of(self.recalled))


class Recall:
    """Draws candidates: a third popular, a third near in content, the rest random."""

    def __init__(self, vectors: Floats, popularity: Floats, config: UpstreamConfig) -> None:
        self._config = config
        self.n_items = len(vectors)
        self._weight = (popularity.astype(np.float64) + 1.0) ** config.popularity_power
        self._cumulative = np.cumsum(self._weight)
        self._neighbours = neighbours(vectors, max(config.recalled // 3, 1))

    def draw(self, count: int, allowed: Bools, rng: Generator) -> Ints:
        """At most ``count`` distinct items among ``allowed`` (n,), one after the other in proportion to popularity."""
        # Drawing with replacement and passing over what was drawn or is not allowed is the same distribution, and
        # quick while most items are allowed.
        drawn = np.searchsorted(self._cumulative, rng.random(4 * count) * self._cumulative[-1], side="right")
        drawn = drawn[allowed[drawn]]
        _, first = np.unique(drawn, return_index=True)
        if len(first) >= count:
            kept: Ints = drawn[np.sort(first)[:count]].astype(np.int64)
            return kept
        # Few are allowed: the same distribution by the Gumbel trick.
        with np.errstate(divide="ignore"):
            keys = np.where(allowed, np.log(self._weight) + rng.gumbel(size=len(allowed)), -np.inf)
        return _top(keys, count)

    def candidates(self, count: int, allowed: Bools, liked: Ints, rng: Generator) -> Ints:
        """At most ``count`` distinct items among ``allowed`` (n,) for a user who ``liked`` these, oldest first."""
        third, free = count // 3, allowed.copy()
        found = [self.draw(third, free, rng)]
        free[found[0]] = False
        if len(liked):
            near = self._neighbours[liked[-self._config.near :]].ravel()
            near = np.unique(near[free[near]])
            found.append(rng.permutation(near)[:third])
            free[found[1]] = False
        rest = np.flatnonzero(free)
        missing = min(count - sum(map(len, found)), len(rest))
        found.append(rng.choice(rest, missing, replace=False))
        return np.concatenate(found)


def from_truth(dataset: Dataset, vectors: Floats, config: UpstreamConfig, rng: Generator) -> Made:
    """A log of ``pages`` requests a user, one after the other, and one more that is held out.

    Popularity is the data set's own, or else the number of users to whom an item is relevant. At most two fifths of
    what is known of a user is exposed. Where the truth lists relevant pairs alone, the others are irrelevant.

    Raises DataError where of nobody enough is known for one request.
    """
    truth = dataset.truth
    assert truth is not None
    n_users, n_items = len(dataset.users), len(dataset.items)
    relevant, known_cell = np.zeros((2, n_users, n_items), dtype=bool)
    relevant[truth.user, truth.item] = truth.relevance > 0
    known_cell[truth.user, truth.item] = True
    every_cell = truth.every_cell or bool((truth.relevance > 0).all())
    if every_cell:
        known_cell[:] = True
    popularity = dataset.popularity if dataset.popularity is not None else relevant.sum(axis=0).astype(np.float32)
    recall = Recall(vectors, popularity, config)
    log, held_out = _Recorder(), _Recorder()
    positives: list[list[int]] = []
    exposed = np.zeros((n_users, n_items), dtype=bool)
    for user in range(n_users):
        liked: list[int] = []
        budget = 2 * int(known_cell[user].sum()) // 5
        pages = min(config.pages, budget // config.exposed)
        for page in range(pages + 1):
            allowed = known_cell[user] & ~exposed[user]
            past = np.array(liked, dtype=np.int64)
            candidates = recall.candidates(config.exposed + config.recalled, allowed, past, rng)
            offered = np.zeros(n_items, dtype=bool)
            offered[candidates] = True
            shown = recall.draw(config.exposed, offered, rng)
            clicked = relevant[user, shown]
            kept = np.setdiff1d(candidates, shown)
            if page == pages:
                held_out.add(user, shown, clicked, kept, len(liked))
                break
            log.add(user, shown, clicked, kept, len(liked))
            exposed[user, shown] = True
            liked += shown[clicked].tolist()
        positives.append(liked)
    if not log.user:
        raise DataError(
            f"{dataset.name}: of no user {-(-5 * config.exposed // 2)} pairs are known, as a simulated request needs"
        )
    unseen = known_cell & ~exposed
    return Made(
        Ragged.of(positives),
        log.requests(),
        np.array(log.known, dtype=np.int64),
        held_out.requests(),
        Ragged.of(np.flatnonzero(row) for row in relevant & unseen),
        None if every_cell else Ragged.of(np.flatnonzero(row) for row in unseen),
        Ragged.of(np.flatnonzero(row) for row in exposed),
    )


def from_events(dataset: Dataset, vectors: Floats, config: UpstreamConfig, rng: Generator) -> Made:
    """A log around purchases: each is a click of a request whose other impressions the policy drew.

    A user's last session is held out: what is new in it is the truth, and a request around it is the held-out exposure.
    Repeated purchases count once. Popularity is the number of purchases before the held-out sessions.

    Recall leaves out what the user took before the request and nothing else: if it also left out what is taken later,
    the held-out items too, then to have been offered would tell what is not relevant.
    """
    events = dataset.events
    assert events is not None
    n_users, n_items = len(dataset.users), len(dataset.items)
    sessions = _sessions(events, n_users)
    pasts = [mine[:-1] if len(mine) > 1 else mine for mine in sessions]
    before = [item for past in pasts for session in past for item in session]
    recall = Recall(
        vectors, np.bincount(np.array(before, dtype=np.int64), minlength=n_items).astype(np.float32), config
    )
    log, held_out = _Recorder(), _Recorder()
    positives, relevant = [], []
    for user, (mine, past) in enumerate(zip(sessions, pasts, strict=True)):
        # With one session there is no history to know the user by: it is all log, and the user is not judged.
        last = mine[-1] if len(mine) > 1 else []
        liked = [item for session in past for item in session]
        taken = np.array([*liked, *last], dtype=np.int64)
        cuts = [session[at : at + config.clicks] for session in past for at in range(0, len(session), config.clicks)]
        starts = np.cumsum([0, *map(len, cuts)]).tolist()
        for clicks, start in list(zip(cuts, starts, strict=False))[-config.log_requests :]:
            _around(log, user, taken, start, start + len(clicks), recall, config, rng)
        positives.append(liked)
        relevant.append(last)
        if last:
            end = min(len(taken), len(liked) + config.clicks)
            _around(held_out, user, taken, len(liked), end, recall, config, rng)
    requests = log.requests()
    shown = Ragged.group(requests.user[requests.exposed.rows], requests.exposed.values, n_users)
    return Made(
        Ragged.of(positives),
        requests,
        np.array(log.known, dtype=np.int64),
        held_out.requests(),
        Ragged.of(relevant),
        None,
        Ragged.of(np.union1d(shown[user], positives[user]).astype(np.int64) for user in range(n_users)),
    )


def from_log(dataset: Dataset, vectors: Floats, config: UpstreamConfig, rng: Generator) -> Made:
    """A real log. Requests without recalled candidates get simulated ones.

    The last request of each user with truth and at least three requests is held out.

    Where the truth lists irrelevant pairs, candidates are the listed pairs, otherwise all items; what was seen is no
    candidate, whatever the truth says.
    """
    log, truth = dataset.log, dataset.truth
    assert log is not None and truth is not None
    n_users, n_items = len(dataset.users), len(dataset.items)
    before = dataset.events or Events(*np.zeros((3, 0), dtype=np.int64))
    history = Ragged.group(before.user, before.item, n_users)
    with_truth = np.bincount(truth.user, minlength=n_users) > 0
    by_user = Ragged.group(log.user, np.arange(len(log)), n_users)
    last = {int(by_user[u][-1]) for u in range(n_users) if with_truth[u] and len(by_user[u]) >= 3}
    kept = np.array([r for r in range(len(log)) if r not in last], dtype=np.int64)
    shown_by = Ragged.group(log.user[log.exposed.rows], log.exposed.values, n_users)
    popularity = np.bincount(np.concatenate([log.exposed.values, before.item]), minlength=n_items)
    recall = Recall(vectors, popularity.astype(np.float32), config)
    liked: list[list[int]] = [list(dict.fromkeys(history[u].tolist())) for u in range(n_users)]
    known = np.zeros(len(log), dtype=np.int64)
    recalled = []
    for r in range(len(log)):
        user = int(log.user[r])
        known[r] = len(liked[user])
        given = log.recalled[r]
        if len(given) == 0:
            allowed = np.ones(n_items, dtype=bool)
            allowed[shown_by[user]] = False
            allowed[liked[user]] = False
            given = recall.candidates(config.recalled, allowed, np.array(liked[user], dtype=np.int64), rng)
        recalled.append(given)
        if r not in last:
            exposed = log.exposed[r]
            clicked = log.clicked[log.exposed.offsets[r] : log.exposed.offsets[r + 1]]
            liked[user] += [item for item in exposed[clicked].tolist() if item not in liked[user]]
    whole = Requests(log.user, log.exposed, log.clicked, Ragged.of(recalled))
    relevant, listed = _judged(truth, n_users)
    seen = [np.union1d(shown_by[user], liked[user]).astype(np.int64) for user in range(n_users)]
    relevant = Ragged.of(np.setdiff1d(relevant[user], seen[user]) for user in range(n_users))
    if listed is not None:
        listed = Ragged.of(np.setdiff1d(listed[user], seen[user]) for user in range(n_users))
    return Made(
        Ragged.of(liked),
        whole.take(kept),
        known[kept],
        whole.take(np.array(sorted(last), dtype=np.int64)),
        relevant,
        listed,
        Ragged.of(seen),
    )


def neighbours(vectors: Floats, count: int) -> Ints:
    """(n, count) the nearest other items by cosine; ``vectors`` (n, d) unit rows."""
    count = min(count, len(vectors) - 1)
    found = np.empty((len(vectors), max(count, 0)), dtype=np.int64)
    for start in range(0, len(vectors), 1024):
        near = vectors[start : start + 1024] @ vectors.T
        near[np.arange(len(near)), np.arange(start, start + len(near))] = -np.inf
        if count > 0:
            found[start : start + 1024] = np.argpartition(-near, count - 1, axis=1)[:, :count]
    return found


def _around(
    recorder: _Recorder,
    user: int,
    taken: Ints,
    start: int,
    end: int,
    recall: Recall,
    config: UpstreamConfig,
    rng: Generator,
) -> None:
    """A request whose clicks are the purchases ``taken[start:end]``; ``taken``: all that the user ever takes, in order.

    The other impressions are drawn from what was recalled. What is taken later is passed over: the events do not say
    that it would have been left when shown now.
    """
    clicks = taken[start:end]
    free = np.ones(recall.n_items, dtype=bool)
    free[taken[:end]] = False
    others = max(config.exposed - len(clicks), 0)
    candidates = recall.candidates(others + config.recalled, free, taken[:start], rng)
    offered = np.zeros_like(free)
    offered[candidates] = True
    offered[taken[end:]] = False
    shown = recall.draw(others, offered, rng)
    items = np.concatenate([clicks, shown])
    recorder.add(user, items, np.arange(len(items)) < len(clicks), np.setdiff1d(candidates, shown), start)


def _sessions(events: Events, n_users: int) -> list[list[list[int]]]:
    """Each user's sessions, oldest first, of what was not taken before; sessions without anything new are left out."""
    by_user = Ragged.group(events.user, np.arange(len(events.user)), n_users)
    result = []
    for user in range(n_users):
        taken: set[int] = set()
        mine: dict[int, list[int]] = {}
        for at in by_user[user].tolist():
            item = int(events.item[at])
            if item not in taken:
                taken.add(item)
                mine.setdefault(int(events.session[at]), []).append(item)
        result.append(list(mine.values()))
    return result


def _judged(truth: Truth, n_users: int) -> tuple[Ragged, Ragged | None]:
    good = truth.relevance > 0
    relevant = Ragged.group(truth.user[good], truth.item[good], n_users)
    every_listed = truth.every_cell or bool(good.all())
    return relevant, None if every_listed else Ragged.group(truth.user, truth.item, n_users)


def _top(values: Floats, count: int) -> Ints:
    """Positions of the ``count`` largest values that are finite, largest first."""
    count = min(count, int(np.isfinite(values).sum()))
    if count == 0:
        return np.zeros(0, dtype=np.int64)
    best = np.argpartition(-values, count - 1)[:count]
    return best[np.argsort(-values[best], kind="stable")]
