"""Calibrations on their topic: the one that `gpl fit` made first, then those of `gpl calibrate`. From there labels are
calibrated, replayed and explained."""

from __future__ import annotations

from typing import Any

import structlog

from gpl.labels.calibration import Fitted
from streams.contracts import Calibration, calibration_record, encode
from streams.kafka import producer
from streams.log_view import Handler, LogView
from streams.settings import KafkaSettings
from streams.topics import full_name
from streams.views import CalibrationView

log = structlog.get_logger()

TOPIC = "calibrations"


def publish(kafka: KafkaSettings, fitted: Fitted, ts: int = 0) -> Calibration:
    """Put a calibration on its topic, in force from ``ts`` on, and wait until it is durable."""
    record = calibration_record(fitted.to_dict(), ts)
    with producer(kafka) as out:
        # Compaction keeps every version, and each time from which it was in force: old requests may still ask for it.
        key = record.version if ts == 0 else f"{record.version}-{ts}"
        out.send(full_name(kafka, TOPIC), key=key.encode(), value=encode(record)).get(timeout=30)
    return record


def publish_first(kafka: KafkaSettings, fitted: Fitted) -> None:
    """``publish`` from the beginning of time, if the topic has none; of several that do so all write the same record.

    Raises TopicMissingError, KafkaTimeoutError when the topic cannot be read, and what the broker raises.
    """
    there: list[Any] = []
    _read(kafka, there.append)
    if not there:
        log.info("calibration_published", version=publish(kafka, fitted).version)


def in_force(kafka: KafkaSettings, ts: int) -> Calibration | None:
    """The calibration in force as of an event time; None when there is none. Raises as ``publish_first``."""
    every = CalibrationView()
    _read(kafka, every)
    return every.at(ts)


def _read(kafka: KafkaSettings, handler: Handler) -> None:
    view = LogView(kafka, {TOPIC: handler})
    try:
        view.warm_up()
    finally:
        view.close()
