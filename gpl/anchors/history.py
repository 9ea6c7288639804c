"""Anchors without a language model: the centres of what the user liked. Ours: a fallback, and a baseline to beat."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gpl.anchors.base import GENERATOR_FILE, Beams, FloatArray, History, IntArray
from gpl.codes.trie import SidTrie

_ITERATIONS = 10


class HistoryClusters:
    """Clusters the history's vectors and answers, for each cluster, the SID of its most central item.

    Spherical k-means, seeded by farthest-first from the most recent item, so nothing is random. ``logprob`` is the
    log of the cluster's share of the history. Asking for more beams than there are distinct SIDs in the history gives
    fewer. Every SID returned was met by the user and is in the trie.
    """

    kind = "history"

    @property
    def version(self) -> str:
        return f"{self.kind}-1"

    def generate(self, histories: Sequence[History], trie: SidTrie, beams: int) -> list[Beams]:
        if beams < 1:
            raise ValueError(f"beams must be at least 1, got {beams}")
        return [_beams(history, trie, beams) for history in histories]

    def save(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        description = {"kind": self.kind, "version": self.version}
        (directory / GENERATOR_FILE).write_text(json.dumps(description, indent=2) + "\n")

    @classmethod
    def load(cls, directory: Path) -> HistoryClusters:
        """There is nothing to load but the kind. Raises ValueError for a description of another version."""
        version = json.loads((directory / GENERATOR_FILE).read_text()).get("version")
        loaded = cls()
        if version != loaded.version:
            raise ValueError(f"{directory / GENERATOR_FILE}: version {version!r}, expected {loaded.version!r}")
        return loaded


def _beams(history: History, trie: SidTrie, beams: int) -> Beams:
    levels = history.sids.shape[1]
    exists = np.array([trie.contains(sid) for sid in history.sids], dtype=bool)
    sids, vectors = history.sids[exists], history.vectors[exists]
    if not len(sids):
        return Beams(np.zeros((0, levels), np.int32), np.zeros(0, np.float32))
    assigned, centres = _clusters(vectors, beams)
    share: dict[tuple[int, ...], int] = {}
    for k, centre in enumerate(centres):
        members = np.flatnonzero(assigned == k)
        if not len(members):
            continue
        # The most central item; the most recent one where equal.
        medoid = members[::-1][int(np.argmax(vectors[members[::-1]] @ centre))]
        sid = tuple(int(code) for code in sids[medoid])
        share[sid] = share.get(sid, 0) + len(members)
    ranked = sorted(share.items(), key=lambda pair: (-pair[1], pair[0]))
    counts = np.array([count for _, count in ranked], dtype=np.float64)
    found: IntArray = np.array([sid for sid, _ in ranked], dtype=np.int32)
    return Beams(found, np.log(counts / counts.sum()).astype(np.float32))


def _clusters(vectors: FloatArray, k: int) -> tuple[NDArray[np.int64], FloatArray]:
    """Cluster of each row (n,) and unit centres (at most k, dim)."""
    chosen = [len(vectors) - 1]
    nearest = vectors @ vectors[chosen[0]]
    while len(chosen) < min(k, len(vectors)):
        farthest = int(np.argmin(nearest))
        if nearest[farthest] > 1 - 1e-6:  # all that is left equals a centre
            break
        chosen.append(farthest)
        nearest = np.maximum(nearest, vectors @ vectors[farthest])
    centres = vectors[chosen].copy()
    assigned = np.argmax(vectors @ centres.T, axis=1)
    for _ in range(_ITERATIONS):
        for cluster in range(len(centres)):
            total = vectors[assigned == cluster].sum(axis=0)
            norm = float(np.linalg.norm(total))
            if norm > 1e-6:  # an empty cluster, or members that cancel out, keeps its centre
                centres[cluster] = total / norm
        moved = np.argmax(vectors @ centres.T, axis=1)
        if np.array_equal(moved, assigned):
            break
        assigned = moved
    return assigned, centres
