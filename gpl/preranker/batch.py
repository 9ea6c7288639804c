"""A mini-batch of label records as flat arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from gpl.labels.matching import Floats, Ints


@dataclass(frozen=True)
class Example:
    """One label record as rows: its exposed items first, then its pseudo-labelled unexposed ones, n in all.

    ``item_row`` and ``content_row`` (n,): rows of the id table and of the content matrix (-1: no content).
    ``score`` (n,): raw anchor score, NaN where there is none. ``clicked`` (m,): 0 or 1 of the m exposed items.
    ``label``, ``confidence`` (n - m,): of the unexposed. ``history`` (h,): rows of the id table, of what the user had
    liked before.
    """

    user_row: int
    item_row: Ints
    content_row: Ints
    score: Floats
    clicked: Floats
    label: Floats
    confidence: Floats
    history: Ints = field(default_factory=lambda: np.zeros(0, np.int64))

    def __post_init__(self) -> None:
        n = len(self.item_row)
        unexposed = n - len(self.clicked)
        for name, expected in (
            ("content_row", n),
            ("score", n),
            ("label", unexposed),
            ("confidence", unexposed),
        ):
            if len(getattr(self, name)) != expected:
                raise ValueError(f"{name}: {len(getattr(self, name))} entries, expected {expected}")
        if np.isnan(self.score[len(self.clicked) :]).any():
            raise ValueError("score: nan for an unexposed item, which is pseudo-labelled by its score")


@dataclass(frozen=True)
class Batch:
    """R requests with P pairs (request, item) over I distinct items. Pairs of a request are contiguous.

    Users (R,) and items (I,) are kept once, so that each tower runs once per user and item.
    """

    user_row: Ints  # (R,)
    history: Ints  # (H,), rows of the items that users liked before, request by request
    history_request: Ints  # (H,), ascending, index into user_row
    item_row: Ints  # (I,)
    content_row: Ints  # (I,), -1 where there is none
    request: Ints  # (P,), index into user_row
    item: Ints  # (P,), index into item_row
    score: Floats  # (P,), raw anchor score, NaN where there is none
    exposed: npt.NDArray[np.bool_]  # (P,)
    clicked: Floats  # (P,), 0 where unexposed
    label: Floats  # (P,), 0 where exposed
    confidence: Floats  # (P,), 0 where exposed

    @classmethod
    def collate(cls, examples: Sequence[Example]) -> Batch:
        """Raises ValueError for no examples."""
        if not examples:
            raise ValueError("examples: none, expected at least one")
        sizes = np.array([len(e.item_row) for e in examples])
        shown = np.array([len(e.clicked) for e in examples])
        request = np.repeat(np.arange(len(examples)), sizes)
        position = np.arange(len(request)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        return cls.of(
            user_row=np.array([e.user_row for e in examples], dtype=np.int64),
            history=np.concatenate([e.history for e in examples]).astype(np.int64),
            history_request=np.repeat(np.arange(len(examples)), [len(e.history) for e in examples]),
            item_row=np.concatenate([e.item_row for e in examples]).astype(np.int64),
            content_row=np.concatenate([e.content_row for e in examples]).astype(np.int64),
            request=request,
            exposed=position < shown[request],
            score=np.concatenate([e.score for e in examples]).astype(np.float32),
            clicked=np.concatenate([e.clicked for e in examples]),
            label=np.concatenate([e.label for e in examples]),
            confidence=np.concatenate([e.confidence for e in examples]),
        )

    @classmethod
    def of(
        cls,
        user_row: Ints,
        history: Ints,
        history_request: Ints,
        item_row: Ints,
        content_row: Ints,
        request: Ints,
        exposed: npt.NDArray[np.bool_],
        score: Floats,
        clicked: Floats,
        label: Floats,
        confidence: Floats,
    ) -> Batch:
        """From the pairs of R requests one after another: ``user_row`` (R,); ``history`` and ``history_request`` (H,);
        ``item_row``, ``content_row``, ``request``, ``exposed`` and ``score`` (P,); ``clicked`` of the exposed pairs
        alone, ``label`` and ``confidence`` of the others."""
        # One key for id row and content row: unknown items share row 0 and still differ in content.
        width = int(content_row.max(initial=-1)) + 2
        keys, item = np.unique(item_row * width + content_row + 1, return_inverse=True)
        columns = {name: np.zeros(len(request), dtype=np.float32) for name in ("clicked", "label", "confidence")}
        columns["clicked"][exposed] = clicked
        columns["label"][~exposed] = label
        columns["confidence"][~exposed] = confidence
        return cls(
            user_row=user_row,
            history=history,
            history_request=history_request,
            item_row=keys // width,
            content_row=keys % width - 1,
            request=request,
            item=item,
            score=score,
            exposed=exposed,
            **columns,
        )

    def exposed_only(self) -> Batch:
        """The batch without its unexposed pairs: equal to the batch collated from records that have none."""
        return self.pairs(self.exposed)

    def pairs(self, chosen: npt.NDArray[np.bool_]) -> Batch:
        """The batch of some pairs, ``chosen`` (P,), and of the requests and items that they need."""
        users, request = np.unique(self.request[chosen], return_inverse=True)
        items, item = np.unique(self.item[chosen], return_inverse=True)
        place = np.full(len(self.user_row), -1)
        place[users] = np.arange(len(users))
        liked_by = place[self.history_request]
        return Batch(
            user_row=self.user_row[users],
            history=self.history[liked_by >= 0],
            history_request=liked_by[liked_by >= 0],
            item_row=self.item_row[items],
            content_row=self.content_row[items],
            request=request,
            item=item,
            score=self.score[chosen],
            exposed=self.exposed[chosen],
            clicked=self.clicked[chosen],
            label=self.label[chosen],
            confidence=self.confidence[chosen],
        )
