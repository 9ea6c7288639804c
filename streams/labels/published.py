"""What this role has already published, read back from its own output.

After a restart or a rebalance the requests that are still correctable are read and labelled again. Their labels are
in the log already; reading the log back tells which revision says what, so that an unchanged label is not published
twice and a changed one gets the next revision. The headers carry all that is needed, no value is parsed.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from kafka import TopicPartition

from streams.contracts import Label
from streams.kafka import consumer
from streams.settings import KafkaSettings
from streams.topics import full_name

REQUEST_ID = "gpl-request-id"
REVISION = "gpl-revision"
DIGEST = "gpl-digest"
OUTCOME = "gpl-outcome"
CLOSED_AT = "gpl-closed-at"
NEWEST_AT = "gpl-newest-at"


def headers(label: Label, digest: bytes, closed_at_ms: int, newest_at_ms: int) -> list[tuple[str, bytes]]:
    """The headers of a label record. ``closed_at_ms``: Kafka time of the record that closed the request, or wall time
    when it was the idle timeout; ``newest_at_ms``: Kafka time of the newest record that the label is made of."""
    return [
        (REQUEST_ID, label.request_id.encode()),
        (REVISION, str(label.revision).encode()),
        (DIGEST, digest),
        (OUTCOME, label.outcome.encode()),
        (CLOSED_AT, str(closed_at_ms).encode()),
        (NEWEST_AT, str(newest_at_ms).encode()),
    ]


class Said(NamedTuple):
    """What the log's newest label of a request says. ``outcome``: None of labels of before it was among the headers."""

    revision: int
    digest: bytes
    outcome: str | None


@dataclass
class Published:
    """The labels of one partition that are in the log or on their way there.

    ``labels``: by request_id; ``newest_ms``: Kafka time of the newest one read back, 0
    when there was none; ``ends``: the next offset of each source topic when they were read back.
    """

    labels: dict[str, Said] = field(default_factory=dict)
    newest_ms: int = 0
    ends: dict[str, int] = field(default_factory=dict)

    def keep(self, held: Sequence[Container[str]]) -> None:
        """Forget all labels but those of requests that some of ``held`` holds."""
        self.labels = {name: said for name, said in self.labels.items() if any(name in those for those in held)}

    def note(self, record: Any) -> None:
        """A label record (kafka-python's) that is in the log. Another's, without what ours carry, says nothing."""
        headers = {name: data for name, data in record.headers if data is not None}
        self.newest_ms = max(self.newest_ms, record.timestamp)
        try:
            request_id, revision, digest = headers[REQUEST_ID].decode(), int(headers[REVISION]), headers[DIGEST]
            outcome = headers[OUTCOME].decode() if OUTCOME in headers else None
        except (KeyError, ValueError):
            return
        if request_id not in self.labels or self.labels[request_id].revision < revision:
            self.labels[request_id] = Said(revision, digest, outcome)


def read_back(kafka: KafkaSettings, partition: int, since_kafka_ms: int, sources: Iterable[str]) -> Published:
    """The labels appended to a partition since a Kafka time.

    Blocks until the end of the partition as of now; run it in a thread. Raises kafka errors.
    """
    published = Published()
    reader = consumer(kafka)
    try:
        tp = TopicPartition(full_name(kafka, "labels"), partition)
        inputs = {source: TopicPartition(full_name(kafka, source), partition) for source in sources}
        reader.assign([tp, *inputs.values()])  # or their offsets cannot be asked for
        start = reader.offsets_for_times({tp: since_kafka_ms})[tp]
        ends = reader.end_offsets([tp, *inputs.values()])
        published.ends = {source: ends[of] for source, of in inputs.items()}
        if start is None or start.offset >= ends[tp]:
            return published
        reader.assign([tp])
        reader.seek(tp, start.offset)
        while reader.position(tp) < ends[tp]:
            for records in reader.poll(timeout_ms=500).values():
                for record in records:
                    published.note(record)
    finally:
        reader.close()
    return published
