"""Beam search over the SIDs that exist.

The probability of a code is renormalised over the codes that the trie allows after the prefix, so the
probabilities of all SIDs of the catalogue sum to 1 and logprobs of different users can be compared.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from gpl.codes.trie import SidTrie

Advance = Callable[[int, Tensor, Tensor], Tensor]
"""``advance(level, parents, codes) -> scores``: extend the beams by one code and score what may follow.

``parents``, ``codes``: (batch, width) int64. New beam b continues the old beam ``parents[:, b]`` with the code
``codes[:, b]`` of level ``level - 1``. Answers (batch, width, codebook_size) scores of the codes of ``level``.
"""


def beam_search(first: Tensor, advance: Advance, trie: SidTrie, levels: int, beams: int) -> tuple[Tensor, Tensor]:
    """The most probable SIDs of each user, as far as a beam of width ``beams`` finds them.

    ``first``: (batch, codebook_size) scores of the codes of level 0. Answers SIDs (batch, K, levels) int64 and
    natural log-probabilities (batch, K), descending, K <= ``beams``; entries past the last SID that was found have
    logprob -inf and mean nothing. Raises ValueError for ``beams`` < 1.

    Ties go to the smaller SID: between steps beams stand in SID order, so the flat index of a continuation orders
    like its SID, and the sort is stable.
    """
    if beams < 1:
        raise ValueError(f"beams must be at least 1, got {beams}")
    batch, size = first.shape
    nodes = torch.full((batch, 1), trie.root, dtype=torch.int64, device=first.device)
    logprobs = first.new_zeros((batch, 1))
    sids = nodes.new_zeros((batch, 1, 0))
    scores = first.unsqueeze(1)
    for level in range(levels):
        children = trie.step(nodes.cpu()).to(first.device)
        steps = torch.log_softmax(scores.masked_fill(children < 0, -torch.inf), dim=-1)
        reached = (logprobs.unsqueeze(-1) + steps).flatten(1)
        best = torch.sort(reached, dim=1, descending=True, stable=True).indices[:, :beams]
        if level < levels - 1:
            best = best.sort(dim=1).values
        parents, codes = best // size, best % size
        logprobs = reached.gather(1, best)
        sids = torch.cat((sids.gather(1, parents.unsqueeze(-1).expand(-1, -1, level)), codes.unsqueeze(-1)), dim=-1)
        if level < levels - 1:
            # A beam that left the trie stays at its root: whatever it reaches from there keeps the logprob -inf.
            nodes = children.flatten(1).gather(1, best)
            nodes = nodes.where(nodes >= 0, trie.root)
            scores = advance(level + 1, parents, codes)
    return sids, logprobs
