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
import torch

from gpl.anchors.base import GENERATOR_FILE, Beams, FloatArray, History, IntArray
from gpl.codes.trie import SidTrie

Ints = npt.NDArray[np.int64]

_TIE = 1e-5  # difference of cosines that is rounding


@dataclass(frozen=True)
class HistoryClusters:
    """Spherical k-means on the vectors of the recent positives; an anchor is the SID nearest to a cluster's mean.

    Nearest among the SIDs of the history that the trie still holds, so that no catalogue is needed; of equally near
    ones the newest. ``logprob`` is the log of the cluster's share of the history. Deterministic: k-means starts from
    the newest item and the points farthest from those chosen before (Gonzalez 1985).
    """

    history: int = 50
    """Most recent items that are read."""
    rounds: int = 10
    """Lloyd's rounds, at most."""

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
        return [self._generate(history.last(self.history), trie, beams) for history in histories]

    def _generate(self, history: History, trie: SidTrie, beams: int) -> Beams:
        known = _in_trie(history.sids, trie)
        sids, vectors = history.sids[known], history.vectors[known]
        if not len(sids):
            return Beams(np.zeros((0, trie.levels), np.int32), np.zeros(0, np.float32))
        clusters = _cluster(vectors, beams, self.rounds)
        sizes = np.bincount(clusters)
        # A pair is equally near to its mean: the newer one stands for it, not the one that rounding prefers.
        near = vectors @ _sums(vectors, clusters, len(sizes)).T
        newest_first = (near >= near.max(axis=0) - _TIE * sizes)[::-1]
        nearest = len(sids) - 1 - np.argmax(newest_first, axis=0)
        # Two clusters may have the same nearest SID: they are one anchor, with both shares.
        weight: dict[tuple[int, ...], int] = {}
        for sid, size in zip(map(tuple, sids[nearest].tolist()), sizes.tolist(), strict=True):
            if size:
                weight[sid] = weight.get(sid, 0) + size
        ranked = sorted(weight.items(), key=lambda entry: (-entry[1], entry[0]))
        shares = np.array([count for _, count in ranked]) / len(sids)
        return Beams(np.array([sid for sid, _ in ranked], np.int32), np.log(shares).astype(np.float32))

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
            generator = cls(int(description["history"]), int(description["rounds"]))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: not a description of history clusters: {error!r}") from error
        if generator.version != description.get("version"):
            raise ValueError(f"{path}: version {description.get('version')}, its contents are {generator.version}")
        return generator


def _in_trie(sids: IntArray, trie: SidTrie) -> npt.NDArray[np.bool_]:
    """Which of the SIDs (n, levels) some item carries (n,); a code out of the codebook is carried by none.

    Raises ValueError for SIDs of another number of levels.
    """
    if sids.shape[1] != trie.levels:
        raise ValueError(f"history: SIDs of {sids.shape[1]} levels, the trie has {trie.levels}")
    codes = torch.from_numpy(sids.astype(np.int64))
    valid = ((codes >= 0) & (codes < trie.codebook_size)).all(dim=1)
    codes = codes.clamp(0, trie.codebook_size - 1)
    nodes = torch.full((len(sids),), trie.root)
    for level in range(trie.levels):
        nodes = trie.step(nodes).gather(1, codes[:, level : level + 1]).squeeze(1)
    known: npt.NDArray[np.bool_] = ((nodes >= 0) & valid).numpy()
    return known


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
