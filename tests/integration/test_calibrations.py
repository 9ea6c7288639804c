from __future__ import annotations

from typing import Any

from gpl.labels.calibration import NoCalibration, Platt
from streams import calibrations
from streams.contracts import Calibration, decode
from streams.log_view import LogView
from streams.settings import KafkaSettings
from streams.views import CalibrationView

FITTED = Platt(2.5, -1.0, 100)


def on_topic(kafka: KafkaSettings) -> list[Calibration]:
    records: list[Any] = []
    view = LogView(kafka, {calibrations.TOPIC: records.append})
    view.warm_up()
    view.close()
    return [decode(Calibration, record.value) for record in records]


def test_a_topic_without_a_calibration_gets_the_fitted_one_and_another_keeps_its_own(kafka_settings: KafkaSettings):
    calibrations.publish_first(kafka_settings, FITTED)
    first = on_topic(kafka_settings)
    assert [(record.kind, record.ts, record.slope) for record in first] == [("platt", 0, 2.5)]
    calibrations.publish_first(kafka_settings, NoCalibration())
    assert on_topic(kafka_settings) == first
    later = calibrations.publish(kafka_settings, NoCalibration(), 5_000)
    assert on_topic(kafka_settings) == [*first, later]
    view = CalibrationView()
    log = LogView(kafka_settings, {calibrations.TOPIC: view})
    log.warm_up()
    log.close()
    assert view.at(4_999) == first[0] and view.at(5_000) == later
