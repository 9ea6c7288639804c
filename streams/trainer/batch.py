"""A label record as rows of the pre-ranker's tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np

from gpl.catalogue import Catalogue
from gpl.labels.matching import Floats, Ints
from gpl.preranker.batch import Batch
from gpl.preranker.ids import GrowingIds
from streams.trainer.columns import Columns


@dataclass(frozen=True, slots=True)
class Request:
    """A request of a batch, for what is told of it. ``items``, ``score`` (n,): what is trained on, exposed ones first.

    ``history``: what its user liked. ``source``: as of ``Columns``. ``first``: no earlier revision of it was trained
    on. ``rank``: whose share of the work it is.
    """

    request_id: str
    user_id: str
    ts: int
    first: bool
    history: list[str]
    source: str
    items: list[str]
    score: Floats
    rank: int


@dataclass(frozen=True)
class Prepared:
    """What of label records is trained on. ``requests``: those with a trainable item, parallel to the batch's; both
    are empty when there is none. ``skipped``: items left out because the catalogue has no vector of them."""

    requests: list[Request]
    batch: Batch | None
    skipped: int


class Rows:
    """Rows of users and items, with one look-up by name for an item's vector and its row in the id table.

    The row in the id table is remembered by the row in the catalogue, until the catalogue changes or ``forget``.
    """

    def __init__(self, users: GrowingIds, items: GrowingIds, catalogue: Catalogue) -> None:
        self._users = users
        self._items = items
        self._catalogue = catalogue
        self._generation = -1
        self._by_content: Ints = np.zeros(0, np.int64)

    def content(self, names: Sequence[str]) -> Ints:
        """Rows (n,) in the catalogue, -1 where it has no vector."""
        return self._catalogue.rows(names)

    def users(self, names: Sequence[str], at: Ints) -> Ints:
        """Rows (n,) of users seen at times ``at`` (n,); new ones are added."""
        return self._users.add(names, at)

    def items(self, names: Sequence[str], content_row: Ints, at: Ints) -> Ints:
        """Rows (n,) of items with these catalogue rows (n,), seen at times ``at`` (n,); new ones are added."""
        if self._generation != self._catalogue.generation:
            self._generation = self._catalogue.generation
            self._by_content = np.zeros(len(self._catalogue.vectors), np.int64)
        rows = self._by_content[content_row]
        unknown = np.flatnonzero(rows == 0)
        if len(unknown):
            rows[unknown] = self._items.add([names[i] for i in unknown.tolist()], at[unknown])
            self._by_content[content_row] = rows
        self._items.touch(rows, at)
        return rows

    def history(self, names: Sequence[str]) -> Ints:
        """Rows (h,) of items, 0 of those that are not in the table; a history adds none and keeps none alive."""
        return self._items.rows(names)

    def forget(self) -> None:
        """Ids were let go of: look all up again."""
        self._generation = -1


def prepare(labels: Sequence[Columns], first: Sequence[bool], rows: Rows) -> Prepared:
    """Label records as a batch; users and items not met before are added to the tables, all seen at its time.

    ``labels``: what is new in each record; ``first``: whether its request is. An item without a vector is left out,
    now and for good: its label counts as handled. A user without a trainable item gets no row.
    """
    names = list(chain.from_iterable(label.items for label in labels))
    if not names:
        return Prepared([], None, 0)
    score, clicked, label_, confidence = (
        np.concatenate([getattr(label, name) for label in labels])
        for name in ("score", "clicked", "label", "confidence")
    )
    sizes, shown = np.array([len(label.items) for label in labels]), np.array([label.shown for label in labels])
    record = np.repeat(np.arange(len(labels)), sizes)
    is_shown = np.arange(len(names)) - np.repeat(np.cumsum(sizes) - sizes, sizes) < shown[record]
    content_row = rows.content(names)
    known = content_row >= 0
    skipped = len(names) - int(np.count_nonzero(known))
    if skipped:
        names = [names[i] for i in np.flatnonzero(known).tolist()]
        clicked, label_, confidence = clicked[known[is_shown]], label_[known[~is_shown]], confidence[known[~is_shown]]
        content_row, score, record, is_shown = content_row[known], score[known], record[known], is_shown[known]
    if not names:
        return Prepared([], None, skipped)
    ts = np.array([label.ts for label in labels], np.int64)
    item_row = rows.items(names, content_row, ts[record])
    kept = np.bincount(record, minlength=len(labels))
    some = np.flatnonzero(kept)
    users = rows.users([labels[i].user_id for i in some.tolist()], ts[some])
    histories = [labels[i].history for i in some.tolist()]
    liked = rows.history(list(chain.from_iterable(histories)))
    in_table = liked > 0
    batch = Batch.of(
        user_row=users,
        history=liked[in_table],
        history_request=np.repeat(np.arange(len(some)), [len(history) for history in histories])[in_table],
        item_row=item_row,
        content_row=content_row,
        request=(np.cumsum(kept > 0) - 1)[record],
        exposed=is_shown,
        score=score,
        clicked=clicked,
        label=label_,
        confidence=confidence,
    )
    requests = []
    end = 0
    for i in some.tolist():
        label, start, end = labels[i], end, end + int(kept[i])
        own = label.items if len(label.items) == end - start else names[start:end]
        requests.append(
            Request(
                label.request_id,
                label.user_id,
                label.ts,
                first[i],
                label.history,
                label.source,
                own,
                score[start:end],
                label.rank,
            )
        )
    return Prepared(requests, batch, skipped)
