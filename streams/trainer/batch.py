"""A label record as rows of the pre-ranker's tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gpl.catalogue import Catalogue
from gpl.labels.matching import Ints
from gpl.preranker.batch import Example
from gpl.preranker.ids import GrowingIds
from streams.contracts import Exposed, Label, Unexposed
from streams.trainer.dedup import Fresh

_NOTHING = Unexposed([], [], [], [])


@dataclass(frozen=True)
class Prepared:
    """What of one label record is trained on. ``items``: ids, parallel to the example's rows, exposed ones first.

    ``skipped``: items left out because the catalogue has no vector of them.
    """

    label: Label
    first: bool
    items: list[str]
    example: Example
    skipped: int

    @property
    def exposed(self) -> int:
        """Number of exposed items."""
        return len(self.example.clicked)


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

    def forget(self) -> None:
        """Ids were let go of: look all up again."""
        self._generation = -1


def prepare(labels: Sequence[Label], fresh: Sequence[Fresh], rows: Rows) -> list[Prepared]:
    """Rows of what is new in each record; users and items not met before are added to the tables, all seen at its time.

    An item without a vector is left out, now and for good: its label counts as handled. A user without a trainable
    item gets no row. Done for all records at once, as numpy's calls cost more than what they do for one.
    """
    if not labels:
        return []
    exposed = [_fresh(label.exposed, new) for label, new in zip(labels, fresh, strict=True)]
    hidden = [label.unexposed if new.pseudo else _NOTHING for label, new in zip(labels, fresh, strict=True)]
    names = [name for pair in zip(exposed, hidden, strict=True) for part in pair for name in part.item]
    # None becomes NaN: no anchors, no score.
    score = np.array([s for pair in zip(exposed, hidden, strict=True) for part in pair for s in part.score], np.float32)
    clicked = np.array([click for part in exposed for click in part.clicked], np.float32)
    pseudo = np.array([value for part in hidden for value in part.label], np.float32)
    confidence = np.array([value for part in hidden for value in part.confidence], np.float32)

    shown = np.array([len(part.item) for part in exposed])
    sizes = shown + np.array([len(part.item) for part in hidden])
    record = np.repeat(np.arange(len(labels)), sizes)
    is_shown = np.arange(len(names)) - np.repeat(np.cumsum(sizes) - sizes, sizes) < shown[record]
    content_row = rows.content(names)
    known = content_row >= 0
    if not known.all():
        names = [names[i] for i in np.flatnonzero(known).tolist()]
        clicked, pseudo, confidence = clicked[known[is_shown]], pseudo[known[~is_shown]], confidence[known[~is_shown]]
        content_row, score, record, is_shown = content_row[known], score[known], record[known], is_shown[known]
    ts = np.array([label.ts for label in labels], np.int64)
    item_row = rows.items(names, content_row, ts[record])
    kept, kept_shown = (np.bincount(part, minlength=len(labels)) for part in (record, record[is_shown]))
    users = np.zeros(len(labels), np.int64)
    some = np.flatnonzero(kept)
    users[some] = rows.users([labels[i].user_id for i in some.tolist()], ts[some])

    made = []
    ends, shown_ends = np.cumsum(kept).tolist(), np.cumsum(kept_shown).tolist()
    start = shown_start = 0
    for i, label in enumerate(labels):
        end, shown_end = ends[i], shown_ends[i]
        hidden_start, hidden_end = start - shown_start, end - shown_end
        example = Example(
            user_row=int(users[i]),
            item_row=item_row[start:end],
            content_row=content_row[start:end],
            score=score[start:end],
            clicked=clicked[shown_start:shown_end],
            label=pseudo[hidden_start:hidden_end],
            confidence=confidence[hidden_start:hidden_end],
        )
        made.append(Prepared(label, fresh[i].first, names[start:end], example, int(sizes[i]) - (end - start)))
        start, shown_start = end, shown_end
    return made


def _fresh(exposed: Exposed, new: Fresh) -> Exposed:
    rows = new.exposed
    if len(rows) == len(exposed.item):
        return exposed
    return Exposed(
        [exposed.item[i] for i in rows], [exposed.clicked[i] for i in rows], [exposed.score[i] for i in rows]
    )
