"""Trainers that work as one: ranks, one process each, which exchange what they read and what they computed.

All ranks hold the same state and take the same steps. Each fetches its own partitions of the labels; what has come is
gathered, so that every rank cuts the same batches; of a batch each computes the gradient of the requests from its own
partitions, and all sum these in rank order. Rank 0 alone writes: checkpoints, journals, models, dead letters.
A rank that ends leaves the others without an answer, so they end too, and the group is started again as one trainer
is: from the newest checkpoint.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Protocol, Self

import torch
import torch.distributed as dist
from safetensors.torch import load, save

from gpl.preranker.division import Part
from streams.parent import end_when_orphaned


def owner(partition: int, ranks: int) -> int:
    """The rank that fetches a partition of the labels, and computes the gradient of its requests."""
    return partition % ranks


class RankGoneError(RuntimeError):
    """Another rank has ended, so this one gets no answer."""


class Group(AbstractContextManager["Group"], Protocol):
    """The ranks as one of them sees them."""

    rank: int
    ranks: int

    def gather(self, data: bytes) -> list[bytes]:
        """What each rank gave, in rank order. Every rank must call it. Raises RankGoneError."""

    def each(self, compute: Callable[[int], Part]) -> Sequence[Part]:
        """``compute(rank)`` of every rank, in rank order, each computed by that rank."""


class Alone(AbstractContextManager["Alone"]):
    """A group of one."""

    rank, ranks = 0, 1

    def gather(self, data: bytes) -> list[bytes]:
        return [data]

    def each(self, compute: Callable[[int], Part]) -> Sequence[Part]:
        return [compute(0)]

    def __exit__(self, *_: object) -> None:
        pass


class Processes:
    """Ranks over torch.distributed's gloo. ``init_method``: where they meet, ``env://`` under torchrun."""

    def __init__(self, rank: int, ranks: int, init_method: str) -> None:
        """Waits for all ranks. Raises what torch raises when they do not come."""
        self.rank, self.ranks = rank, ranks
        dist.init_process_group("gloo", init_method=init_method, rank=rank, world_size=ranks)

    @classmethod
    def from_environment(cls) -> Processes | None:
        """As torchrun's variables say; None when there are none, or for a single rank.

        The process ends with torchrun: ranks of a killed one would go on, and keep the next group out.
        """
        ranks = int(os.environ.get("WORLD_SIZE", "1"))
        if ranks == 1:
            return None
        end_when_orphaned()
        return cls(int(os.environ["RANK"]), ranks, "env://")

    def gather(self, data: bytes) -> list[bytes]:
        try:
            return self._gather(data)
        except RuntimeError as error:
            raise RankGoneError(f"rank {self.rank}: another one has ended: {error}") from error

    def _gather(self, data: bytes) -> list[bytes]:
        sizes = [torch.zeros((), dtype=torch.int64) for _ in range(self.ranks)]
        dist.all_gather(sizes, torch.tensor(len(data)))
        longest = max(int(size) for size in sizes)
        if not longest:
            return [b""] * self.ranks
        mine = torch.zeros(longest, dtype=torch.uint8)
        mine[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else 0
        found = [torch.empty_like(mine) for _ in range(self.ranks)]
        dist.all_gather(found, mine)
        return [part.numpy()[: int(size)].tobytes() for part, size in zip(found, sizes, strict=True)]

    def each(self, compute: Callable[[int], Part]) -> Sequence[Part]:
        return [load(data) for data in self.gather(save(dict(compute(self.rank))))]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        dist.destroy_process_group()
