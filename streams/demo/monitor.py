"""What is watched while a demo streams: the processes' metrics, their memory, and where the run is."""

from __future__ import annotations

import os
import time

from streams.demo.follow import Outcome
from streams.demo.live import Progress
from streams.demo.processes import Parts, Samples, resident_mib
from streams.demo.stream import Pacer, Sender
from streams.demo.summary import Series
from streams.demo.timeline import Timeline

_EVERY = 0.5


class Monitor:
    """Samples everything twice a second. ``broker_pid``: of a broker of ours, to count its memory."""

    def __init__(self, parts: Parts, broker_pid: int | None) -> None:
        self.series = Series()
        self.peak_memory_mib: float | None = None
        self.trainer = Samples([])
        self._worker = Samples([])
        self._parts = parts
        self._pids = [os.getpid(), *(part.pid for part in parts.running.values())]
        self._pids += [] if broker_pid is None else [broker_pid]
        self._started = time.monotonic()

    def sample(self, sender: Sender, outcome: Outcome) -> bool:
        """Take a sample if one is due; whether it was."""
        at = time.monotonic() - self._started
        if self.series.at and at - self.series.at[-1] < _EVERY:
            return False
        self._worker = self._parts.running["worker"].metrics()
        self.trainer = self._parts.running["trainer"].metrics()
        memory = resident_mib(self._pids)
        if memory is not None:
            self.peak_memory_mib = max(memory, self.peak_memory_mib or 0.0)
        self.series.at.append(at)
        self.series.events.append(sender.events)
        self.series.requests.append(len(outcome.requests))
        self.series.unexposed.append(outcome.unexposed_labelled)
        self.series.lag.append(self.lag or 0.0)
        return True

    @property
    def lag(self) -> float | None:
        """Records that the worker roles are behind the ends of their topics."""
        return self._worker.total("gpl_consumer_lag")

    def labels_trained(self) -> float:
        """Label records that the trainer has read."""
        return self.trainer.total("gpl_events_total", topic="labels") or 0.0

    def progress(self, timeline: Timeline, sender: Sender, pacer: Pacer, outcome: Outcome) -> Progress:
        """Where the run is, for the view."""
        return Progress(
            events=sender.events,
            events_total=len(timeline),
            event_ts=pacer.event_ts,
            requests_closed=len(outcome.requests),
            requests=len(timeline.requests),
            unexposed=outcome.unexposed_labelled,
            lag=self.lag,
            anchors=outcome.anchors_by_reason(),
            dead_letters=sum(outcome.dead_letters.values()),
            model=outcome.models[-1].version if outcome.models else None,
            figures=self.trainer.figures(),
        )
