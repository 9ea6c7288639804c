"""A log as flat pairs (request, item), and mini-batches of it for the pre-ranker."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from gpl.evaluation.dataset import Bools, Floats, Ints, Requests
from gpl.preranker.batch import Batch


@dataclass(frozen=True)
class Pairs:
    """P pairs of R requests; a request's pairs are contiguous, its exposed ones first.

    ``user``, ``shown`` (R,): the user, and how many items were exposed. ``offsets`` (R + 1,). ``item``, ``exposed``,
    ``clicked`` (P,); clicks are 0 where not exposed.
    """

    user: Ints
    shown: Ints
    offsets: Ints
    item: Ints
    exposed: Bools
    clicked: Floats

    @classmethod
    def of(cls, log: Requests) -> Pairs:
        shown, hidden = log.exposed.sizes, log.recalled.sizes
        sizes = shown + hidden
        offsets = np.zeros(len(sizes) + 1, dtype=np.int64)
        np.cumsum(sizes, out=offsets[1:])
        position = np.arange(offsets[-1]) - np.repeat(offsets[:-1], sizes)
        exposed = position < np.repeat(shown, sizes)
        item = np.empty(len(exposed), dtype=np.int64)
        item[exposed], item[~exposed] = log.exposed.values, log.recalled.values
        clicked = np.zeros(len(exposed), dtype=np.float32)
        clicked[exposed] = log.clicked
        return cls(log.user, shown, offsets, item, exposed, clicked)

    def __len__(self) -> int:
        return len(self.user)

    @property
    def request(self) -> Ints:
        """(P,) each pair's request."""
        return np.repeat(np.arange(len(self)), np.diff(self.offsets))

    def keep(self, mask: Bools) -> Pairs:
        """The pairs where ``mask`` (P,) is true; requests stay, some perhaps with none."""
        request = self.request[mask]
        offsets = np.zeros(len(self) + 1, dtype=np.int64)
        np.cumsum(np.bincount(request, minlength=len(self)), out=offsets[1:])
        shown = np.bincount(request[self.exposed[mask]], minlength=len(self))
        return Pairs(self.user, shown, offsets, self.item[mask], self.exposed[mask], self.clicked[mask])

    def of_requests(self, requests: Ints, hidden: int | None, rng: np.random.Generator) -> tuple[Ints, Ints]:
        """Positions of these requests' pairs, request by request, and which of the requests each belongs to.

        At most ``hidden`` of the unexposed ones of each, drawn at random; all where None.
        """
        sizes = (self.offsets[1:] - self.offsets[:-1])[requests]
        owner = np.repeat(np.arange(len(requests)), sizes)
        place = np.arange(len(owner)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        position = self.offsets[requests][owner] + place
        if hidden is None:
            return position, owner
        most = self.shown[requests] + hidden
        if (sizes <= most).all():
            return position, owner
        # A request's pairs in random order, exposed ones first: those up to its most are kept.
        lot = np.where(self.exposed[position], -1.0, rng.random(len(position)))
        rank = np.empty_like(place)
        rank[np.lexsort((lot, owner))] = place
        keep = rank < most[owner]
        return position[keep], owner[keep]


@dataclass(frozen=True)
class Columns:
    """What a method trains on, parallel to the pairs: see `gpl.preranker.batch.Batch`."""

    score: Floats
    label: Floats
    confidence: Floats


def batches(
    pairs: Pairs,
    columns: Columns,
    histories: Sequence[Ints],
    content: Ints,
    size: int,
    hidden: int | None,
    rng: np.random.Generator,
) -> Iterator[tuple[Batch, Ints]]:
    """One epoch in random order: batches of ``size`` requests, each with the positions of its pairs.

    Rows of the id tables are index + 1. ``histories``: items (h,) that each request's user had liked. ``content`` (n,):
    row of each item's content, -1 where it has none.
    """
    order = rng.permutation(len(pairs))
    for start in range(0, len(order), size):
        requests = order[start : start + size]
        at, owner = pairs.of_requests(requests, hidden, rng)
        if len(at) == 0:
            continue
        items, item = np.unique(pairs.item[at], return_inverse=True)
        exposed = pairs.exposed[at]
        yield (
            Batch(
                user_row=pairs.user[requests] + 1,
                history=np.concatenate([histories[request] for request in requests.tolist()]) + 1,
                history_request=np.repeat(np.arange(len(requests)), [len(histories[r]) for r in requests.tolist()]),
                item_row=items + 1,
                content_row=content[items],
                request=owner,
                item=item,
                score=columns.score[at],
                exposed=exposed,
                clicked=pairs.clicked[at],
                label=np.where(exposed, np.float32(0), columns.label[at]),
                confidence=np.where(exposed, np.float32(0), columns.confidence[at]),
            ),
            at,
        )
