"""How well anchors find what users take next: recall of held-out items, for one generator or several."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpl.anchors.base import AnchorGenerator, History, anchors_of
from gpl.codes.centroids import SidCentroids
from gpl.codes.trie import SidTrie
from gpl.labels.matching import kernel, max_cosine

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Split:
    """Users' items in order, cut in time. ``past[u]`` (n,) and ``future[u]`` (m,) are catalogue rows; the future holds
    no item of the past and none twice, and may be empty: such a user is trained on and not judged.
    """

    past: list[Ints]
    future: list[Ints]
    items: int

    @classmethod
    def of(cls, sequences: Sequence[Ints], items: int, held_out: float = 0.2) -> Split:
        """The last ``held_out`` of each user's items, one at least, are the future; users with one item have none."""
        past, future = [], []
        for rows in sequences:
            count = max(1, round(len(rows) * held_out))
            cut = len(rows) - count if len(rows) > count else len(rows)
            met = set(rows[:cut].tolist())
            past.append(np.asarray(rows[:cut]))
            future.append(np.array([row for row in dict.fromkeys(rows[cut:].tolist()) if row not in met], np.int64))
        return cls(past, future, items)

    @property
    def judged(self) -> Ints:
        """Users with a past and a future."""
        return np.array([u for u, (p, f) in enumerate(zip(self.past, self.future, strict=True)) if len(p) and len(f)])

    @property
    def popularity(self) -> Ints:
        """How often each item is in a past (items,)."""
        return np.bincount(np.concatenate(self.past), minlength=self.items)

    @property
    def tail(self) -> NDArray[np.bool_]:
        """The less popular half of the items (items,)."""
        tail = np.zeros(self.items, bool)
        tail[np.argsort(-self.popularity, kind="stable")[self.items // 2 :]] = True
        return tail


@dataclass(frozen=True)
class Recall:
    """Means over users. Candidates are all items that are not in the user's past.

    ``recall_10``: share of the future found among the first 10, of 10 where there are more. ``tail_recall_50``: of the
    future's tail items, over ``tail_users`` that have some.
    """

    users: int
    recall_10: float
    recall_50: float
    tail_recall_50: float
    tail_users: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def recall(split: Split, scores: Iterator[Floats]) -> Recall:
    """``scores``: of all items (items,), for each user of ``split.judged`` in turn. Ties go to the lower row."""
    tail = split.tail
    first, wide, rare = [], [], []
    for user, given in zip(split.judged.tolist(), scores, strict=True):
        score = given.astype(np.float64)
        score[split.past[user]] = -np.inf
        top = np.argsort(-score, kind="stable")[:50].tolist()
        future = set(split.future[user].tolist())
        first.append(len(future & set(top[:10])) / min(10, len(future)))
        wide.append(len(future & set(top)) / len(future))
        if of_tail := {row for row in future if tail[row]}:
            rare.append(len(of_tail & set(top)) / len(of_tail))
    mean = float(np.mean(rare)) if rare else float("nan")
    return Recall(len(first), float(np.mean(first)), float(np.mean(wide)), mean, len(rare))


def anchor_scores(
    split: Split,
    generator: AnchorGenerator,
    sids: NDArray[np.int32],
    vectors: Floats,
    trie: SidTrie,
    beams: int,
    history: int,
    tau: float | None,
) -> Iterator[Floats]:
    """Scores for `recall` from anchors: by the kernel of width ``tau``, or the largest cosine where it is None."""
    users = split.judged.tolist()
    pasts = [split.past[user][-history:] for user in users]
    histories = [History(sids[past], vectors[past]) for past in pasts]
    centroids = SidCentroids(sids, vectors)
    for beam, given in zip(generator.generate(histories, trie, beams), histories, strict=True):
        anchors = anchors_of(beam, centroids, given)
        if not len(anchors):
            yield np.zeros(split.items, np.float32)
        elif tau is None:
            yield max_cosine(anchors.vectors, vectors)[0]
        else:
            yield kernel(anchors.vectors, anchors.logprobs, vectors, tau)[0]


def mean_history_scores(split: Split, vectors: Floats, history: int) -> Iterator[Floats]:
    """Cosine with the mean of the user's past."""
    for user in split.judged.tolist():
        total = vectors[split.past[user][-history:]].sum(axis=0)
        yield vectors @ (total / max(1e-6, float(np.linalg.norm(total))))


def max_history_scores(split: Split, vectors: Floats, history: int) -> Iterator[Floats]:
    """Largest cosine with an item of the user's past: every item its own anchor."""
    for user in split.judged.tolist():
        yield (vectors @ vectors[split.past[user][-history:]].T).max(axis=1)
