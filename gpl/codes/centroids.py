"""The vector that a semantic id stands for: the mean of the catalogue items that carry it."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from gpl.catalogue import Catalogue

_NO_DIRECTION = 1e-6


class SidCentroids:
    """SID -> mean vector of the items that carry it, renormalised. (ours, method.md "Anchor generator")

    Reads the vectors it was given, and takes a mean when it is asked for, since few SIDs are, of many: so it is quick
    to build (0.2 s for 100,000 items). It holds for one ``generation`` of a catalogue; build it anew for the next.
    """

    def __init__(self, sids: npt.NDArray[np.integer], vectors: npt.NDArray[np.float32]) -> None:
        """``sids``: (n, levels), ``vectors``: (n, dim) unit rows, parallel. Rows with a negative code are left out:
        they are a catalogue's removed rows. Raises ValueError when the shapes do not fit.
        """
        if sids.ndim != 2 or vectors.ndim != 2 or len(sids) != len(vectors):
            raise ValueError(f"sids {sids.shape}, vectors {vectors.shape}: expected (n, levels) and (n, dim)")
        present = np.flatnonzero(sids.min(axis=1, initial=0) >= 0)
        order = present[np.lexsort(sids[present].T)]
        grouped = sids[order]
        first = np.ones(len(order), bool)
        first[1:] = (grouped[1:] != grouped[:-1]).any(axis=1)
        starts = np.flatnonzero(first)
        stops = np.append(starts, len(order))[1:]
        self.levels = sids.shape[1]
        self.dim = vectors.shape[1]
        self._vectors = vectors
        self._carriers = order
        self._range_of = dict(
            zip(
                map(tuple, grouped[starts].tolist()),
                zip(starts.tolist(), stops.tolist(), strict=True),
                strict=True,
            )
        )

    @classmethod
    def of(cls, catalogue: Catalogue) -> SidCentroids:
        """The centroids of a catalogue as it is now."""
        return cls(catalogue.sids, catalogue.vectors)

    def __len__(self) -> int:
        """Number of different SIDs."""
        return len(self._range_of)

    def __contains__(self, sid: object) -> bool:
        """Whether some item carries the SID, a tuple of codes."""
        return sid in self._range_of

    def vectors_of(self, sids: npt.NDArray[np.integer]) -> npt.NDArray[np.float32]:
        """Unit vectors (k, dim) of SIDs (k, levels), in order. Raises KeyError naming a SID that no item carries."""
        result = np.empty((len(sids), self.dim), np.float32)
        for at, sid in enumerate(sids.tolist()):
            carriers = self._range_of.get(tuple(sid))
            if carriers is None:
                raise KeyError(f"sid {sid}: no item of the catalogue carries it")
            result[at] = _mean_direction(self._vectors[self._carriers[slice(*carriers)]])
        return result


def _mean_direction(vectors: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """Normalised mean (dim,) of vectors (n, dim), the same whatever order the items came in: float64 holds the sum of
    float32 vectors (all but) exactly.
    """
    total: npt.NDArray[np.float64] = vectors.sum(axis=0, dtype=np.float64)
    length = np.sqrt(total @ total)
    if length <= _NO_DIRECTION:
        # Opposite vectors cancel: one of them, chosen by value, stands for the SID.
        total = np.asarray(min(vectors.tolist()), np.float64)
        length = np.sqrt(total @ total)
    direction: npt.NDArray[np.float64] = total / length
    return direction
