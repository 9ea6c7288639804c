"""What an anchor generator is given and what it answers: the contract that all generators share.

An *anchor* is a point of the frozen semantic space where a user's next interest is expected. A generator reads
the user's history as semantic ids (SIDs) and vectors and answers with SIDs and their log-probabilities
(`Beams`); `anchors_of` turns these into the vectors that candidates are matched against (`Anchors`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from gpl.codes.centroids import SidCentroids
    from gpl.codes.trie import SidTrie

FloatArray = NDArray[np.float32]
IntArray = NDArray[np.int32]

GENERATOR_FILE = "generator.json"


@dataclass(frozen=True)
class History:
    """A user's positively met items, oldest first.

    ``sids``: (n, levels) int32. ``vectors``: (n, dim) float32 unit rows of the frozen space, parallel to ``sids``.
    Raises ValueError when the two do not belong together.
    """

    sids: IntArray
    vectors: FloatArray

    def __post_init__(self) -> None:
        if self.sids.ndim != 2 or self.vectors.ndim != 2:
            raise ValueError(
                f"history: sids and vectors must be matrices, got shapes {self.sids.shape} and {self.vectors.shape}"
            )
        if len(self.sids) != len(self.vectors):
            raise ValueError(f"history: {len(self.sids)} sids for {len(self.vectors)} vectors; they are parallel")

    def __len__(self) -> int:
        return len(self.sids)

    def last(self, n: int) -> History:
        """The ``n`` most recent items (all of them when there are fewer)."""
        start = max(0, len(self) - n)
        return History(self.sids[start:], self.vectors[start:])


@dataclass(frozen=True)
class Beams:
    """What a generator expects next: at most as many SIDs as were asked for, best first.

    ``sids``: (K, levels) int32, distinct. ``logprobs``: (K,) float32, natural log of the whole SID's
    probability by the generator (near the history: among the SIDs that were candidates), descending; equal ones in
    ascending order of SID.
    """

    sids: IntArray
    logprobs: FloatArray

    def __len__(self) -> int:
        return len(self.sids)


@dataclass(frozen=True)
class Anchors:
    """Beams placed in the frozen space, as the matcher wants them.

    ``sids`` (K, levels) int32, ``logprobs`` (K,) float32, ``vectors`` (K, dim) float32 unit rows,
    ``history_factor`` (K,) float32 in [0, 1]: how close each anchor is to what the user already liked.
    """

    sids: IntArray
    logprobs: FloatArray
    vectors: FloatArray
    history_factor: FloatArray

    def __len__(self) -> int:
        return len(self.sids)


class AnchorGenerator(Protocol):
    """Anything that answers a user's history with expected SIDs.

    Implementations are immutable after construction and deterministic: one history, trie and beam count give one
    answer, whatever else is in the call (`LoraLM` decodes in batches and keeps this up to float rounding).
    """

    @property
    def version(self) -> str:
        """Identity of all that can change an answer: weights and configuration."""
        ...

    def generate(self, histories: Sequence[History], trie: SidTrie, beams: int) -> list[Beams]:
        """One `Beams` a history, in order. Every SID returned is in ``trie``. Raises ValueError for ``beams`` < 1."""
        ...

    def save(self, directory: Path) -> None:
        """Write all that `load_generator` needs into ``directory`` (made if missing)."""
        ...


def anchors_of(beams: Beams, centroids: SidCentroids, history: History) -> Anchors:
    """Place beams in the frozen space: an anchor's vector is the mean embedding of the items that carry its SID.

    ``history_factor_k = max(0, max_i cos(a_k, h_i))``, 0 without history (ours).
    Raises KeyError (from ``centroids``) when no item carries one of the SIDs.
    """
    vectors = np.asarray(centroids.vectors_of(beams.sids), dtype=np.float32)
    if len(history) and len(beams):
        nearest = (vectors @ history.vectors.T).max(axis=1)
        factor = np.clip(nearest, 0.0, 1.0).astype(np.float32)
    else:
        factor = np.zeros(len(beams), dtype=np.float32)
    return Anchors(beams.sids, beams.logprobs, vectors, factor)


def load_generator(directory: Path) -> AnchorGenerator:
    """Load what a generator's ``save`` wrote; ``kind`` in its JSON says which one it is.

    Raises FileNotFoundError when there is no generator in ``directory``, ValueError for an unknown kind or a
    damaged file.
    """
    # Imported here: implementations import this module, and reading history clusters should not need the LM.
    from gpl.anchors.history import HistoryClusters
    from gpl.anchors.lora_lm import LoraLM
    from gpl.anchors.near_history import NearHistory
    from gpl.anchors.small_lm import SmallLM

    path = directory / GENERATOR_FILE
    try:
        kind = json.loads(path.read_text())["kind"]
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no anchor generator there") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a generator description: {error!r}") from error
    if kind == SmallLM.kind:
        return SmallLM.load(directory)
    if kind == HistoryClusters.kind:
        return HistoryClusters.load(directory)
    if kind == LoraLM.kind:
        return LoraLM.load(directory)
    if kind == NearHistory.kind:
        return NearHistory.load(directory)
    known = ", ".join(cls.kind for cls in (SmallLM, LoraLM, HistoryClusters, NearHistory))
    raise ValueError(f"{path}: kind {kind!r} is unknown; it must be one of {known}")
