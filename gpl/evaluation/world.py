"""A world to learn in and be judged on: an exposed log, and the truth on what was not exposed.

`build` makes it from a data set and a seed. Where the set has no log, the upstream is simulated (`upstream`), and named
so. Users are split once per data set, whatever the seed: hyperparameters are chosen on the validation users, results
are those of the test users. Both have their exposed log trained on; only the truth is kept apart.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from gpl.evaluation import upstream
from gpl.evaluation.dataset import Bools, DataError, Dataset, Floats, Ints, Kind, Ragged, Requests
from gpl.evaluation.upstream import UpstreamConfig

VALIDATION_SHARE = 0.25


@dataclass(frozen=True)
class World:
    """All indices are those of the data set. ``n`` items of dimension ``d``, U users, R requests.

    ``raw``, ``vectors`` (n, d): vectors of the frozen space, not centred and centred, unit rows; zero where an item has
    no content, and then it has no anchor score and no pseudo-labels. ``positives`` (U lists): what each user is known
    to like, oldest first; ``known`` (R,): how many of them came before the request, so anchors for a request are made
    of ``positives[u][:known]``, those for judging of all.

    ``held_out`` (H requests): exposures that nothing is trained on, for metrics on exposed items; their anchors are
    made of all positives. Judged is user u on ``relevant[u]`` among ``listed[u]``, or, where ``listed`` is None, among
    all items but ``seen[u]`` (exposed or taken before).
    """

    name: str
    kind: Kind
    seed: int
    item_ids: list[str]
    user_ids: list[str]
    raw: Floats
    vectors: Floats
    positives: Ragged
    log: Requests
    known: Ints
    held_out: Requests
    relevant: Ragged
    listed: Ragged | None
    seen: Ragged
    validation: Bools

    @property
    def n_items(self) -> int:
        return len(self.item_ids)

    @property
    def n_users(self) -> int:
        return len(self.user_ids)

    @cached_property
    def has_content(self) -> Bools:
        """(n,) whether the item has a vector."""
        return np.asarray(np.abs(self.vectors).sum(axis=1) > 0)

    @property
    def judged(self) -> Ints:
        """Users with truth, something irrelevant to rank it against, and positives to know them by."""
        both = self.relevant.sizes > 0
        if self.listed is not None:
            both &= self.listed.sizes > self.relevant.sizes
        return np.flatnonzero(both & (self.positives.sizes > 0))

    def candidates(self, user: int) -> Bools:
        """(n,) whether the user is judged on the item."""
        mask = np.full(self.n_items, self.listed is None)
        if self.listed is None:
            mask[self.seen[user]] = False
        else:
            mask[self.listed[user]] = True
        return mask

    @property
    def exposures(self) -> Ints:
        """(n,) how often each item was exposed in the log."""
        return np.bincount(self.log.exposed.values, minlength=self.n_items)

    @property
    def tail(self) -> Bools:
        """(n,) the less popular half: items exposed at most as often as the median item."""
        return self.exposures <= np.median(self.exposures)


def build(dataset: Dataset, raw: Floats, vectors: Floats, seed: int, config: UpstreamConfig | None = None) -> World:
    """The world of ``dataset`` under ``seed``; ``raw`` and ``vectors`` (n, d) are its items in the frozen space.

    Raises DataError where nobody would be judged.
    """
    config = config or UpstreamConfig()
    rng = np.random.default_rng([seed, *hashlib.sha256(dataset.name.encode()).digest()[:4]])
    if dataset.kind == "full":
        made = upstream.from_truth(dataset, vectors, config, rng)
    elif dataset.kind == "events":
        made = upstream.from_events(dataset, vectors, config, rng)
    else:
        made = upstream.from_log(dataset, vectors, config, rng)
    world = World(
        dataset.name,
        dataset.kind,
        seed,
        [item.item_id for item in dataset.items],
        dataset.users,
        raw,
        vectors,
        *made,
        validation=np.array([_share(dataset.name, user) < VALIDATION_SHARE for user in dataset.users]),
    )
    if not (~world.validation[world.judged]).any() or not world.validation[world.judged].any():
        raise DataError(f"{dataset.name}: {len(world.judged)} users have truth and a history, too few to judge on")
    return world


def _share(*parts: str) -> float:
    """A number in [0, 1) that depends on the names alone."""
    digest = hashlib.sha256("\0".join(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
