"""A model in service: one published version, with its item side laid out along the rows of the catalogue."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor

from gpl.arrays import grown
from gpl.catalogue import Catalogue
from gpl.labels.matching import Floats, Ints
from gpl.preranker.ids import IdTable
from gpl.preranker.model import PreRanker
from streams import models
from streams.frame import Frame


class Served:
    """Everything that a score needs of one version. A request that holds it cannot meet another version.

    ``item_side`` follows the catalogue's rows, so a candidate is looked up once, and its tower is a row to gather.
    Whoever changes the catalogue calls ``put`` for the changed item. Not thread-safe.
    """

    def __init__(
        self,
        version: str,
        published_at: int,
        weights: Mapping[str, Tensor],
        ids: models.Ids,
        frame: Frame,
        catalogue: Catalogue,
    ) -> None:
        """Raises ValueError saying what of ``weights`` and ``ids`` does not fit."""
        self.version = version
        self.published_at = published_at
        self._network = PreRanker.of_state(weights, frame.dim)
        self._users, self._items = IdTable.from_list(ids.users), IdTable.from_list(ids.items)
        if (len(self._users) + 1, len(self._items) + 1) != (self._network.n_users, self._network.n_items):
            raise ValueError(
                f"ids: {len(self._users)} users and {len(self._items)} items for tables of {self._network.n_users} and "
                f"{self._network.n_items} rows"
            )
        self._side = self._lay_out(catalogue)

    @classmethod
    def of(cls, published: models.Published, frame: Frame, catalogue: Catalogue) -> Served:
        """Lay a model out. Raises ModelError or ValueError saying what does not fit."""
        manifest = published.manifest
        space = (manifest.encoder, manifest.quantiser)
        if space != frame.space:
            raise models.ModelError(f"encoder, quantiser: {space}, this scorer serves another space")
        return cls(manifest.version, manifest.published_at, published.weights, published.ids, frame, catalogue)

    def put(self, item_id: str, row: int, vector: Floats) -> None:
        """The catalogue has put an item (dim,) into a row: from now on it scores from this content."""
        self._side = grown(self._side, row + 1)
        self._side[row] = self._network.item_side(self._items.rows([item_id]), vector[None])[0]

    def knows(self, user_id: str) -> bool:
        """Whether the model has a row of this user; another is scored as the default user."""
        return user_id in self._users

    def towers(self, user_id: str, history: Sequence[str], rows: Ints) -> Floats:
        """What the towers say (n,) of the items in catalogue rows (n,); ``history``: items that the user had liked,
        of which those count that the model was trained on."""
        liked = self._items.rows(history)
        user = self._network.user_side(self._users.row(user_id), liked[liked > 0])
        towers: Floats = self._side.take(rows, axis=0, mode="clip") @ user
        return towers

    def logits(self, towers: Floats, anchor_score: Floats | None) -> Floats:
        """Logits (n,) from ``towers`` and the raw anchor scores (n,), None for a user without anchors."""
        return self._network.combine(towers, anchor_score)

    def _lay_out(self, catalogue: Catalogue) -> Floats:
        ids, vectors = catalogue.ids(), catalogue.vectors
        rows = catalogue.rows(ids)
        item_row = np.zeros(len(vectors), np.int64)
        item_row[rows] = self._items.rows(ids)
        return self._network.item_side(item_row, vectors)
