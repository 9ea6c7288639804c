"""Anchors without a language model: the user's own past, clustered. (ours)

The fallback where there is too little data to train an LM, and the baseline that one has to beat.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from gpl.anchors.base import GENERATOR_FILE, Beams, FloatArray, History, IntArray
from gpl.codes.trie import SidTrie

Ints = npt.NDArray[np.int64]

_TIE = 1e-5  # difference of cosines that is rounding


@dataclass(frozen=True)
class HistoryClusters:
    """Spherical k-means on the vectors of the recent positives; an anchor is the SID nearest to a cluster's mean.

    Nearest among the SIDs of the history that the trie still holds (with ``exclude_seen``, among all SIDs that are not
    in the history); of equally near ones the newest. ``logprob`` is the log of the cluster's share of the history.
    Deterministic: k-means starts from the newest item and the points farthest from those chosen before (Gonzalez 1985).
    """

    history: int = 50
    """Most recent items that are read."""
    rounds: int = 10
    """Lloyd's rounds, at most."""
    exclude_seen: bool = False
    """Answer with the nearest SID that is not in the history, instead of one that is. Needs a trie with vectors."""

    kind: ClassVar[str] = "history"

    def __post_init__(self) -> None:
        for name in ("history", "rounds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)}, must be at least 1")

    @property
    def version(self) -> str:
        """``history-`` and a hash of the configuration."""
        return f"{self.kind}-{hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:12]}"

    def generate(self, histories: Sequence[History], trie: SidTrie, beams: int) -> list[Beams]:
        """One `Beams` a history, in order; see `AnchorGenerator`. Empty where no item of the history is in the trie."""
        if beams < 1:
            raise ValueError(f"beams: {beams}, must be at least 1")
        return [self._generate(history.last(self.history), history.sids, trie, beams) for history in histories]

    def _generate(self, history: History, seen: IntArray, trie: SidTrie, beams: int) -> Beams:
        known = (trie.leaves(history.sids) >= 0).cpu().numpy()
        sids, vectors = history.sids[known], history.vectors[known]
        if not len(sids):
            return Beams(np.zeros((0, trie.levels), np.int32), np.zeros(0, np.float32))
        clusters = _cluster(vectors, beams, self.rounds)
        if self.exclude_seen:
            return _nearest_unseen(clusters, vectors, seen, trie)
        sizes = np.bincount(clusters)
        # A pair is equally near to its mean: the newer one stands for it, not the one that rounding prefers.
        near = vectors @ _sums(vectors, clusters, len(sizes)).T
        newest_first = (near >= near.max(axis=0) - _TIE * sizes)[::-1]
        nearest = len(sids) - 1 - np.argmax(newest_first, axis=0)
        return _beams(sids[nearest], sizes)

    def save(self, directory: Path) -> None:
        """Write ``generator.json`` into ``directory``, which is made if need be."""
        directory.mkdir(parents=True, exist_ok=True)
        description = {"kind": self.kind, "version": self.version, **asdict(self)}
        (directory / GENERATOR_FILE).write_text(json.dumps(description, indent=2) + "\n")

    @classmethod
    def load(cls, directory: Path) -> HistoryClusters:
        """What ``save`` wrote. Raises FileNotFoundError, or ValueError for a description that is not one."""
        path = directory / GENERATOR_FILE
        description = json.loads(path.read_text())
        try:
            generator = cls(int(description["history"]), int(description["rounds"]), bool(description["exclude_seen"]))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: not a description of history clusters: {error!r}") from error
        if generator.version != description.get("version"):
            raise ValueError(f"{path}: version {description.get('version')}, its contents are {generator.version}")
        return generator


def _beams(sids: IntArray, sizes: Ints) -> Beams:
    """Clusters as beams, by size. Two may have the same SID: they are one anchor, with both shares."""
    weight: dict[tuple[int, ...], int] = {}
    for sid, size in zip(map(tuple, sids.tolist()), sizes.tolist(), strict=True):
        if size:
            weight[sid] = weight.get(sid, 0) + size
    ranked = sorted(weight.items(), key=lambda entry: (-entry[1], entry[0]))
    shares = np.array([count for _, count in ranked]) / sizes.sum()
    return Beams(np.array([sid for sid, _ in ranked], np.int32), np.log(shares).astype(np.float32))


def _nearest_unseen(clusters: Ints, vectors: FloatArray, seen: IntArray, trie: SidTrie) -> Beams:
    """Each cluster's nearest SID that was not seen, the smaller one on a tie; none where all were."""
    every, places = trie.places()
    rows = trie.rows(seen)
    met = np.unique(rows[rows >= 0])
    if len(met) == len(every):
        return Beams(np.zeros((0, trie.levels), np.int32), np.zeros(0, np.float32))
    sizes = np.bincount(clusters)
    near = places @ _sums(vectors, clusters, len(sizes)).T
    near[met] = -np.inf
    return _beams(every[near.argmax(axis=0)], sizes)


def _sums(vectors: FloatArray, clusters: Ints, k: int) -> FloatArray:
    """Sum of the rows of each of ``k`` clusters (k, dim)."""
    members = (clusters == np.arange(k)[:, None]).astype(np.float32)
    sums: FloatArray = members @ vectors
    return sums


def _cluster(vectors: FloatArray, k: int, rounds: int) -> Ints:
    """Cluster (n,) of each unit row (n, dim), n >= 1; at most ``k`` clusters."""
    chosen = [len(vectors) - 1]
    nearest = vectors @ vectors[-1]
    while len(chosen) < min(k, len(vectors)):
        farthest = int(np.argmin(nearest))
        if nearest[farthest] > 1 - 1e-6:  # nothing left but copies of what is chosen
            break
        chosen.append(farthest)
        nearest = np.maximum(nearest, vectors @ vectors[farthest])
    centres = vectors[chosen]
    clusters: Ints = np.argmax(vectors @ centres.T, axis=1)
    for _ in range(rounds):
        sums = _sums(vectors, clusters, len(centres))
        lengths = np.linalg.norm(sums, axis=1, keepdims=True)
        # A cluster that fell empty, or whose members cancel, stays where it was.
        centres = np.where(lengths > 1e-6, sums / np.maximum(lengths, 1e-6), centres)
        moved: Ints = np.argmax(vectors @ centres.T, axis=1)
        if np.array_equal(moved, clusters):
            break
        clusters = moved
    return clusters
