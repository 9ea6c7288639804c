"""A label record with its columns as arrays: made for many records at once, and light to keep and to pass on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from gpl.labels.matching import Floats
from streams.contracts import Label


@dataclass(frozen=True, slots=True)
class Columns:
    """One label record of n items, the exposed ones first, m of them.

    ``history``: ids of what the user had liked. ``items`` (n,) ids; ``score`` (n,) raw anchor scores, NaN where there
    is none; ``clicked`` (m,) 0 or 1; ``label`` and ``confidence`` (n - m,) of the unexposed; float32. ``space``:
    encoder and quantiser. ``source``: generator and configuration that made the scores, "" without anchors. ``rank``:
    of the trainers' group, whose share of a step's work it is.
    """

    request_id: str
    revision: int
    user_id: str
    ts: int
    space: tuple[str, str]
    source: str
    history: list[str]
    items: list[str]
    score: Floats
    clicked: Floats
    label: Floats
    confidence: Floats
    rank: int = 0

    @property
    def shown(self) -> int:
        """Number of exposed items."""
        return len(self.clicked)

    def only(self, exposed: Sequence[int], pseudo: bool) -> Columns:
        """These of the exposed items, by index, and the unexposed ones only where ``pseudo``."""
        if len(exposed) == self.shown and (pseudo or len(self.items) == self.shown):
            return self
        kept = [*exposed, *(range(self.shown, len(self.items)) if pseudo else ())]
        return replace(
            self,
            items=[self.items[i] for i in kept],
            score=self.score[kept],
            clicked=self.clicked[list(exposed)],
            label=self.label if pseudo else self.label[:0],
            confidence=self.confidence if pseudo else self.confidence[:0],
        )


@dataclass(frozen=True)
class Flat:
    """The columns of many records one after another, float64, as they were decoded."""

    score: NDArray[np.float64]
    clicked: NDArray[np.float64]
    label: NDArray[np.float64]
    confidence: NDArray[np.float64]

    @classmethod
    def of(cls, labels: Sequence[Label]) -> Flat:
        """Raises OverflowError for an integer that no float holds."""
        return cls(
            # None becomes NaN: no anchors, no score.
            _flat(
                part
                for label in labels
                for part in (
                    [np.nan if s is None else s for s in label.exposed.score],
                    label.unexposed.score,
                )
            ),
            _flat(label.exposed.clicked for label in labels),
            _flat(label.unexposed.label for label in labels),
            _flat(label.unexposed.confidence for label in labels),
        )

    def split(self, labels: Sequence[Label]) -> list[Columns]:
        """The records, each with its part. The columns of a record must be parallel."""
        score, clicked, label, confidence = (
            part.astype(np.float32) for part in (self.score, self.clicked, self.label, self.confidence)
        )
        made = []
        at = shown_at = 0
        for record in labels:
            items = record.exposed.item + record.unexposed.item
            end, shown_end = at + len(items), shown_at + len(record.exposed.item)
            hidden, hidden_end = at - shown_at, end - shown_end
            made.append(
                Columns(
                    request_id=record.request_id,
                    revision=record.revision,
                    user_id=record.user_id,
                    ts=record.ts,
                    space=(record.provenance.encoder, record.provenance.quantiser),
                    source=_source(record),
                    history=record.history,
                    items=items,
                    score=score[at:end],
                    clicked=clicked[shown_at:shown_end],
                    label=label[hidden:hidden_end],
                    confidence=confidence[hidden:hidden_end],
                )
            )
            at, shown_at = end, shown_end
        return made


def _source(label: Label) -> str:
    made_by = label.provenance
    return "" if label.outcome == "no_anchors" else f"{made_by.generator} {made_by.config}"


def columns(labels: Sequence[Label]) -> list[Columns]:
    """Checked label records as columns."""
    return Flat.of(labels).split(labels)


def _flat(parts: Iterable[Sequence[float]]) -> NDArray[np.float64]:
    return np.fromiter(chain.from_iterable(parts), np.float64)
