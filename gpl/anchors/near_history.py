"""A language model's anchors, held near what the user liked. (ours)

    p(sid | u) ~ p_lm(sid | u) exp(weight max_h cos(c_sid, e_h)),    c_sid: mean direction of the items that carry it

A product of experts (Hinton 2002): the language model knows what people take next and, of a site with short histories,
little of where in the space a rare item lies; that the history tells. What it gains, and where nothing, is in
docs/generators.md.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gpl.anchors.base import GENERATOR_FILE, AnchorGenerator, Beams, History, load_generator
from gpl.anchors.quality import Split
from gpl.anchors.sampling import IntArray
from gpl.codes.trie import SidTrie

WEIGHT = 10.0
"""In nats a unit of cosine. On two shops 5 to 20 were about as good."""
FEWEST = 20
"""Users below which their purchases are not asked whether the language model is better off alone."""
_LANGUAGE_MODEL = "language-model"
_JUDGED = 300
"""Users that a weight is chosen by, at most."""
_FUTURE = 0.2
"""Share of a user's items that is to be found, one at least."""


class NearHistory:
    """Of the SIDs that a language model finds most probable, those that are probable and near the history.

    Probabilities are renormalised over the SIDs that the language model was asked for, ``candidates`` times as many as
    anchors. A user without history has the best of them as they are.
    """

    kind: ClassVar[str] = "near-history"

    def __init__(self, language_model: AnchorGenerator, weight: float, candidates: int) -> None:
        """``candidates``: SIDs that the language model is asked for, for each anchor. Raises ValueError for a
        ``weight`` that is not positive and for ``candidates`` below 1."""
        if not 0 < weight < math.inf:
            raise ValueError(f"weight: {weight}, must be positive")
        if candidates < 1:
            raise ValueError(f"candidates: {candidates}, must be at least 1")
        # As `load` has them: 10 and 10.0 are one version.
        self.language_model, self.weight, self.candidates = language_model, float(weight), int(candidates)

    @property
    def version(self) -> str:
        """``near-history-`` and a hash of the language model's version, the weight and the candidates."""
        parts = json.dumps([self.language_model.version, self.weight, self.candidates])
        return f"{self.kind}-{hashlib.sha256(parts.encode()).hexdigest()[:12]}"

    def generate(self, histories: Sequence[History], trie: SidTrie, beams: int) -> list[Beams]:
        """One `Beams` a history, in order; see `AnchorGenerator`. Needs a trie with vectors."""
        if beams < 1:
            raise ValueError(f"beams: {beams}, must be at least 1")
        wide = self.language_model.generate(histories, trie, beams * self.candidates)
        return held_near(wide, histories, trie, self.weight, beams)

    def save(self, directory: Path) -> None:
        """Write ``generator.json`` and a directory for the language model."""
        self.language_model.save(directory / _LANGUAGE_MODEL)
        description = {
            "kind": self.kind,
            "version": self.version,
            "weight": self.weight,
            "candidates": self.candidates,
        }
        (directory / GENERATOR_FILE).write_text(json.dumps(description, indent=2) + "\n")

    @classmethod
    def load(cls, directory: Path) -> NearHistory:
        """What ``save`` wrote. Raises FileNotFoundError, or ValueError for a description that is not one."""
        path = directory / GENERATOR_FILE
        description = json.loads(path.read_text())
        try:
            model = load_generator(directory / _LANGUAGE_MODEL)
            generator = cls(model, float(description["weight"]), int(description["candidates"]))
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path}: not a description of a generator near the history: {error!r}") from error
        if generator.version != description.get("version"):
            raise ValueError(f"{path}: version {description.get('version')}, its contents are {generator.version}")
        return generator


def held_near(
    wide: Sequence[Beams], histories: Sequence[History], trie: SidTrie, weight: float, beams: int
) -> list[Beams]:
    """The ``beams`` best of each user's ``wide`` beams by the formula of this module, best first.

    Raises ValueError when the trie was built without vectors.
    """
    return [
        _held(found, _nearest(found, history, trie), weight, beams)
        for found, history in zip(wide, histories, strict=True)
    ]


class Choice(NamedTuple):
    """``weight``, and how well what ``users`` took next was found by the language model alone and near the history."""

    weight: float
    users: int
    alone: float
    near: float


def choose_weight(
    language_model: AnchorGenerator, sequences: Sequence[IntArray], trie: SidTrie, beams: int, candidates: int
) -> Choice:
    """`WEIGHT`, or 0 where the language model alone finds more of what users take next, by over a standard error.

    `WEIGHT` too where fewer than `FEWEST` users can be judged.

    ``sequences``: SIDs (n, levels), oldest first, of users that the model was not trained on. Their last fifth is to be
    found among all SIDs but those before it, ranked by the cosine with the nearest anchor: the mean over users of the
    mean of 1 / log2(1 + rank), the best rank being 1.
    """
    sids, places = trie.places()
    taken = [trie.rows(sequence) for sequence in sequences[:_JUDGED]]
    split = Split.of([rows[rows >= 0] for rows in taken], len(sids), _FUTURE)
    judged = split.judged.tolist()
    if not judged:
        return Choice(WEIGHT, 0, math.nan, math.nan)
    pasts, futures = [split.past[user] for user in judged], [split.future[user] for user in judged]
    histories = [History(sids[past], places[past]) for past in pasts]
    wide = language_model.generate(histories, trie, beams * candidates)
    gains = np.empty((2, len(pasts)))
    for at, weight in enumerate((0.0, WEIGHT)):
        for user, found in enumerate(held_near(wide, histories, trie, weight, beams)):
            scores = (places @ trie.directions(found.sids).T).max(axis=1, initial=-1.0)
            scores[pasts[user]] = -np.inf
            rank = np.empty(len(scores), np.int64)
            rank[np.argsort(-scores, kind="stable")] = np.arange(1, len(scores) + 1)
            gains[at, user] = (1.0 / np.log2(1.0 + rank[futures[user]])).mean()
    more = gains[0] - gains[1]
    alone = len(more) >= FEWEST and more.mean() > more.std(ddof=1) / len(more) ** 0.5
    return Choice(0.0 if alone else WEIGHT, len(pasts), float(gains[0].mean()), float(gains[1].mean()))


def _nearest(found: Beams, history: History, trie: SidTrie) -> NDArray[np.float64] | None:
    """Largest cosine (K,) of each SID with an item of the history; None without one."""
    if not len(history) or not len(found):
        return None
    cosines = trie.directions(found.sids) @ history.vectors.T
    return np.asarray(cosines.max(axis=1), np.float64)


def _held(found: Beams, near: NDArray[np.float64] | None, weight: float, beams: int) -> Beams:
    if near is None:
        return Beams(found.sids[:beams], found.logprobs[:beams])
    scores = found.logprobs.astype(np.float64) + weight * near
    scores -= scores.max()
    scores -= math.log(np.exp(scores).sum())
    logprobs = scores.clip(max=0.0).astype(np.float32)
    best = np.lexsort((*found.sids.T[::-1], -logprobs))[:beams]
    return Beams(found.sids[best], logprobs[best])
