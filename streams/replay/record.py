"""``gpl capture``: which entries of a log a replay of the chosen requests needs, written down."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from streams.labels import published
from streams.labels.code import code_version
from streams.replay.capture import SECTIONS, CaptureWriter, Manifest
from streams.replay.join import Requests
from streams.replay.log import Entry, Log, LogError
from streams.replay.run import Replay
from streams.replay.select import Selection
from streams.replay.walk import SOURCES, Step
from streams.settings import Settings

WHOLE = ("calibrations", "item-vectors", "items")
"""Topics that are kept as they are: labels need all calibrations, an explanation the whole catalogue."""
CLOCK_SKEW_MS = 60_000
"""Producers' clocks are taken to agree within this."""


def capture(log: Log, selection: Selection, settings: Settings, directory: Path, replay: Replay) -> Manifest:
    """Save what replaying the selection reads. Raises FileExistsError when the directory exists, LogError when the
    selection holds no request.
    """
    writer = CaptureWriter(directory)
    try:
        requests = sum(_partition(log, selection, replay, p, writer) for p in selection.partitions(log))
        if not requests:
            raise LogError("the selection holds no request; nothing was written")
        for topic in WHOLE:
            for partition in log.partitions(topic):
                writer.open(topic, partition, log.span(topic, partition))
                for entry in log.read(topic, partition):
                    writer.add(entry, log.span(topic, partition))
        _dead_letters(log, selection, writer)
        return writer.finish(
            from_ms=selection.from_ms,
            to_ms=selection.to_ms,
            user=selection.user,
            recalls=_texts(selection.recalls),
            feedback=_texts(selection.feedback),
            frame={
                "dim": log.frame.dim,
                "levels": log.frame.levels,
                "encoder": log.frame.encoder,
                "quantiser": log.frame.quantiser,
            },
            code=code_version(),
            config=settings.fingerprint(),
            settings={name: getattr(settings, name).model_dump(mode="json") for name in SECTIONS},
            requests=requests,
        )
    except BaseException:
        writer.discard()
        raise


def _dead_letters(log: Log, selection: Selection, writer: CaptureWriter) -> None:
    """Why recalls have no label, without what they said; a user's capture holds nothing of others."""
    for partition in log.partitions("dead-letters"):
        writer.open("dead-letters", partition, log.span("dead-letters", partition))
        for entry in log.read("dead-letters", partition) if selection.user is None else ():
            if (dict(entry.headers).get("gpl-topic") or b"").endswith(b"recalls"):
                writer.add(replace(entry, key=None, value=None), log.span("dead-letters", partition))


def _texts(ranges: object) -> dict[str, list[tuple[int, int]]] | None:
    if not isinstance(ranges, dict):
        return None
    return {str(partition): list(some) for partition, some in ranges.items()}


def _partition(log: Log, selection: Selection, replay: Replay, partition: int, writer: CaptureWriter) -> int:
    """Everything of one partition; the number of requests chosen."""
    for topic in (*SOURCES, "user-anchors", "anchor-requests", "labels"):
        writer.open(topic, partition, log.span(topic, partition))
    keep = _Keeping(log, partition, selection, writer)
    users: set[str] = set()
    starts, labels = replay.starts(partition), [setup.labels for setup in replay.setups]
    chosen: set[str] = set()
    first_ms: int | None = None
    for request in Requests(log, partition, selection, starts, labels, keep.step):
        chosen.add(request.recall.request_id)
        users.add(request.recall.user_id)
        first_ms = request.kafka_ms if first_ms is None else min(first_ms, request.kafka_ms)
    keep.flush()
    for topic in ("user-anchors", "anchor-requests"):
        for entry in log.read(topic, partition):
            if (entry.key or b"").decode(errors="replace") in users:
                writer.add(entry, log.span(topic, partition))
    if first_ms is not None:
        # A label is appended after its recall.
        for entry in log.read("labels", partition, log.offset_at("labels", partition, first_ms - CLOCK_SKEW_MS)):
            if (dict(entry.headers).get(published.REQUEST_ID) or b"").decode(errors="replace") in chosen:
                writer.add(entry, log.span("labels", partition))
    return len(chosen)


class _Keeping:
    """Writes the steps that are needed, and between them what the watermark came to."""

    def __init__(self, log: Log, partition: int, selection: Selection, writer: CaptureWriter) -> None:
        self._spans = {topic: log.span(topic, partition) for topic in SOURCES}
        self._writer = writer
        self._everybody = selection.user is None
        self._newest = dict.fromkeys(SOURCES, -1)
        self._moved: dict[str, Entry] = {}

    def step(self, step: Step, needed: bool) -> None:
        entry = step.entry
        ts = entry.event_ms if step.record is None else step.record.ts
        if needed or (ts is None and self._everybody):  # what is refused here is refused there
            self.flush()
            self._writer.add(entry, self._spans[entry.topic])
        if ts is not None and ts > self._newest[entry.topic]:
            self._newest[entry.topic] = ts
            if not needed:
                moved = Entry(entry.topic, entry.partition, entry.offset, entry.kafka_ms, None, None, event_ms=ts)
                self._moved[entry.topic] = moved

    def flush(self) -> None:
        """Between two needed entries only the newest event time of each topic matters."""
        for topic, entry in self._moved.items():
            self._writer.add(entry, self._spans[topic])
        self._moved = {}
