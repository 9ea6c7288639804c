"""Beam search over the SIDs that exist.

The probability of a code is renormalised over the codes that the trie allows after the prefix, so the
probabilities of all SIDs of the catalogue sum to 1 and logprobs of different users can be compared.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gpl.anchors.base import Beams, IntArray
from gpl.codes.trie import SidTrie

Scorer = Callable[[Tensor, Tensor], Tensor]
"""``score(prefixes, parents)``: unnormalised log-scores (batch, width, codebook_size) of the codes after ``prefixes``
(batch, width, level) int64. ``parents`` (batch, width) int64: which prefix of the call before each one extends."""


@dataclass(frozen=True)
class Decoding:
    """How SIDs are read from a language model."""

    temperature: float = 1.0
    """Scores are divided by it before they are normalised: below 1 sharper, above 1 flatter."""
    exclude_seen: bool = False
    """Leave out the SIDs of the history: those that are left share the probability."""

    def __post_init__(self) -> None:
        if not 1e-6 <= self.temperature < math.inf:  # below, scores leave float32
            raise ValueError(f"temperature: {self.temperature}, must be finite and at least 1e-6")

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)


def beam_search(
    score: Scorer, trie: SidTrie, batch: int, beams: int, temperature: float = 1.0, closed: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The most probable SIDs of each of ``batch`` users, as far as a beam of width ``beams`` finds them.

    Answers SIDs (batch, K, levels) int64 and natural log-probabilities of the whole SID (batch, K), descending,
    K <= ``beams``. Where a trie holds fewer SIDs than K, the last entries have logprob -inf and mean nothing.
    ``score`` answers on the trie's device. ``closed`` (batch, nodes) bool: nodes of the trie that a user's beams must
    not enter (`SidTrie.closed_by`). Raises ValueError for ``beams`` < 1 and for an empty trie.

    Ties go to the smaller SID: between steps beams stand in SID order, so the flat index of a continuation orders
    like its SID, and the sort is stable.
    """
    if beams < 1:
        raise ValueError(f"beams: {beams}, must be at least 1")
    if not len(trie):
        raise ValueError("trie: holds no SID, there is nothing to generate")
    size = trie.codebook_size
    root = torch.tensor(trie.root)
    prefixes = torch.empty((batch, 1, 0), dtype=torch.int64)
    nodes = root.expand(batch, 1)
    parents = torch.zeros((batch, 1), dtype=torch.int64)
    reached: Tensor | None = None
    for level in range(trie.levels):
        scores = score(prefixes, parents).float() / temperature
        nodes, prefixes = nodes.to(scores.device), prefixes.to(scores.device)
        children = trie.step(nodes)
        if closed is not None:
            shut = closed.gather(1, children.clamp_min(0).flatten(1)).view_as(children)
            children = children.masked_fill(shut, -1)
        steps = torch.log_softmax(scores.masked_fill(children < 0, -torch.inf), dim=-1)
        steps = steps.masked_fill(children < 0, -torch.inf)  # not the NaN of a softmax over nothing
        totals = (steps if reached is None else steps + reached.unsqueeze(-1)).flatten(1)
        best = totals.sort(dim=1, descending=True, stable=True).indices[:, :beams]
        if level < trie.levels - 1:
            best = best.sort(dim=1).values
        parents = best // size
        kept = prefixes.gather(1, parents.unsqueeze(-1).expand(-1, -1, level))
        prefixes = torch.cat((kept, (best % size).unsqueeze(-1)), dim=-1)
        reached = totals.gather(1, best)
        # A beam that left the trie goes on from its root: it keeps the logprob -inf, whatever it reaches from there.
        nodes = children.flatten(1).gather(1, best)
        nodes = nodes.where(nodes >= 0, trie.root)
    assert reached is not None  # a trie has at least one level
    return prefixes, reached


def closed_nodes(trie: SidTrie, seen: Sequence[IntArray], decoding: Decoding) -> Tensor | None:
    """What beams must not enter (users, nodes), by the SIDs (n, levels) that each user has seen; None: all is open."""
    if not decoding.exclude_seen:
        return None
    return torch.stack([trie.closed_by(sids) for sids in seen])


def as_beams(sids: Tensor, logprobs: Tensor) -> Beams:
    """One user's SIDs (K, levels) and log-probabilities (K,) of `beam_search`, without what could not be reached."""
    found = torch.isfinite(logprobs)
    return Beams(
        sids[found].to(torch.int32).cpu().numpy(),
        logprobs[found].clamp(max=0.0).cpu().numpy().astype(np.float32),
    )
