"""Beam search over the SIDs that exist.

The probability of a code is renormalised over the codes that the trie allows after the prefix, so the
probabilities of all SIDs of the catalogue sum to 1 and logprobs of different users can be compared.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from gpl.codes.trie import SidTrie

Scorer = Callable[[Tensor], Tensor]
"""Unnormalised log-scores (batch, width, codebook_size) of the codes after prefixes (batch, width, level), int64."""


def beam_search(score: Scorer, trie: SidTrie, batch: int, beams: int) -> tuple[Tensor, Tensor]:
    """The most probable SIDs of each of ``batch`` users, as far as a beam of width ``beams`` finds them.

    Answers SIDs (batch, K, levels) int64 and natural log-probabilities of the whole SID (batch, K), descending,
    K <= ``beams``. Where a trie holds fewer SIDs than K, the last entries have logprob -inf and mean nothing.
    ``score`` answers on the trie's device. Raises ValueError for ``beams`` < 1 and for an empty trie.

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
    reached: Tensor | None = None
    for level in range(trie.levels):
        scores = score(prefixes)
        nodes, prefixes = nodes.to(scores.device), prefixes.to(scores.device)
        children = trie.step(nodes)
        steps = torch.log_softmax(scores.masked_fill(children < 0, -torch.inf), dim=-1)
        totals = (steps if reached is None else steps + reached.unsqueeze(-1)).flatten(1)
        best = totals.sort(dim=1, descending=True, stable=True).indices[:, :beams]
        if level < trie.levels - 1:
            best = best.sort(dim=1).values
        parents = (best // size).unsqueeze(-1).expand(-1, -1, level)
        prefixes = torch.cat((prefixes.gather(1, parents), (best % size).unsqueeze(-1)), dim=-1)
        reached = totals.gather(1, best)
        # A beam that left the trie goes on from its root: it keeps the logprob -inf, whatever it reaches from there.
        nodes = children.flatten(1).gather(1, best)
        nodes = nodes.where(nodes >= 0, trie.root)
    assert reached is not None  # a trie has at least one level
    return prefixes, reached
