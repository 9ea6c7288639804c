"""Bounded memory: while more is held than the caps allow, the source that is ahead in event time is not read.

A request is held until both sources have passed its window, so what one source is ahead of the other is held for
nothing. Reading the two side by side holds the least that the window, the lateness and the retention ask for, and no
correct worker can hold less; over the cap even then, it goes on, and says so in ``gpl_over_cap``: more workers, a
shorter window or ``labels.store = "disk"`` is what helps.

The source behind is always read, so the group's poll interval is kept and progress is certain: it catches up, or it
becomes idle and counts no longer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from streams import metrics
from streams.labels.partition import SOURCES, Partition
from streams.settings import LabelSettings

EVENT_BYTES = 700
"""Memory of one feedback held: the struct, its ids and its places in the joiner's tables. An estimate."""
REQUEST_BYTES = 900
"""Memory of one request held beside its recall's bytes. An estimate."""
RESUME_BELOW = 0.9
"""Of the caps: reading goes on below this, so that a partition is not paused and resumed with every batch."""

Switch = Callable[[int, str], None]
"""Partition and source to be paused, or to be read again."""


class Backpressure:
    """The caps of one worker over all its partitions. ``pause`` and ``resume`` act on the consumer."""

    def __init__(self, labels: LabelSettings, pause: Switch, resume: Switch) -> None:
        self._max_open = labels.max_open_requests
        self._max_bytes = labels.max_retained_bytes
        self._on_disk = labels.store == "disk"
        self._pause = pause
        self._resume = resume

    def held_bytes(self, partitions: Mapping[int, Partition]) -> int:
        """An estimate of the memory that open and retained requests take."""
        total = 0
        for partition in partitions.values():
            joiner = partition.joiner
            total += EVENT_BYTES * joiner.events + REQUEST_BYTES * joiner.retained
            if not self._on_disk:
                total += joiner.retained_bytes
        return total

    def apply(self, partitions: Mapping[int, Partition]) -> bool:
        """Pause and resume as what is held now asks for; whether it is over a cap."""
        held, opened = self.held_bytes(partitions), sum(len(p.joiner) for p in partitions.values())
        share = max(held / self._max_bytes, opened / self._max_open)
        for number, partition in partitions.items():
            if share > 1:
                wanted = self._ahead(partition)
            else:
                wanted = partition.paused if share > RESUME_BELOW else None
                if wanted is not None and wanted != self._ahead(partition):
                    wanted = None  # the other one has caught up
            if wanted == partition.paused:
                continue
            if partition.paused is not None:
                self._resume(number, partition.paused)
            if wanted is not None:
                metrics.PAUSES.labels(wanted).inc()
                self._pause(number, wanted)
            partition.paused = wanted
        metrics.RETAINED_BYTES.set(held)
        metrics.RETAINED_REQUESTS.set(sum(p.joiner.retained for p in partitions.values()))
        metrics.OPEN_REQUESTS.set(opened)
        metrics.OVER_CAP.set(share > 1)
        for source in SOURCES:
            metrics.PAUSED_PARTITIONS.labels(source).set(sum(p.paused == source for p in partitions.values()))
        return share > 1

    @staticmethod
    def _ahead(partition: Partition) -> str | None:
        """The source that has been read further, unless the other is idle: nothing more is known to come from it."""
        first, second = SOURCES
        newest = partition.watermark.newest
        if newest(first) == newest(second):
            return None
        ahead, behind = (first, second) if newest(first) > newest(second) else (second, first)
        return None if partition.watermark.is_idle(behind) else ahead
