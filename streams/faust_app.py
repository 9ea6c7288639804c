"""What every Faust role shares: the app, publishing that is durable before anything is acknowledged, ordered acks.

Faust commits past a message in flight when messages are acknowledged out of order (its ``_new_offset`` takes an
acknowledged offset right after the committed one for contiguous, and any offset when nothing was committed yet).
So every partition's offsets go through ``OrderedAcks``, which only ever lets the next one be committed.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import tempfile
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faust
import msgspec
import structlog
from faust.exceptions import ProducerSendError

from streams import dead_letters, metrics
from streams.kafka import BATCH_OVERHEAD_BYTES, MAX_REQUEST_BYTES, RecordTooLargeError, check_size
from streams.lease import Fenced
from streams.liveness import unique_client_id
from streams.settings import KafkaSettings
from streams.topics import full_name

log = structlog.get_logger()


def make_app(kafka: KafkaSettings, role: str) -> Any:
    """The Faust app of one role, in its own consumer group. Raw bytes in and out; topics are made elsewhere."""
    options: dict[str, Any] = {}
    if kafka.security_protocol != "PLAINTEXT":
        options["broker_credentials"] = _credentials(kafka)
    app = faust.App(
        f"{kafka.group_prefix}{role}",
        broker=";".join(f"kafka://{server}" for server in kafka.bootstrap_servers.split(",")),
        topic_partitions=kafka.partitions,
        topic_replication_factor=kafka.replication_factor,
        topic_allow_declare=False,
        topic_disable_leader=True,
        key_serializer="raw",
        value_serializer="raw",
        store="memory://",
        web_enabled=False,
        broker_commit_interval=0.5,
        # So that the broker can be asked whether this very consumer is still a member.
        broker_client_id=unique_client_id(f"{kafka.group_prefix}{role}"),
        # A killed worker's partitions move on after this long. Heartbeats have a thread of their own, so that a
        # busy event loop does not lose its partitions.
        broker_session_timeout=10.0,
        broker_heartbeat_interval=2.0,
        broker_max_poll_interval=300.0,
        # Faust makes this directory whether or not there are tables to keep in it; there are none.
        datadir=Path(tempfile.gettempdir()) / "gpl-faust",
        consumer_auto_offset_reset="earliest",
        # So many at a time are worked on before the loop looks at anything else.
        broker_max_poll_records=1000,
        consumer_max_fetch_size=max(2**20, kafka.max_record_bytes + BATCH_OVERHEAD_BYTES),
        producer_max_request_size=MAX_REQUEST_BYTES,
        # A batch a partition, compressed as a whole; a record that is larger makes a batch of its own.
        producer_max_batch_size=512 * 1024,
        producer_compression_type=None if kafka.compression == "none" else kafka.compression,
        producer_linger=0.005,
        stream_recovery_delay=0.0,
        # Or stopping and every rebalance would wait for events that are held for their window.
        stream_wait_empty=False,
        **options,
    )
    # An app that is started in a running loop is never "finalised" by a command line.
    app.finalize()
    return app


def show_errors() -> None:
    """Errors that Faust logs go to stderr. Its loggers have handlers that do nothing, which keep them from others."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s [%(levelname)s] %(name)s: %(message)s"))
    for name in ("faust", "mode", "streams"):  # a service logs under the module of its class
        logger = logging.getLogger(name)
        logger.setLevel(logging.ERROR)
        logger.addHandler(handler)


def _credentials(kafka: KafkaSettings) -> Any:
    import ssl

    from faust.auth import SASLCredentials, SSLCredentials

    kafka.check_security()
    context = ssl.create_default_context(cafile=str(kafka.ssl_cafile) if kafka.ssl_cafile else None)
    tls = kafka.security_protocol.endswith("SSL")
    if kafka.security_protocol == "SSL":
        return SSLCredentials(context=context)
    return SASLCredentials(
        username=kafka.sasl_username,
        password=kafka.sasl_password.get_secret_value() if kafka.sasl_password else None,
        mechanism=kafka.sasl_mechanism,
        ssl_context=context if tls else None,
    )


def raw_topic(app: Any, kafka: KafkaSettings, *names: str) -> Any:
    """A Faust topic over one or more of our topics, delivering bytes."""
    return app.topic(
        *(full_name(kafka, name) for name in names),
        key_type=bytes,
        value_type=bytes,
        key_serializer="raw",
        value_serializer="raw",
    )


