"""kafka-python clients made from the settings: one place for security, sizes and acknowledgement."""

from __future__ import annotations

from typing import Any

from kafka import KafkaAdminClient, KafkaConsumer, KafkaProducer
from kafka.errors import KafkaError, KafkaTimeoutError

from streams.settings import KafkaSettings

BATCH_OVERHEAD_BYTES = 65_536
"""What a batch may add to its one record: headers (a dead letter's error message among them) and framing."""


MAX_REQUEST_BYTES = 2**30
"""What a client may hand over before compression. The cap on records is ``check_size``, which all sends but those of
dead letters pass: somebody else's producer may bring a record that is over the cap until it is compressed."""


class NoBrokerError(ConnectionError, KafkaError):  # type: ignore[misc]
    """No broker answers at ``kafka.bootstrap_servers``."""


class RecordTooLargeError(ValueError):
    """A record over ``kafka.max_record_bytes``: refused here, never truncated."""


def client_options(kafka: KafkaSettings) -> dict[str, Any]:
    """Connection options that every kafka-python client takes. Raises ConfigError for security settings that are not
    complete."""
    kafka.check_security()
    options: dict[str, Any] = {
        "bootstrap_servers": kafka.bootstrap_servers.split(","),
        "security_protocol": kafka.security_protocol,
    }
    if kafka.sasl_mechanism is not None:
        options["sasl_mechanism"] = kafka.sasl_mechanism
        options["sasl_plain_username"] = kafka.sasl_username
        if kafka.sasl_password is not None:
            options["sasl_plain_password"] = kafka.sasl_password.get_secret_value()
    if kafka.ssl_cafile is not None:
        options["ssl_cafile"] = str(kafka.ssl_cafile)
    return options


def check_size(kafka: KafkaSettings, topic: str, key: bytes | None, value: bytes | None) -> None:
    """Raise RecordTooLargeError when a record is over the cap (before compression)."""
    size = len(key or b"") + len(value or b"")
    if size > kafka.max_record_bytes:
        raise RecordTooLargeError(
            f"{topic}: record under key {key!r} has {size} bytes, kafka.max_record_bytes is {kafka.max_record_bytes}"
        )


def _connect(kafka: KafkaSettings, client: Any, options: dict[str, Any]) -> Any:
    try:
        return client(**options)
    except KafkaTimeoutError as error:
        raise NoBrokerError(
            f"kafka.bootstrap_servers = {kafka.bootstrap_servers!r}: no broker answers ({error})"
        ) from error


def admin(kafka: KafkaSettings, timeout: float) -> KafkaAdminClient:
    """A client for the topics. Raises NoBrokerError when no broker answers within ``timeout`` seconds."""
    options = {**client_options(kafka), "bootstrap_timeout_ms": int(timeout * 1000)}
    return _connect(kafka, KafkaAdminClient, options)


def producer(kafka: KafkaSettings, **overrides: Any) -> KafkaProducer:
    """A producer that waits for all in-sync replicas and keeps order on retries. Raises NoBrokerError."""
    options: dict[str, Any] = {
        **client_options(kafka),
        "acks": "all",
        "enable_idempotence": True,
        "linger_ms": 5,
        "compression_type": None if kafka.compression == "none" else kafka.compression,
        "max_request_size": MAX_REQUEST_BYTES,
    }
    return _connect(kafka, KafkaProducer, {**options, **overrides})


def consumer(kafka: KafkaSettings, **overrides: Any) -> KafkaConsumer:
    """A consumer without a group that commits nothing: positions belong to the caller. Raises NoBrokerError."""
    options: dict[str, Any] = {
        **client_options(kafka),
        "enable_auto_commit": False,
        "auto_offset_reset": "earliest",
        # What a transactional producer took back was never said.
        "isolation_level": "read_committed",
        # A single record may be as large as the cap.
        "max_partition_fetch_bytes": max(2**20, kafka.max_record_bytes + BATCH_OVERHEAD_BYTES),
    }
    return _connect(kafka, KafkaConsumer, {**options, **overrides})
