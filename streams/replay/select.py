"""Which requests are replayed: by event time, user, or offsets of one of the topics, and where to read for them."""

from __future__ import annotations

import bisect
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

import msgspec

from streams.contracts import Feedback, Label, Recall, decode
from streams.replay.log import Entry, Log, LogError, taken
from streams.settings import LabelSettings

FAR = 253_402_300_800_000
"""After every event time that a record can carry."""
TOPICS = ("recalls", "feedback", "labels")
"""Topics whose offsets can choose requests."""
_TAIL = 200
"""Records at the end of a partition among which the newest event is looked for."""

_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(ms|s|m|h|d|w)")
_UNITS = {"ms": 1, "s": 1_000, "m": 60_000, "h": 3_600_000, "d": 86_400_000, "w": 604_800_000}
_OFFSETS = re.compile(r"(?:(\d+):)?(\d+)(?:-(\d+))?")


@dataclass(frozen=True)
class Wanted:
    """What was asked for. Times are event milliseconds, ``to_ms`` excluded; ``last_ms`` counts back from the newest
    recall. ``offsets``: partition (None: every one) -> ranges, both ends included, of ``topic``.
    """

    from_ms: int | None = None
    to_ms: int | None = None
    last_ms: int | None = None
    offsets: Mapping[int | None, Sequence[tuple[int, int]]] = field(default_factory=dict)
    user: str | None = None
    topic: str = "recalls"


@dataclass(frozen=True)
class Selection:
    """Requests with ``from_ms <= recall.ts < to_ms`` of the user, if one is named; where ``recalls`` is given, of those
    offsets only; where ``feedback`` is, only those that joined an event of those offsets.
    """

    from_ms: int
    to_ms: int
    user: str | None = None
    recalls: Mapping[int, Sequence[tuple[int, int]]] | None = None
    feedback: Mapping[int, Sequence[tuple[int, int]]] | None = None

    def partitions(self, log: Log) -> list[int]:
        """Partitions that may hold a chosen request."""
        every = log.partitions("recalls")
        for chosen in (self.recalls, self.feedback):
            if chosen is not None:
                every = [p for p in every if p in chosen]
        return every

    def recall(self, partition: int, offset: int, recall: Recall) -> bool:
        """Whether a recall's request is chosen, as far as the recall tells."""
        if not self.from_ms <= recall.ts < self.to_ms or self.user not in (None, recall.user_id):
            return False
        return self.recalls is None or _inside(self.recalls.get(partition, ()), offset)

    def joined(self, partition: int, feedback_offsets: Sequence[int]) -> bool:
        """Whether what a request joined makes it chosen."""
        if self.feedback is None:
            return True
        return any(_inside(self.feedback.get(partition, ()), offset) for offset in feedback_offsets)

    def label(self, label: Label) -> bool:
        """Whether a recorded label is of a chosen request, as far as it tells."""
        if not self.from_ms <= label.ts < self.to_ms or self.user not in (None, label.user_id):
            return False
        partition, offset = label.provenance.recall
        if self.recalls is not None and not _inside(self.recalls.get(partition, ()), offset):
            return False
        return self.feedback is None or self.joined(partition, label.provenance.feedback)


def _inside(ranges: Sequence[tuple[int, int]], offset: int) -> bool:
    """``ranges`` as ``merged`` gives them."""
    at = bisect.bisect_right(ranges, (offset, FAR)) - 1
    return at >= 0 and offset <= ranges[at][1]


