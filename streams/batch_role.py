"""A role whose work is done in batches: what arrives while a batch is worked on is the next batch."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from streams.dead_letters import Halted, Original
from streams.role import PartitionState, Role


@dataclass(frozen=True, slots=True)
class Entry:
    """One record of a batch. ``done`` acknowledges it, once what it asked for is durable."""

    number: int
    original: Original
    done: Callable[[], None]


class BatchRole(Role[PartitionState]):
    """Collects records for up to ``wait`` seconds or ``size`` records and hands them to ``work``."""

    size = 64
    wait = 0.05
    judges_on_arrival = False

    def new_partition(self, now: float) -> PartitionState:
        return PartitionState(self._sources.values(), now)

    async def start(self) -> None:
        self._queue: asyncio.Queue[tuple[PartitionState, Entry]] = asyncio.Queue()
        await super().start()
        self.spawn(self._work_forever())

    async def work(self, batch: list[Entry]) -> None:
        """Do what the records ask for, in order, and see that each is ``done`` or ``given_up``."""
        raise NotImplementedError

    def give_up(self, entry: Entry, error: Exception) -> None:
        """The record cannot be used. Its dead letter is written when the batch is over, in the order of the log."""
        self._given_up[entry.original.partition, entry.original.offset] = error

    async def take(self, number: int, partition: PartitionState, source: str, message: Any) -> None:
        acks, offset = partition.acks[source], message.offset
        entry = Entry(number, Original.of(message), lambda: acks.done(offset))
        self._queue.put_nowait((partition, entry))

    async def advance(self, number: int, partition: PartitionState, now: float, idle: set[str]) -> None:
        """Nothing here depends on time."""

    async def _work_forever(self) -> None:
        while not self._stopped:
            batch = await self._collect()
            while batch and not self.ready() and not self._stopped:
                await asyncio.sleep(0.05)
            # What belongs to a partition that has gone meanwhile is left to its next owner.
            mine = [entry for partition, entry in batch if self.partitions.get(entry.number) is partition]
            if mine and not self._stopped and not self.halted:
                try:
                    await self._work_and_judge(mine)
                except Halted as why:
                    self.halt(why)

    async def _work_and_judge(self, batch: list[Entry]) -> None:
        self._given_up: dict[tuple[int, int], Exception] = {}
        await self.work(batch)
        for entry in batch:
            original = entry.original
            error = self._given_up.get((original.partition, original.offset))
            if error is None:
                self.guard.accepted(original.topic, original.partition)
            else:
                await self.refuse(original, error, entry.done)

    async def _collect(self) -> list[tuple[PartitionState, Entry]]:
        try:
            batch = [await asyncio.wait_for(self._queue.get(), timeout=0.2)]
        except TimeoutError:
            return []
        deadline = self.clock() + self.wait
        while len(batch) < self.size:
            try:
                left = max(0.001, deadline - self.clock())
                batch.append(await asyncio.wait_for(self._queue.get(), timeout=left))
            except TimeoutError:
                break
        return batch
