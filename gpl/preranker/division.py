"""A batch divided among ranks: each computes the gradient of its requests, and all take the same step. (data-parallel)

Whoever runs the ranks, one process each or all in one, the arithmetic is the same: the gradient of each rank's share
of the loss, and their sum in rank order. So training over several processes can be made again, bit for bit, in one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gpl.labels.matching import Ints

Part = Mapping[str, Tensor]
"""What one rank computed, by name; empty when nothing of the batch is its own."""

Each = Callable[[Callable[[int], Part]], Sequence[Part]]
"""Gives ``compute(rank)`` of every rank, in rank order. Across processes each computes its own, and they exchange."""


@dataclass(frozen=True)
class Division:
    """``rank`` (R,): whose each request is, of ``ranks``."""

    rank: Ints
    each: Each


def in_one_process(ranks: int) -> Each:
    """All ranks' parts computed here, one after another."""
    return lambda compute: [compute(rank) for rank in range(ranks)]


def ordered_sum(parts: Sequence[Tensor]) -> Tensor:
    """The sum, always in the order given: what floating point makes of another order differs in the last bits."""
    total = parts[0].clone()
    for part in parts[1:]:
        total += part
    return total


def sparse_sum(rows: Sequence[Tensor], values: Sequence[Tensor], like: Tensor) -> Tensor:
    """The sum of gradients of some ``rows`` of a table, a sparse tensor of its shape. Coalesced in the order given."""
    index, value = torch.cat(list(rows))[None], torch.cat(list(values))
    return torch.sparse_coo_tensor(index, value, like.shape, check_invariants=False).coalesce()
