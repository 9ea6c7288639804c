"""What anchor scores tell about clicks (:mod:`gpl.labels.evidence`), of each source of scores by itself.

Another generator, or another way to match, scores items differently. An item's mean over two sources would be off for
both in the same direction for every user, and the popularity of items would pass for a knowledge of tastes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from gpl.labels.evidence import Evidence, Reading
from gpl.labels.matching import Ints
from gpl.preranker.batch import Batch

SOURCES = 4
"""Kept: those used last. Anchors of an old generator stay in force until their users come again."""
_UNNAMED = ""
"""The source of a checkpoint that does not name it: whichever comes first afterwards."""


class SourcedEvidence:
    """Evidence by source. Deterministic; its state is a few arrays a source."""

    def __init__(self) -> None:
        self._by_source: dict[str, Evidence] = {}  # used last comes last

    def observe(self, batch: Batch, sources: Sequence[str]) -> None:
        """Take in a batch of R requests. ``sources`` (R,): whose scores each carries, "" without scores."""
        item_row, whose = batch.item_row[batch.item], np.array(sources)
        for source in dict.fromkeys(filter(None, sources)):
            evidence = self._by_source.pop(source, None) or self._by_source.pop(_UNNAMED, None) or Evidence()
            self._by_source[source] = evidence
            own = whose == source
            pairs = own[batch.request]
            evidence.observe(
                batch.user_row[own],
                item_row[pairs],
                (np.cumsum(own) - 1)[batch.request[pairs]],
                batch.score[pairs],
                batch.exposed[pairs],
                batch.clicked[pairs],
            )
        while len(self._by_source) > SOURCES:
            del self._by_source[next(iter(self._by_source))]

    def read(self, sources: Sequence[str] | None = None) -> Reading:
        """Of the source with the least weight among these, "" passed over; by default, or when there are none of them,
        of the one used last. A source that was not met yet has no weight."""
        named = dict.fromkeys(filter(None, sources or ()))
        unnamed = self._by_source.get(_UNNAMED)
        readings = [(self._by_source.get(source) or unnamed or Evidence()).read() for source in named]
        if not readings:
            readings = [evidence.read() for evidence in list(self._by_source.values())[-1:]] or [Evidence().read()]
        return min(readings, key=lambda reading: reading.weight)

    def forget(self, item_row: Ints) -> None:
        """Rows (n,) that other items will have."""
        for evidence in self._by_source.values():
            evidence.forget(item_row)

    def state(self) -> tuple[list[str], dict[str, Tensor]]:
        """The sources, and their arrays (copies) by place and name."""
        return list(self._by_source), {
            f"{place}.{name}": torch.from_numpy(array.copy())
            for place, evidence in enumerate(self._by_source.values())
            for name, array in evidence.state_arrays().items()
        }

    def restore(self, sources: Sequence[str] | None, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of ``state``; None: of a checkpoint that held one source without its name.

        Raises ValueError naming an array that is missing or misshapen.
        """
        if sources is None:
            sources, tensors = [_UNNAMED], {f"0.{name}": tensor for name, tensor in tensors.items()}
        self._by_source = {}
        for place, source in enumerate(sources):
            evidence, prefix = Evidence(), f"{place}."
            evidence.load_state_arrays(
                {n.removeprefix(prefix): t.numpy() for n, t in tensors.items() if n.startswith(prefix)}
            )
            self._by_source[source] = evidence