class OrderedAcks:
    """The unacknowledged offsets of one partition; what may be committed is the end of the done prefix."""

    __slots__ = ("_done", "_offsets", "_revoked", "committable")

    def __init__(self) -> None:
        self._offsets: deque[int] = deque()
        self._done: set[int] = set()
        self._revoked = False
        self.committable: int | None = None
        """Next offset to read after a restart; None while nothing is done."""

    def __len__(self) -> int:
        return len(self._offsets)

    def add(self, offset: int) -> bool:
        """Take charge of a record. False when its offset is at or below one already taken (redelivered)."""
        newest = self._offsets[-1] if self._offsets else (self.committable or 0) - 1
        if self._revoked or offset <= newest:
            return False
        self._offsets.append(offset)
        return True

    def done(self, offset: int) -> None:
        """Everything that the record at ``offset`` asked for is durable."""
        if self._revoked:
            return
        offsets, done = self._offsets, self._done
        if offset != offsets[0]:
            done.add(offset)
            return
        offsets.popleft()
        while offsets and offsets[0] in done:
            offset = offsets.popleft()
            done.discard(offset)
        self.committable = offset + 1

    def revoke(self) -> None:
        """The partition is gone: what is left is for its next owner to read again."""
        self._revoked = True
        self._offsets.clear()
        self._done.clear()


class Publisher:
    """Sends records and tells when they are acknowledged by all in-sync replicas.

    A send that fails for good stops the process through ``on_failure``: nothing after it is acknowledged, so a
    restart repeats the work and nothing is lost. What is `Fenced` is neither sent nor acknowledged here: its next
    owner does both.
    """

    def __init__(self, app: Any, kafka: KafkaSettings, on_failure: Callable[[BaseException], None]) -> None:
        self._app = app
        self._kafka = kafka
        self._on_failure = on_failure
        self._pending: set[Any] = set()

    async def send(
        self,
        topic: str,
        key: bytes | None,
        value: bytes | None,
        headers: dead_letters.Headers = (),
        then: Callable[[], None] | None = None,
        partition: int | None = None,
    ) -> asyncio.Future[Any] | None:
        """Send; call ``then`` once acknowledged. Raises RecordTooLargeError at once for a record over the cap.

        ``partition``: records of a user stay in the partition their input came from, whatever hashed it there.
        Returns the future of the acknowledgement, None where the partition is gone.
        """
        check_size(self._kafka, full_name(self._kafka, topic), key, value)
        return await self._send(topic, key, value, headers, then, partition)

    async def _send(
        self,
        topic: str,
        key: bytes | None,
        value: bytes | None,
        headers: dead_letters.Headers,
        then: Callable[[], None] | None,
        partition: int | None,
    ) -> asyncio.Future[Any] | None:
        name = full_name(self._kafka, topic)
        # The producer itself: a Faust topic would put a future message and its callbacks in between.
        try:
            future: asyncio.Future[Any] = await self._app.producer.send(
                name, key, value, partition, None, list(headers)
            )
        except ProducerSendError as error:
            if isinstance(error.__cause__, Fenced):
                return None
            raise
        self._pending.add(future)

        def acknowledged(result: asyncio.Future[Any]) -> None:
            self._pending.discard(result)
            if result.cancelled():
                return
            error = result.exception()
            if isinstance(error, Fenced):
                return
            if error is not None:
                self._on_failure(error)
            elif then is not None:
                then()

        future.add_done_callback(acknowledged)
        return future

    async def deliver(self, topic: str, key: bytes, value: bytes, partition: int) -> None:
        """Send and wait until it is acknowledged, or until the partition is gone."""
        future = await self.send(topic, key, value, partition=partition)
        if future is not None:
            with contextlib.suppress(Fenced):
                await future

    async def dead_letter(self, original: dead_letters.Original, error: Exception, then: Callable[[], None]) -> None:
        """Write the record's original bytes and headers to the dead letters, then acknowledge it through ``then``."""
        topic = original.topic.removeprefix(self._kafka.prefix)
        metrics.DEAD_LETTERS.labels(topic, dead_letters.reason_of(error)).inc()
        log.warning(
            "dead letter",
            topic=original.topic,
            partition=original.partition,
            offset=original.offset,
            error=str(error),
        )
        headers = dead_letters.headers(original, error)
        # Whatever its size: a record over the cap that somebody else's producer brought must have a way out.
        await self._send(dead_letters.TOPIC, original.key, dead_letters.value_of(original), headers, then, None)


REFUSALS = (msgspec.DecodeError, dead_letters.Refused, RecordTooLargeError, UnicodeDecodeError)
"""Errors that mean: this record, not this process. Everything else is a bug and stops the process."""
