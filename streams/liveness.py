"""Progress as the broker sees it.

A consumer that is stuck knows nothing of the records that it does not fetch, nor that its group has gone on without it.
So both are asked from the broker, over a connection of its own.
"""

from __future__ import annotations

import os
import socket
import threading
import time
import uuid
from collections.abc import Iterable
from typing import Any

import structlog
from kafka import KafkaAdminClient, TopicPartition
from kafka.admin import OffsetSpec
from kafka.errors import KafkaError, UnsupportedVersionError
from kafka.protocol.consumer import IsolationLevel

from streams.kafka import client_options
from streams.metrics import Health
from streams.settings import KafkaSettings, MetricsSettings

log = structlog.get_logger()

EXIT_STALLED = 70
"""Exit code of a process that ends itself because it makes no progress."""
ANSWER_SECONDS = 10.0


def unique_client_id(group: str) -> str:
    """A client id that tells this consumer from every other member of its group."""
    return f"{group}-{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:6]}"


class GroupWatch:
    """What the broker knows of one member of a consumer group. Blocks on the network: for a thread."""

    def __init__(self, kafka: KafkaSettings, group: str, client_id: str, topics: Iterable[str]) -> None:
        self._kafka = kafka
        self._group = group
        self._client_id = client_id
        self._topics = sorted(topics)
        self._admin: Any = None
        self._tells_members = True

    def look(self) -> tuple[bool, dict[TopicPartition, int]]:
        """Whether the client is a member of its group, and the end of what can be read of every partition.

        Raises KafkaError or OSError when the broker does not answer.
        """
        try:
            if self._admin is None:
                milliseconds = int(ANSWER_SECONDS * 1000)
                self._admin = KafkaAdminClient(
                    **client_options(self._kafka), bootstrap_timeout_ms=milliseconds, request_timeout_ms=milliseconds
                )
            return self._is_member(), self._ends()
        except BaseException:
            self.close()
            raise

    def _is_member(self) -> bool:
        if not self._tells_members:
            return True
        try:
            described = self._admin.describe_groups([self._group])[self._group]
        except UnsupportedVersionError:  # not every broker of the demo does
            self._tells_members = False
            return True
        return any(member["client_id"] == self._client_id for member in described["members"])

    def _ends(self) -> dict[TopicPartition, int]:
        wanted = {
            TopicPartition(topic["name"], partition["partition_index"]): OffsetSpec.LATEST
            for topic in self._admin.describe_topics(self._topics)
            for partition in topic["partitions"]
        }
        # As the consumers read: what an open transaction has written is not there yet.
        found = self._admin.list_partition_offsets(wanted, isolation_level=IsolationLevel.READ_COMMITTED)
        return {tp: at.offset for tp, at in found.items()}

    def close(self) -> None:
        """Let go of the connection; a later ``look`` makes a new one."""
        admin, self._admin = self._admin, None
        if admin is not None:
            try:
                admin.close()
            except (KafkaError, OSError) as error:
                log.debug("admin client did not close", error=repr(error))


def health_of(settings: MetricsSettings) -> Health:
    """The health of a process, which ends when a loop has stalled where the settings say so."""
    health = Health(settings.stalled_after_wall_seconds)
    if settings.exit_when_stalled:
        exit_when_stalled(health)
    return health


def exit_when_stalled(health: Health, every: float = 1.0) -> None:
    """End the process with ``EXIT_STALLED`` once a loop has stalled, from a thread that no loop can hold up.

    What was not acknowledged is read again by the next process; a supervisor starts it.
    """

    def watch() -> None:
        while True:
            time.sleep(every)
            if stalled := health.stalled():
                log.error("no progress: the process ends, to be started again", stalled=stalled)
                os._exit(EXIT_STALLED)

    threading.Thread(target=watch, name="liveness", daemon=True).start()
