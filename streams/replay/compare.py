"""Replayed labels against the recorded ones: identical, or changed and why, or on one side only and why."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from streams.replay.attribute import CAUSES, Attribution, Cause, Difference, Move
from streams.replay.log import Log
from streams.replay.output import Output
from streams.replay.recorded import Recorded, RecordedLabels
from streams.replay.run import Replay, Result
from streams.replay.values import same

_LISTED = 200
"""One-sided requests that are listed by name; all are counted."""


@dataclass(frozen=True, slots=True)
class Ranked:
    """A move with the request it belongs to. ``detail``: how the input that caused it differs."""

    request_id: str
    user_id: str
    ts: int
    move: Move
    detail: str


@dataclass
class Group:
    """Moves of one cause. ``requests``: in which it moved an item; ``details``: how its input differed, by request."""

    requests: int = 0
    labels: int = 0
    total: float = 0.0
    largest: float = 0.0
    details: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    top: list[tuple[float, int, Ranked]] = field(default_factory=list)

    @property
    def mean(self) -> float:
        return self.total / self.labels if self.labels else 0.0

    def biggest(self) -> list[Ranked]:
        """The largest moves, largest first."""
        return [ranked for _, _, ranked in sorted(self.top, key=lambda entry: (-entry[0], -entry[1]))]


@dataclass(frozen=True, slots=True)
class OneSided:
    """A request that has a label on one side only."""

    request_id: str
    user_id: str
    ts: int
    why: str


@dataclass
class Sided:
    """Requests on one side: how many by reason, and the first by name."""

    reasons: Counter[str] = field(default_factory=Counter)
    listed: list[OneSided] = field(default_factory=list)

    def add(self, request: OneSided, reason: str) -> None:
        self.reasons[reason] += 1
        if len(self.listed) < _LISTED:
            self.listed.append(request)


@dataclass
class Comparison:
    """What a comparison found. ``item_labels``: compared item by item; ``reproduced``: changed requests whose recorded
    label came out again when the recorded inputs were put back.
    """

    requests: int = 0
    identical: int = 0
    changed: int = 0
    reproduced: int = 0
    item_labels: int = 0
    moved: int = 0
    groups: dict[Cause, Group] = field(default_factory=dict)
    only_recorded: Sided = field(default_factory=Sided)
    only_replayed: Sided = field(default_factory=Sided)
    not_replayable: Sided = field(default_factory=Sided)
    recorded_read: int = 0
    recorded_unreadable: int = 0

    def by_size(self) -> list[tuple[Cause, Group]]:
        """Causes by how many labels they moved, most first."""
        order = {cause: at for at, cause in enumerate(CAUSES)}
        return sorted(self.groups.items(), key=lambda pair: (-pair[1].labels, order[pair[0]]))


def compare(replay: Replay, output: Output, top: int) -> Comparison:
    """Replay, hand every result to ``output``, and compare with the recorded labels; ``top`` moves a cause are kept."""
    found = Comparison()
    dead = _DeadLetters(replay.log)
    for partition in replay.selection.partitions(replay.log):
        anchors = replay.anchors(partition)
        attribution = Attribution(replay, anchors)
        since = replay.selection.from_ms - replay.ahead_ms
        with RecordedLabels(replay.log, partition, replay.selection, since) as recorded:
            for result in replay.partition(partition, anchors):
                output.write(result)
                _one(found, replay, attribution, result, recorded.take(result.request.recall.request_id), dead, top)
            for left in recorded.left():
                why = _why_not_replayed(replay, left)
                label = left.label
                found.only_recorded.add(OneSided(label.request_id, label.user_id, label.ts, why), why)
            found.recorded_read += recorded.read
            found.recorded_unreadable += recorded.unreadable
    return found


def _one(
    found: Comparison,
    replay: Replay,
    attribution: Attribution,
    result: Result,
    recorded: Recorded | None,
    dead: _DeadLetters,
    top: int,
) -> None:
    recall, label = result.request.recall, result.label
    if label is None:
        why = result.lost or ""
        found.not_replayable.add(OneSided(recall.request_id, recall.user_id, recall.ts, why), why.partition(":")[0])
        return
    if recorded is None:
        why = _why_not_recorded(replay, result, dead)
        found.only_replayed.add(OneSided(recall.request_id, recall.user_id, recall.ts, why), why.partition(":")[0])
        return
    found.requests += 1
    found.item_labels += len(recorded.label.exposed.item) + len(recorded.label.unexposed.item)
    if same(recorded.label, label):
        found.identical += 1
        return
    found.changed += 1
    difference = attribution.difference(result, recorded)
    found.reproduced += difference.reproduced
    found.moved += len(difference.moves)
    _count(found, difference, top)


def _count(found: Comparison, difference: Difference, top: int) -> None:
    label = difference.recorded.label
    causes = dict.fromkeys(move.cause for move in difference.moves)
    for cause in causes:
        group = found.groups.setdefault(cause, Group())
        group.requests += 1
        group.details[difference.causes.get(cause, "")] += 1
    for move in difference.moves:
        group = found.groups[move.cause]
        group.labels += 1
        group.total += move.size
        group.largest = max(group.largest, move.size)
        group.kinds[move.kind] += 1
        # The count breaks ties: of equal moves the first stay.
        entry = (move.size, -group.labels)
        if len(group.top) < top or entry > group.top[0][:2]:
            detail = difference.causes.get(move.cause, "")
            ranked = Ranked(label.request_id, label.user_id, label.ts, move, detail)
            heapq.heappush(group.top, (*entry, ranked))
            if len(group.top) > top:
                heapq.heappop(group.top)


def _why_not_recorded(replay: Replay, result: Result, dead: _DeadLetters) -> str:
    request = result.request
    letter = dead.reason(request.partition, request.offset)
    if letter is not None:
        return f"its recall is a dead letter: {letter}"
    if not request.over:
        return "its window is not over on the log: it is labelled once events go on, or after the idle timeout"
    return "no label on the log: the labels role is behind or was stopped"


def _why_not_replayed(replay: Replay, recorded: Recorded) -> str:
    partition, offset = recorded.label.provenance.recall
    if partition not in replay.log.partitions("recalls"):
        return "its recall is not in this log"
    if offset < replay.log.span("recalls", partition).start:
        return "its recall has expired from the log"
    return "its recall was not met where the range is read; a larger --ahead reads further back"


class _DeadLetters:
    """Why recalls are dead letters, by partition and offset; read when first asked for."""

    def __init__(self, log: Log) -> None:
        self._log = log
        self._reasons: dict[tuple[str, str], str] | None = None

    def reason(self, partition: int, offset: int) -> str | None:
        if self._reasons is None:
            self._reasons = dict(self._read())
        return self._reasons.get((str(partition), str(offset)))

    def _read(self) -> Iterator[tuple[tuple[str, str], str]]:
        for partition in self._log.partitions("dead-letters"):
            for entry in self._log.read("dead-letters", partition):
                said = {name: (data or b"").decode(errors="replace") for name, data in entry.headers}
                if said.get("gpl-topic", "").endswith("recalls"):
                    why = said.get("gpl-message") or said.get("gpl-error", "no reason given")
                    yield (said.get("gpl-partition", ""), said.get("gpl-offset", "")), why
