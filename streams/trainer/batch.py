"""A label record as rows of the pre-ranker's tables."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gpl.catalogue import Catalogue
from gpl.preranker.batch import Example
from gpl.preranker.ids import IdTable
from streams.contracts import Label
from streams.trainer.dedup import Fresh


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


def prepare(label: Label, fresh: Fresh, users: IdTable, items: IdTable, catalogue: Catalogue) -> Prepared:
    """Rows of what is new in a record; users and items not met before are added to the tables.

    An item without a vector is left out, now and for good: its label counts as handled. A user without a trainable
    item gets no row.
    """
    shown = [label.exposed.item[i] for i in fresh.exposed]
    hidden = label.unexposed.item if fresh.pseudo else []
    content_row = catalogue.rows(shown + hidden)
    known = content_row >= 0
    kept_shown = np.flatnonzero(known[: len(shown)])
    kept_hidden = np.flatnonzero(known[len(shown) :])
    names = [shown[i] for i in kept_shown] + [hidden[i] for i in kept_hidden]

    exposed = np.array(fresh.exposed, np.int64)[kept_shown]
    clicked = np.array(label.exposed.clicked, np.float32)[exposed]
    shown_score = np.array([np.nan if s is None else s for s in label.exposed.score], np.float32)[exposed]
    hidden_score = np.array(label.unexposed.score, np.float32)[kept_hidden]
    return Prepared(
        label=label,
        first=fresh.first,
        items=names,
        example=Example(
            user_row=int(users.add([label.user_id])[0]) if names else 0,
            item_row=items.add(names),
            content_row=content_row[known],
            score=np.concatenate([shown_score, hidden_score]),
            clicked=clicked,
            label=np.array(label.unexposed.label, np.float32)[kept_hidden],
            confidence=np.array(label.unexposed.confidence, np.float32)[kept_hidden],
        ),
        skipped=int(np.count_nonzero(~known)),
    )
