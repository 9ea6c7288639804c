"""Training material of the generator: which positives are kept, and how they are cut into windows."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int32]


def keep_probabilities(sequences: Sequence[IntArray], threshold: float) -> list[NDArray[np.float64]]:
    """Probability of keeping each item of each sequence: ``min(1, sqrt(max(threshold, 1 / m) / f))``.

    ``f`` is the share of the SID among all positives, ``m`` how many SIDs these have. Downsampling popular items by
    frequency is the paper's; the form is word2vec's (Mikolov et al. 2013), chosen by us. Answers one (n,) array a
    sequence of (n, levels). Raises ValueError for a threshold that is not positive.
    """
    if threshold <= 0:
        raise ValueError(f"threshold: {threshold}, must be positive")
    if not sum(map(len, sequences)):
        return [np.zeros(0) for _ in sequences]
    _, inverse, counts = np.unique(np.concatenate(sequences), axis=0, return_inverse=True, return_counts=True)
    share = counts / counts.sum()
    # Popular is more than a uniform share: with few SIDs all of them are above the threshold, and nothing was left.
    keep = np.minimum(1.0, np.sqrt(max(threshold, 1 / len(counts)) / share))[inverse.ravel()]
    return np.split(keep, np.cumsum([len(sequence) for sequence in sequences])[:-1])


def thin(
    sequences: Sequence[IntArray], keep: Sequence[NDArray[np.float64]], rng: np.random.Generator
) -> list[IntArray]:
    """One random draw of what is kept, order preserved; sequences may come out empty."""
    return [
        sequence[rng.random(len(sequence)) < probability] for sequence, probability in zip(sequences, keep, strict=True)
    ]


def windows(sequences: Sequence[IntArray], size: int, rng: np.random.Generator | None = None) -> list[IntArray]:
    """Cut sequences into consecutive windows of at most ``size`` items; nothing is left out, nothing twice.

    With ``rng`` the first cut of a sequence longer than ``size`` falls at random, so that over the epochs an item
    is seen at every distance from its window's start. Without, windows are counted back from the newest item.
    """
    cut: list[IntArray] = []
    for sequence in sequences:
        n = len(sequence)
        offset = n % size if rng is None or n <= size else int(rng.integers(size))
        edges = [0, *range(offset, n, size), n]
        cut.extend(sequence[a:b] for a, b in pairwise(edges) if b > a)
    return cut


def batches(cut: Sequence[IntArray], batch_items: int, rng: np.random.Generator | None = None) -> list[list[IntArray]]:
    """Group windows by length: at most ``batch_items`` items a batch, padding included, but one window at least.

    Similar lengths keep padding small. With ``rng`` the batches come in random order.
    """
    groups: list[list[IntArray]] = []
    for window in sorted(cut, key=len, reverse=True):
        if groups and (len(groups[-1]) + 1) * len(groups[-1][0]) <= batch_items:
            groups[-1].append(window)
        else:
            groups.append([window])
    if rng is None:
        return groups
    return [groups[at] for at in rng.permutation(len(groups))]