def merged(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same offsets in ascending ranges that do not touch."""
    result: list[tuple[int, int]] = []
    for first, last in sorted(ranges):
        if result and first <= result[-1][1] + 1:
            result[-1] = (result[-1][0], max(last, result[-1][1]))
        else:
            result.append((first, last))
    return result


def duration_ms(text: str) -> int:
    """ "90s", "15m", "2h", "1d", "1w" or "250ms". Raises ValueError."""
    match = _DURATION.fullmatch(text.strip())
    if match is None or len(match[1]) > 15:
        raise ValueError(f"{text!r} is no duration; a number and its unit, such as 90s, 15m, 2h, 1d, 1w or 250ms")
    return int(float(match[1]) * _UNITS[match[2]])


def moment_ms(text: str) -> int:
    """ISO 8601 (UTC unless it says otherwise), or milliseconds since the epoch. Raises ValueError."""
    if text.strip().isdigit() and len(text.strip()) > 8:
        return int(text)
    try:
        moment = datetime.fromisoformat(text.strip())
    except ValueError:
        raise ValueError(f"{text!r} is no time; ISO 8601 such as 1998-03-01T12:00, or milliseconds") from None
    return round((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp() * 1000)


def offset_ranges(text: str) -> dict[int | None, list[tuple[int, int]]]:
    """ "2:100-200,3:7" or, for every partition, "100-200"; both ends included. Raises ValueError."""
    found: dict[int | None, list[tuple[int, int]]] = {}
    for part in text.split(","):
        match = _OFFSETS.fullmatch(part.strip())
        if match is None or int(match[3] or match[2]) < int(match[2]):
            raise ValueError(f"{part!r} is no range of offsets; PARTITION:FIRST-LAST, such as 0:100-200")
        partition = None if match[1] is None else int(match[1])
        found.setdefault(partition, []).append((int(match[2]), int(match[3] or match[2])))
    return found


def time_text(ms: int) -> str:
    """An event time for people; what is outside every calendar as it is."""
    if not 0 <= ms < FAR:
        return "the beginning" if ms <= 0 else "the end"
    return datetime.fromtimestamp(ms / 1000, UTC).isoformat(sep=" ", timespec="milliseconds").replace("+00:00", "Z")


def resolve(log: Log, wanted: Wanted, labels: LabelSettings, held: Selection | None = None) -> Selection:
    """What was asked for, as a selection on this log. ``held``: what the log is complete for, where it is a capture.

    Raises LogError when it names nothing that can be read.
    """
    if held is None:
        return _resolve(log, wanted, labels, Selection(0, FAR))
    if wanted == Wanted(topic=wanted.topic):
        return held
    if wanted.user not in (None, held.user) and held.user is not None:
        raise LogError(f"the capture holds the requests of user {held.user!r} only")
    if wanted.offsets and (held.recalls is not None or held.feedback is not None):
        raise LogError("the capture was made of offsets; it is replayed as a whole, or by time and user")
    found = _resolve(log, wanted, labels, held)
    from_ms, to_ms = max(found.from_ms, held.from_ms), min(found.to_ms, held.to_ms)
    if from_ms >= to_ms:
        raise LogError(f"the capture holds recalls from {time_text(held.from_ms)} to {time_text(held.to_ms)}")
    recalls = held.recalls if found.recalls is None else found.recalls
    feedback = held.feedback if found.feedback is None else found.feedback
    return Selection(from_ms, to_ms, found.user or held.user, recalls, feedback)


def _resolve(log: Log, wanted: Wanted, labels: LabelSettings, held: Selection) -> Selection:
    from_ms = 0 if wanted.from_ms is None else wanted.from_ms
    to_ms = FAR if wanted.to_ms is None else wanted.to_ms
    if wanted.last_ms is not None:
        newest = newest_recall(log, labels, held)
        from_ms, to_ms = max(from_ms, newest - wanted.last_ms), min(to_ms, newest + 1)
    if from_ms >= to_ms:
        raise LogError(f"the range from {time_text(from_ms)} to {time_text(to_ms)} is empty")
    if not wanted.offsets:
        return Selection(from_ms, to_ms, wanted.user)
    ranges = _by_partition(log, wanted)
    if wanted.topic == "labels":
        ranges = _recalls_of(log, ranges)
    chosen = "feedback" if wanted.topic == "feedback" else "recalls"
    oldest, newest = _event_times(log, chosen, ranges)
    if chosen == "feedback":
        # An event at ts joins a request of at most a window before.
        window_ms = int(labels.window_seconds * 1000)
        return Selection(max(from_ms, oldest - window_ms), min(to_ms, newest + 1), wanted.user, feedback=ranges)
    return Selection(max(from_ms, oldest), min(to_ms, newest + 1), wanted.user, recalls=ranges)


def _by_partition(log: Log, wanted: Wanted) -> dict[int, Sequence[tuple[int, int]]]:
    every = log.partitions(wanted.topic)
    ranges: dict[int, list[tuple[int, int]]] = {}
    for partition, some in wanted.offsets.items():
        for p in every if partition is None else [partition]:
            log.span(wanted.topic, p)  # raises for a partition that is not there
            ranges.setdefault(p, []).extend(some)
    return {p: merged(some) for p, some in sorted(ranges.items())}


def entries(log: Log, topic: str, ranges: Mapping[int, Sequence[tuple[int, int]]]) -> Iterator[Entry]:
    """The entries at these offsets."""
    for partition, some in ranges.items():
        for first, last in some:
            yield from log.read(topic, partition, first, last + 1)


def _recalls_of(log: Log, labels: Mapping[int, Sequence[tuple[int, int]]]) -> dict[int, Sequence[tuple[int, int]]]:
    found: dict[int, set[int]] = {}
    for entry in entries(log, "labels", labels):
        try:
            partition, offset = decode(Label, entry.value or b"").provenance.recall
        except msgspec.DecodeError:
            continue
        found.setdefault(partition, set()).add(offset)
    if not found:
        raise LogError("no label can be read at these offsets of the labels topic")
    return {p: merged((offset, offset) for offset in offsets) for p, offsets in sorted(found.items())}


def _event_times(log: Log, topic: str, ranges: Mapping[int, Sequence[tuple[int, int]]]) -> tuple[int, int]:
    times = [ts for entry in entries(log, topic, ranges) if (ts := event_time(entry)) is not None]
    if not times:
        raise LogError(f"no record can be read at these offsets of the {topic} topic; it may have expired")
    return min(times), max(times)


def event_time(entry: Entry) -> int | None:
    """Event time of a recall or feedback entry; None for one that is no valid record."""
    if entry.event_ms is not None:
        return entry.event_ms
    try:
        if entry.topic == "recalls":
            return decode(Recall, entry.value or b"").ts
        return decode(Feedback, entry.value or b"").ts
    except msgspec.DecodeError:
        return None


def newest_recall(log: Log, labels: LabelSettings, held: Selection = Selection(0, FAR)) -> int:
    """Event time of the newest recall of ``held``; those that the labels role refuses do not count.

    Raises LogError when there is none.
    """
    newest = []
    for partition in log.partitions("recalls"):
        # The end of a capture's partition is that of the log it was made of, and may hold none of its recalls.
        for start in (log.span("recalls", partition).end - _TAIL, None):
            if times := list(_taken(log, partition, start, labels, held)):
                newest.append(max(times))
                break
    if not newest:
        raise LogError("the recalls topic holds no recall, so there is no newest one to count from")
    return max(newest)


def _taken(log: Log, partition: int, start: int | None, labels: LabelSettings, held: Selection) -> Iterator[int]:
    """Event times of the recalls of ``held`` that the labels role takes."""
    for entry in log.read("recalls", partition, start):
        recall = taken(entry, Recall, labels.max_ahead_seconds)
        if recall is not None and held.recall(partition, entry.offset, recall):
            yield recall.ts
