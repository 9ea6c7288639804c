"""Raw vectors of items: encoded from their text, or the ones they came with."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from gpl.catalogue import ItemContent
from gpl.space.encoder import Encoder, unreadable

PRECOMPUTED = "precomputed"


def choose_encoder(items: Sequence[ItemContent], configured: str) -> str:
    """The encoder's name for a catalogue about to be fitted.

    Items that all carry an ``embedding`` are taken at their word: "precomputed". With none, it is ``configured``.
    Raises ValueError naming the first item that differs from the first one when only some carry an embedding,
    and when ``configured`` is "precomputed" and there are none.
    """
    if not items:
        raise ValueError("items: none, an encoder cannot be chosen")
    carries = items[0].embedding is not None
    for item in items:
        if (item.embedding is not None) != carries:
            has, first = ("no embedding", "one") if carries else ("an embedding", "none")
            raise ValueError(
                f"item {item.item_id!r}: {has}, but item {items[0].item_id!r} has {first}; "
                "either all items carry one or none does"
            )
    if carries:
        return PRECOMPUTED
    if configured == PRECOMPUTED:
        raise ValueError(f"item {items[0].item_id!r}: embedding is missing, the encoder is {PRECOMPUTED!r}")
    return configured


def raw_vectors(
    items: Sequence[ItemContent], encoder: Encoder | None, dim: int | None = None
) -> npt.NDArray[np.float32]:
    """Raw vectors (len(items), dim) of items, in order.

    With an ``encoder`` the text is encoded and an ``embedding`` is not looked at: the space was fitted on text,
    and vectors of two origins do not compare. Without one (encoder "precomputed") every item must carry an
    ``embedding`` of dimension ``dim``, or of the first item's where ``dim`` is None.

    Raises ValueError naming the item, the field and what is wrong: blank text, no embedding, another dimension,
    values that are no finite numbers, or all 0.
    """
    if encoder is not None:
        for item in items:
            if why := unreadable(item.text):
                raise ValueError(f"item {item.item_id!r}: text {item.text!r} {why}")
        return encoder.encode([item.text for item in items])

    rows = [_embedding(item) for item in items]
    if dim is None:
        if not rows:
            raise ValueError("items: none, and no dim given")
        dim = len(rows[0])
    for item, row in zip(items, rows, strict=True):
        if len(row) != dim:
            raise ValueError(f"item {item.item_id!r}: embedding has dimension {len(row)}, expected {dim}")
    return np.stack(rows) if rows else np.zeros((0, dim), np.float32)


def _embedding(item: ItemContent) -> npt.NDArray[np.float32]:
    if item.embedding is None:
        raise ValueError(f"item {item.item_id!r}: embedding is missing, the encoder is {PRECOMPUTED!r}")
    with np.errstate(over="ignore"):  # beyond float32 becomes infinite, which is refused below
        try:
            row = np.asarray(item.embedding, np.float32)
        except (TypeError, ValueError) as error:
            raise ValueError(f"item {item.item_id!r}: embedding is no list of numbers: {error}") from error
    if row.ndim != 1:
        raise ValueError(f"item {item.item_id!r}: embedding has shape {row.shape}, expected one list of numbers")
    if not np.isfinite(row).all():
        at = int(np.flatnonzero(~np.isfinite(row))[0])
        raise ValueError(f"item {item.item_id!r}: embedding[{at}] is {item.embedding[at]!r}, not a finite float32")
    if not len(row):
        raise ValueError(f"item {item.item_id!r}: embedding is empty")
    if not row.any():
        raise ValueError(f"item {item.item_id!r}: embedding is all 0, it has no direction")
    return row
