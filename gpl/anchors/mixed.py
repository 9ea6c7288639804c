"""Anchors of a language model beside those of the user's own past. (ours)

The two fail differently: the language model knows what people take next, and little of rare items; clusters of the
history are near what the user liked, whatever its popularity. docs/generators.md has what was measured.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np

from gpl.anchors.base import GENERATOR_FILE, AnchorGenerator, Beams, History, load_generator
from gpl.anchors.history import HistoryClusters
from gpl.codes.trie import SidTrie

_LANGUAGE_MODEL, _HISTORY = "language-model", "history"


class MixedGenerator:
    """``p = (1 - share) p_lm + share p_history``; as many of the anchors come from the history as ``share`` says.

    A SID that both name is one anchor with both shares, so there may be fewer anchors than asked for. A user without
    history has the language model's anchors alone, with all the probability.
    """

    kind: ClassVar[str] = "mixed"

    def __init__(self, language_model: AnchorGenerator, history: HistoryClusters, share: float) -> None:
        """Raises ValueError for a ``share`` out of (0, 1)."""
        if not 0 < share < 1:
            raise ValueError(f"share: {share}, must be between 0 and 1")
        self.language_model, self.history, self.share = language_model, history, share

    @property
    def version(self) -> str:
        """``mixed-`` and a hash of both parts' versions and the share."""
        parts = json.dumps([self.language_model.version, self.history.version, self.share])
        return f"{self.kind}-{hashlib.sha256(parts.encode()).hexdigest()[:12]}"

    def generate(self, histories: Sequence[History], trie: SidTrie, beams: int) -> list[Beams]:
        """One `Beams` a history, in order; see `AnchorGenerator`."""
        if beams < 1:
            raise ValueError(f"beams: {beams}, must be at least 1")
        remembered = max(1, round(beams * self.share))
        past = self.history.generate(histories, trie, remembered)
        # One anchor at least is the language model's; where the history gave fewer than it may, the rest are too.
        expected = self.language_model.generate(histories, trie, beams)
        return [_mix(lm, own, self.share, beams) for lm, own in zip(expected, past, strict=True)]

    def save(self, directory: Path) -> None:
        """Write ``generator.json`` and a directory for each part."""
        self.language_model.save(directory / _LANGUAGE_MODEL)
        self.history.save(directory / _HISTORY)
        description = {"kind": self.kind, "version": self.version, "share": self.share}
        (directory / GENERATOR_FILE).write_text(json.dumps(description, indent=2) + "\n")

    @classmethod
    def load(cls, directory: Path) -> MixedGenerator:
        """What ``save`` wrote. Raises FileNotFoundError, or ValueError for a description that is not one."""
        path = directory / GENERATOR_FILE
        description = json.loads(path.read_text())
        history = HistoryClusters.load(directory / _HISTORY)
        try:
            generator = cls(load_generator(directory / _LANGUAGE_MODEL), history, float(description["share"]))
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path}: not a description of a mixed generator: {error!r}") from error
        if generator.version != description.get("version"):
            raise ValueError(f"{path}: version {description.get('version')}, its parts are {generator.version}")
        return generator


def _mix(expected: Beams, own: Beams, share: float, beams: int) -> Beams:
    if not len(own):
        return expected
    # In log space: of a small temperature exp would make 0 of what is only improbable.
    found = {sid: math.log(share) + logprob for sid, logprob in _entries(own)}
    room = max(1, beams - len(own))
    for at, (sid, logprob) in enumerate(_entries(expected)):
        # A SID that the history named has the language model's share too, wherever that ranks it.
        if at < room or sid in found:
            found[sid] = float(np.logaddexp(found.get(sid, -math.inf), math.log1p(-share) + logprob))
    ranked = sorted(found.items(), key=lambda entry: (-entry[1], entry[0]))[:beams]
    sids = np.array([sid for sid, _ in ranked], np.int32).reshape(len(ranked), own.sids.shape[1])
    return Beams(sids, np.array([p for _, p in ranked]).clip(max=0.0).astype(np.float32))


def _entries(beams: Beams) -> list[tuple[tuple[int, ...], float]]:
    return list(zip(map(tuple, beams.sids.tolist()), beams.logprobs.tolist(), strict=True))
