"""What this role has already published, read back from its own output.

After a restart or a rebalance the requests that are still correctable are read and labelled again. Their labels are
in the log already; reading the log back tells which revision says what, so that an unchanged label is not published
twice and a changed one gets the next revision. The headers carry all that is needed, no value is parsed.
"""

from __future__ import annotations

from typing import Any

from kafka import TopicPartition

from streams.kafka import consumer
from streams.settings import KafkaSettings
from streams.topics import full_name

REQUEST_ID = "gpl-request-id"
REVISION = "gpl-revision"
DIGEST = "gpl-digest"
CLOSED_AT = "gpl-closed-at"
NEWEST_AT = "gpl-newest-at"


def read_back(kafka: KafkaSettings, partition: int, since_kafka_ms: int) -> dict[str, tuple[int, bytes]]:
    """request_id -> (highest revision, its digest) of the labels appended to a partition since a Kafka time.

    Blocks until the end of the partition as of now; run it in a thread. Raises kafka errors.
    """
    published: dict[str, tuple[int, bytes]] = {}
    reader = consumer(kafka)
    try:
        tp = TopicPartition(full_name(kafka, "labels"), partition)
        reader.assign([tp])
        start = reader.offsets_for_times({tp: since_kafka_ms})[tp]
        end = reader.end_offsets([tp])[tp]
        if start is None or start.offset >= end:
            return published
        reader.seek(tp, start.offset)
        while reader.position(tp) < end:
            for records in reader.poll(timeout_ms=500).values():
                for record in records:
                    _note(published, record)
    finally:
        reader.close()
    return published


def _note(published: dict[str, tuple[int, bytes]], record: Any) -> None:
    headers = dict(record.headers)
    if REQUEST_ID not in headers:
        return
    request_id = headers[REQUEST_ID].decode()
    revision = int(headers[REVISION])
    if request_id not in published or published[request_id][0] < revision:
        published[request_id] = (revision, headers[DIGEST])
