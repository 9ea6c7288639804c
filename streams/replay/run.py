"""Replay: chosen requests of a log labelled again by the code that labels, in a defined order.

By partition, then by the offset of the recall: so the same log and settings give the same bytes, from a broker or from
a capture. A request whose anchors the log no longer holds is not labelled but named, with the reason.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, field

from gpl.labels import labeller
from streams.contracts import Calibration, Label
from streams.frame import Frame
from streams.labels.record import AnchorSet, Versions, make_label
from streams.replay.join import Request, Requests
from streams.replay.log import Log
from streams.replay.select import Selection
from streams.replay.state import AnchorHistory, Calibrations, InForce, Items, Refresh
from streams.replay.walk import Step
from streams.settings import LabelSettings, Settings
from streams.views import labeller_config


@dataclass(frozen=True)
class Setup:
    """One way to label: label settings, what the library makes of them, and the versions that provenance names."""

    labels: LabelSettings
    config: labeller.Config
    versions: Versions

    @classmethod
    def of(cls, settings: Settings, frame: Frame) -> Setup:
        versions = Versions(frame.encoder, frame.quantiser, settings.fingerprint())
        return cls(settings.labels, labeller_config(settings.labels), versions)


@dataclass(frozen=True, slots=True)
class Result:
    """A request and its replayed label; ``lost`` says why there is none."""

    request: Request
    in_force: InForce
    calibration: Calibration | None
    label: Label | None
    lost: str | None


@dataclass
class Progress:
    """Counted while replaying: entries and bytes read and records refused, by topic; requests by outcome."""

    read: Counter[str] = field(default_factory=Counter)
    bytes: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    requests: Counter[str] = field(default_factory=Counter)
    labels: Counter[str] = field(default_factory=Counter)
    event_ms: tuple[int, int] | None = None

    def count(self, result: Result) -> None:
        ts = result.request.recall.ts
        low, high = self.event_ms or (ts, ts)
        self.event_ms = (min(low, ts), max(high, ts))
        if result.label is None:
            self.requests["not_replayable"] += 1
            return
        self.requests[result.label.outcome] += 1
        self.labels["exposed"] += len(result.label.exposed.item)
        self.labels["unexposed"] += len(result.label.unexposed.item)


class Replay:
    """Labels chosen requests of a log under ``setup``. ``beside``: other set-ups under which requests are joined too
    (``Result.request.joined``, in their order after the first), for who compares.
    """

    def __init__(
        self, log: Log, selection: Selection, setup: Setup, *beside: Setup, ahead_ms: int | None = None
    ) -> None:
        self.log = log
        self.selection = selection
        self.setup = setup
        self.setups = (setup, *beside)
        self.ahead_ms = int(setup.labels.max_ahead_seconds * 1000) if ahead_ms is None else ahead_ms
        self.calibrations = Calibrations(log)
        self.items = Items(log)
        self.progress = Progress()
        self.open: set[str] = set()
        """Requests whose window, under the last of the set-ups, the log does not see the end of."""

    def starts(self, partition: int) -> dict[str, int]:
        """First offsets to read. An event is at most ``ahead_ms`` ahead of the Kafka timestamp it was logged with (the
        labels role refuses others), so what was logged earlier is of before the range.
        """
        since = self.selection.from_ms - self.ahead_ms
        return {topic: self.log.offset_at(topic, partition, since) for topic in ("recalls", "feedback")}

    def partition(
        self,
        partition: int,
        anchors: AnchorHistory,
        starts: Mapping[str, int] | None = None,
        tap: Callable[[Step, bool], None] | None = None,
    ) -> Generator[Result, None, None]:
        """The results of one partition, by recall offset. ``anchors``: of that partition; ``starts``: where to read
        from, for who knows better; ``tap``: see ``Requests``.
        """
        settings = [setup.labels for setup in self.setups]
        if starts is None:
            starts = self.starts(partition)
        requests = Requests(self.log, partition, self.selection, starts, settings, tap)
        try:
            for request in requests:
                result = self.result(request, anchors)
                self.progress.count(result)
                if not request.over:
                    self.open.add(request.recall.request_id)
                yield result
        finally:
            self.progress.read += requests.walk.read
            self.progress.bytes += requests.walk.bytes
            self.progress.refused += requests.walk.refused

    def anchors(self, partition: int) -> AnchorHistory:
        """The anchors of a partition's users: as many as the range can ask for are held in memory."""
        return AnchorHistory(self.log, partition, self.selection.user)

    def __iter__(self) -> Iterator[Result]:
        for partition in self.selection.partitions(self.log):
            yield from self.partition(partition, self.anchors(partition))

    def result(self, request: Request, anchors: AnchorHistory) -> Result:
        """A request labelled with what the log says was in force."""
        recall = request.recall
        in_force = anchors.at(recall.user_id, recall.ts, request.kafka_ms)
        calibration = self.calibrations.at(recall.ts)
        if in_force.lost is not None:
            return Result(request, in_force, calibration, None, in_force.lost)
        ready = ready_anchors(anchors, in_force.refresh, self.setup.config)
        lookup, versions = self.items.catalogue.lookup, self.setup.versions
        label = make_label(request.joined[0], request.partition, ready, calibration, lookup, versions)
        return Result(request, in_force, calibration, label, None)


def ready_anchors(anchors: AnchorHistory, refresh: Refresh | None, config: labeller.Config) -> AnchorSet | None:
    """A refresh prepared for matching; None for none."""
    return None if refresh is None else anchors.ready(refresh, config)
