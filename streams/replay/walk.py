"""Recalls and feedback of one partition in one order, with the watermark that the labels role would have had.

The two topics are merged by Kafka timestamp, which is the order in which they were appended. So the walk, and with it
every decision that depends on what came before what, is a function of the log alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain

from streams.contracts import Feedback, Recall
from streams.replay.log import Entry, Log, taken
from streams.settings import LabelSettings
from streams.watermark import END, Watermark

SOURCES = ("recalls", "feedback")
_KINDS: Mapping[str, type[Recall] | type[Feedback]] = {"recalls": Recall, "feedback": Feedback}


@dataclass(frozen=True, slots=True)
class Step:
    """One entry in order. ``record`` is None for one that labels nothing: refused, or kept as its event time only.

    ``watermark``: of both topics, after this entry.
    """

    entry: Entry
    record: Recall | Feedback | None
    watermark: int


class Walk:
    """Iterates over the steps of a partition from the offsets ``starts`` until nothing before ``until_ms`` can change.

    ``refused``: records that the labels role puts into the dead letters, by topic; ``read``: entries by topic;
    ``exhausted``: whether the log ended before the watermark came to ``until_ms``.
    """

    def __init__(
        self, log: Log, partition: int, starts: Mapping[str, int], labels: LabelSettings, until_ms: int
    ) -> None:
        self._log = log
        self._partition = partition
        self._starts = starts
        self._watermark = Watermark(SOURCES, int(labels.allowed_lateness_seconds * 1000))
        self._max_ahead = labels.max_ahead_seconds
        self._until = until_ms
        self.refused: Counter[str] = Counter()
        self.read: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()
        self.exhausted = True

    def __iter__(self) -> Iterator[Step]:
        for entry in self._merged():
            topic = entry.topic
            self.read[topic] += 1
            self.bytes[topic] += len(entry.value or b"")
            record = None
            if entry.event_ms is not None:
                self._watermark.observe(topic, entry.event_ms)
            else:
                record = taken(entry, _KINDS[entry.topic], self._max_ahead)
                if record is None:
                    self.refused[topic] += 1
                else:
                    self._watermark.observe(topic, record.ts)
            watermark = self._watermark.value()
            yield Step(entry, record, watermark)
            if watermark >= self._until:
                self.exhausted = False
                return

    def _merged(self) -> Iterator[Entry]:
        """By Kafka timestamp, equal ones recalls first; within a topic by offset, whatever the timestamps say."""
        readers = [self._log.read(topic, self._partition, self._starts.get(topic)) for topic in SOURCES]
        try:
            heads = [next(reader, None) for reader in readers]
            while (first := heads[0]) is not None and (second := heads[1]) is not None:
                at = 0 if first.kafka_ms <= second.kafka_ms else 1
                yield first if at == 0 else second
                heads[at] = next(readers[at], None)
            yield from (head for head in heads if head is not None)
            yield from chain(*readers)
        finally:
            for reader in readers:
                reader.close()  # type: ignore[attr-defined]


def horizon(labels: LabelSettings, to_ms: int) -> int:
    """Watermark at which no request before ``to_ms`` is retained any more."""
    return min(END - 1, to_ms + int((labels.window_seconds + labels.retention_seconds) * 1000))
