"""A label record as rows of the pre-ranker's tables."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gpl.catalogue import Catalogue
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


def prepare(label: Label, fresh: Fresh, users: GrowingIds, items: GrowingIds, catalogue: Catalogue) -> Prepared:
    """Rows of what is new in a record; users and items not met before are added to the tables, all seen at its time.

    An item without a vector is left out, now and for good: its label counts as handled. A user without a trainable
    item gets no row.
    """
    exposed = label.exposed
    if len(fresh.exposed) < len(exposed.item):
        rows = fresh.exposed
        exposed = Exposed(
            [exposed.item[i] for i in rows], [exposed.clicked[i] for i in rows], [exposed.score[i] for i in rows]
        )
    hidden = label.unexposed if fresh.pseudo else _NOTHING
    names = exposed.item + hidden.item
    clicked = np.array(exposed.clicked, np.float32)
    # None becomes NaN: no anchors, no score.
    score = np.array([*exposed.score, *hidden.score], np.float32)
    pseudo, confidence = np.array(hidden.label, np.float32), np.array(hidden.confidence, np.float32)
    content_row = catalogue.rows(names)
    known = content_row >= 0
    skipped = len(names) - int(np.count_nonzero(known))
    if skipped:
        names = [names[i] for i in np.flatnonzero(known).tolist()]
        first_hidden = len(exposed.item)
        content_row, score, clicked = content_row[known], score[known], clicked[known[:first_hidden]]
        pseudo, confidence = pseudo[known[first_hidden:]], confidence[known[first_hidden:]]
    return Prepared(
        label=label,
        first=fresh.first,
        items=names,
        example=Example(
            user_row=int(users.add([label.user_id], label.ts)[0]) if names else 0,
            item_row=items.add(names, label.ts),
            content_row=content_row,
            score=score,
            clicked=clicked,
            label=pseudo,
            confidence=confidence,
        ),
        skipped=skipped,
    )
