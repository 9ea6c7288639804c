"""A data set in memory, whatever its source: items, and what is known of users' tastes.

Three kinds, by what they hold:

``full``: the relevance of every user and item is known and nothing was ever logged. The upstream is simulated.
``events``: each user's purchases in order. The log of impressions is simulated; the last purchases are the truth.
``log``: real requests with what was exposed and clicked, and the truth on pairs that were not exposed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from gpl.catalogue import ItemContent

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
Bools = npt.NDArray[np.bool_]
Kind = Literal["full", "events", "log"]


class DataError(ValueError):
    """A file of a data set cannot be used; the message names file, line or id, field and value."""


@dataclass(frozen=True)
class Ragged:
    """``len(offsets) - 1`` lists of different length in one array: list i is ``values[offsets[i]:offsets[i + 1]]``."""

    offsets: Ints
    values: Ints

    @classmethod
    def of(cls, lists: Iterable[Sequence[int] | Ints]) -> Ragged:
        rows = [np.asarray(row, dtype=np.int64) for row in lists]
        offsets = np.zeros(len(rows) + 1, dtype=np.int64)
        np.cumsum([len(row) for row in rows], out=offsets[1:])
        return cls(offsets, np.concatenate(rows) if rows else np.zeros(0, dtype=np.int64))

    @classmethod
    def group(cls, keys: Ints, values: Ints, count: int) -> Ragged:
        """``values`` (n,) by ``keys`` (n,) in 0..count-1, order within a key preserved."""
        offsets = np.zeros(count + 1, dtype=np.int64)
        np.cumsum(np.bincount(keys, minlength=count), out=offsets[1:])
        return cls(offsets, values[np.argsort(keys, kind="stable")])

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> Ints:
        return self.values[self.offsets[row] : self.offsets[row + 1]]

    @property
    def sizes(self) -> Ints:
        return np.diff(self.offsets)

    @property
    def rows(self) -> Ints:
        """The list that each value belongs to, parallel to ``values``."""
        return np.repeat(np.arange(len(self)), self.sizes)


@dataclass(frozen=True)
class Truth:
    """Relevance of pairs, each once: ``user``, ``item``, ``relevance`` (T,); more than 0 is relevant.

    ``every_cell``: a pair that is not listed is known to be irrelevant (so all pairs are known).
    """

    user: Ints
    item: Ints
    relevance: Floats
    every_cell: bool


@dataclass(frozen=True)
class Events:
    """What users took, one row an event, each user's oldest first; ``session`` (E,) numbers what came together."""

    user: Ints
    item: Ints
    session: Ints


@dataclass(frozen=True)
class Requests:
    """R requests, each user's oldest first. ``user`` (R,).

    ``exposed``: the items shown, with ``clicked`` parallel to its values. ``recalled``: candidates that were not shown.
    """

    user: Ints
    exposed: Ragged
    clicked: Bools
    recalled: Ragged

    def __len__(self) -> int:
        return len(self.user)

    def take(self, rows: Ints) -> Requests:
        """These requests, in this order."""
        at = np.concatenate(
            [np.arange(self.exposed.offsets[r], self.exposed.offsets[r + 1]) for r in rows] or [rows]
        ).astype(np.int64)
        return Requests(
            self.user[rows],
            Ragged.of(self.exposed[r] for r in rows),
            self.clicked[at],
            Ragged.of(self.recalled[r] for r in rows),
        )


@dataclass(frozen=True)
class Dataset:
    """``items`` and ``users`` are what the indices of all other parts point into.

    ``popularity`` (n_items,): counts that the simulated policy goes by, where the source has them.
    ``events`` beside ``log``: what users took before the log began.
    """

    name: str
    items: list[ItemContent]
    users: list[str]
    truth: Truth | None = None
    events: Events | None = None
    log: Requests | None = None
    popularity: Floats | None = None

    def __post_init__(self) -> None:
        if not self.items or not self.users:
            raise DataError(f"{self.name}: {len(self.items)} items and {len(self.users)} users, expected some of both")
        if self.truth is None and self.events is None:
            raise DataError(f"{self.name}: neither truth nor events, nothing could be judged")
        if self.log is None and self.truth is not None and self.events is not None:
            raise DataError(
                f"{self.name}: events and a truth, but no log; of events alone the last session is the truth, and a "
                "truth beside them is of what a log (recalls.jsonl, feedback.jsonl) did not expose"
            )
        if self.log is not None and self.truth is None:
            raise DataError(f"{self.name}: a log without truth on what was not exposed cannot be judged (--truth FILE)")

    @property
    def kind(self) -> Kind:
        if self.log is not None:
            return "log"
        return "full" if self.events is None else "events"

    def describe(self) -> str:
        """One line for people."""
        parts = [f"{len(self.users):,} users", f"{len(self.items):,} items"]
        if self.events is not None:
            parts.append(f"{len(self.events.user):,} events")
        if self.log is not None:
            parts.append(f"{len(self.log):,} requests, {len(self.log.exposed.values):,} impressions")
        if self.truth is not None:
            known = "every pair known" if self.truth.every_cell else f"{len(self.truth.user):,} pairs known"
            parts.append(f"{known}, {int((self.truth.relevance > 0).sum()):,} relevant")
        return f"{self.name} ({self.kind}): " + ", ".join(parts)
