"""Where replayed labels go: files in a directory, or a topic of the replay's own."""

from __future__ import annotations

import gzip
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, Protocol

import msgspec
from kafka.errors import TopicAlreadyExistsError, for_code

from streams import topics
from streams.contracts import encode
from streams.kafka import admin, consumer, producer
from streams.labels import published
from streams.labels.record import digest
from streams.replay.log import LogError
from streams.replay.run import Result
from streams.settings import KafkaSettings

LABELS, LOST, MANIFEST = "labels.jsonl.gz", "not-replayable.jsonl", "manifest.json"


class Output(Protocol):
    """Takes results in order. ``name`` says where they are found."""

    name: str

    def write(self, result: Result) -> None: ...

    def finish(self, about: Mapping[str, Any]) -> None: ...


class Nowhere:
    """For a comparison that is all that is wanted."""

    name = "nowhere"

    def write(self, result: Result) -> None:
        pass

    def finish(self, about: Mapping[str, Any]) -> None:
        pass


class Files:
    """A new directory. Equal results give equal files, byte for byte. Raises FileExistsError for one that exists."""

    def __init__(self, directory: Path) -> None:
        if directory.exists():
            raise FileExistsError(f"{directory} exists; a replay is written to a new directory")
        directory.mkdir(parents=True)
        self.name = str(directory)
        self._directory = directory
        self._raw: IO[bytes] = (directory / LABELS).open("wb")
        self._labels = gzip.GzipFile(filename="", mode="wb", fileobj=self._raw, mtime=0, compresslevel=3)
        self._lost: IO[bytes] = (directory / LOST).open("wb")
        self._said = hashlib.sha256()

    def write(self, result: Result) -> None:
        request = result.request
        if result.label is None:
            place = {
                "request_id": request.recall.request_id,
                "user_id": request.recall.user_id,
                "ts": request.recall.ts,
            }
            line = {**place, "recall": [request.partition, request.offset], "reason": result.lost}
            self._lost.write(msgspec.json.encode(line) + b"\n")
            return
        text = encode(result.label) + b"\n"
        self._said.update(text)
        self._labels.write(text)

    def finish(self, about: Mapping[str, Any]) -> None:
        """Close the files and write the manifest: ``about``, and the SHA-256 of the labels as plain text."""
        self._labels.close()
        self._raw.close()
        self._lost.close()
        manifest = {**about, "labels_sha256": self._said.hexdigest()}
        text = msgspec.json.format(msgspec.json.encode(manifest), indent=2)
        (self._directory / MANIFEST).write_bytes(text + b"\n")


class Topic:
    """The topic ``<prefix>labels``, made here, with the partitions of the log's. Raises LogError for a prefix that is
    production's, and for a topic that holds records already.
    """

    def __init__(self, kafka: KafkaSettings, prefix: str, partitions: int) -> None:
        if prefix == kafka.prefix or not prefix:
            raise LogError(
                f"output prefix {prefix!r}: production's topics have it; take another, such as replay.check."
            )
        own = kafka.model_copy(update={"prefix": prefix})
        self.name = topics.full_name(own, "labels")
        self._create(own, partitions)
        self._producer = producer(own)
        self._errors: list[BaseException] = []

    def _create(self, kafka: KafkaSettings, partitions: int) -> None:
        spec = next(spec for spec in topics.TOPICS if spec.name == "labels")
        wanted = {
            "num_partitions": partitions,
            "replication_factor": kafka.replication_factor,
            "configs": spec.configs(kafka),
        }
        with admin(kafka, timeout=30) as client:
            answer = client.create_topics({self.name: wanted}, raise_errors=False)["topics"][0]
            error = for_code(answer["error_code"])
            if answer["error_code"] != 0 and error is not TopicAlreadyExistsError:
                raise error(f"topic {self.name}: {answer['error_message']}")
            client.wait_for_topics([self.name], timeout_ms=30_000)
        reader = consumer(kafka)
        try:
            from kafka import TopicPartition

            tps = [TopicPartition(self.name, p) for p in reader.partitions_for_topic(self.name) or ()]
            if len(tps) != partitions or any(reader.end_offsets(tps).values()):
                raise LogError(f"topic {self.name} is in use; a replay writes to a topic of its own")
        finally:
            reader.close()

    def write(self, result: Result) -> None:
        """Queue the label. Raises what an earlier one failed with."""
        if self._errors:
            raise self._errors[0]
        if result.label is None:
            return
        headers = [
            (published.REQUEST_ID, result.label.request_id.encode()),
            (published.REVISION, b"0"),
            (published.DIGEST, digest(result.label)),
        ]
        sent = self._producer.send(
            self.name,
            key=result.label.user_id.encode(),
            value=encode(result.label),
            headers=headers,
            partition=result.request.partition,
        )
        sent.add_errback(self._errors.append)

    def finish(self, about: Mapping[str, Any]) -> None:
        """Wait until every label is acknowledged. Raises what one failed with."""
        self._producer.flush(timeout=120)
        self._producer.close(timeout=30)
        if self._errors:
            raise self._errors[0]
