"""What a replay would read, and about how long it would take, before it is run."""

from __future__ import annotations

import time
from dataclasses import dataclass
from itertools import islice

import numpy as np

from gpl.labels import labeller
from streams.contracts import Recall, decode
from streams.labels.joiner import Joined
from streams.labels.record import AnchorSet, make_label
from streams.replay.log import Log
from streams.replay.run import Setup
from streams.replay.select import Selection, event_time
from streams.replay.walk import SOURCES

_SAMPLE = 50
_STATE = ("user-anchors", "calibrations", "item-vectors")
_ANCHORS = 10
_TIMED_SECONDS = 0.15


@dataclass(frozen=True)
class Part:
    """One topic and partition: records (at most, where it is compacted), bytes as sampled, event times of the first and
    the last record to be read."""

    topic: str
    partition: int
    first: int
    end: int
    bytes: int
    event_ms: tuple[int, int] | None

    @property
    def records(self) -> int:
        return max(0, self.end - self.first)


@dataclass(frozen=True)
class Preview:
    """``seconds``: estimated from the reading rate of the samples and the labelling rate of this machine."""

    parts: list[Part]
    seconds: float
    candidates: float


def preview(log: Log, selection: Selection, setup: Setup, compare: bool, ahead_ms: int) -> Preview:
    """Look at the ends of what would be read. Nothing is written."""
    started, sampled, parts = time.monotonic(), 0, []
    candidates: list[int] = []
    since = selection.from_ms - ahead_ms
    for partition in selection.partitions(log):
        for topic in (*SOURCES, *(("labels",) if compare else ())):
            first, end = log.offset_at(topic, partition, since), log.span(topic, partition).end
            head = list(islice(log.read(topic, partition, first), _SAMPLE))
            sampled += len(head)
            size = sum(len(entry.value or b"") for entry in head) / max(1, len(head))
            times = [ts for entry in head[:1] if topic != "labels" and (ts := event_time(entry)) is not None]
            if times and end > first:
                last = list(log.read(topic, partition, end - 1))
                times += [ts for entry in last if (ts := event_time(entry)) is not None]
            span = (min(times), max(times)) if times else None
            parts.append(Part(topic, partition, first, end, int(size * max(0, end - first)), span))
            if topic == "recalls":
                for entry in head:
                    candidates += _candidates(entry.value)
    for topic in _STATE:
        for partition in log.partitions(topic):
            held = log.span(topic, partition)
            head = list(islice(log.read(topic, partition), _SAMPLE))
            size = sum(len(entry.value or b"") for entry in head) / max(1, len(head))
            parts.append(Part(topic, partition, held.start, held.end, int(size * len(held)), None))
    per_record = (time.monotonic() - started) / max(1, sampled)
    mean = float(np.mean(candidates)) if candidates else 0.0
    recalls = sum(part.records for part in parts if part.topic == "recalls")
    records = sum(part.records for part in parts)
    # A sample pays for its connection, a long read hardly does.
    seconds = records * min(per_record, 5e-5) + recalls * _label_seconds(log, setup, round(mean))
    return Preview(parts, seconds, mean)


def _candidates(value: bytes | None) -> list[int]:
    try:
        return [len(decode(Recall, value or b"").candidates)]
    except ValueError:
        return []


def _label_seconds(log: Log, setup: Setup, candidates: int) -> float:
    """Measured: one request of so many candidates, labelled on this machine."""
    if candidates < 1:
        return 0.0
    frame = log.frame
    rows = np.zeros((candidates, frame.dim), np.float32)
    rows[:, 0] = 1.0
    logprobs = np.full(_ANCHORS, -1.0, np.float32)
    built = labeller.PreparedAnchors.build(
        np.repeat(rows[:1], _ANCHORS, axis=0), logprobs, np.ones(_ANCHORS, np.float32), frame.levels, setup.config
    )
    anchors = AnchorSet(0, 1, "", built, [], "")
    names = [f"item-{n}" for n in range(candidates)]
    joined = Joined(Recall("r", "u", 0, names), {}, 0, [], 0)
    started, done = time.monotonic(), 0
    while (elapsed := time.monotonic() - started) < _TIMED_SECONDS:
        make_label(joined, 0, anchors, None, lambda ids: (ids, rows), setup.versions)
        done += 1
    return elapsed / done
