"""Figures of ``gpl bench trainer``: pairs that are there, and models of this run only."""

from __future__ import annotations

import time
from contextlib import closing

import msgspec
import numpy as np
import pytest

from streams.bench.trainer import Announcements, Freshness, Load, Workload
from streams.contracts import Label, ModelUpdate, encode
from streams.kafka import producer
from streams.settings import KafkaSettings
from streams.topics import full_name


@pytest.mark.parametrize("items", [40, 1000])
def test_every_label_has_as_many_pairs_as_are_counted(items: int) -> None:
    workload = Workload(Load(items, users=50, candidates=20, exposed=2, dim=4))
    for _, value in workload.labels(200):
        label = msgspec.json.decode(value, type=Label)
        assert len({*label.exposed.item, *label.unexposed.item}) == 20
        assert len(label.exposed.item) == 2


def test_models_of_earlier_runs_are_not_counted(kafka_settings: KafkaSettings) -> None:
    def announce(version: str) -> None:
        update = ModelUpdate("m", version, "file:///m", "0", {}, 0, {})
        with closing(producer(kafka_settings)) as out:
            out.send(full_name(kafka_settings, "model-updates"), key=b"m", value=encode(update)).get(30)

    announce("earlier")
    announcements = Announcements(kafka_settings)
    announcements.start()
    try:
        announce("own")
        deadline = time.monotonic() + 30
        while not announcements.seen and time.monotonic() < deadline:
            time.sleep(0.01)
    finally:
        announcements.stop()
    assert [update.version for _, update in announcements.seen] == ["own"]


def test_a_rate_that_was_not_kept_is_told() -> None:
    line = Freshness(1000, 640.0, np.array([1.0, 3.0]), missing=7, models=2).line()
    assert "640 of 1,000 label records/s" in line and "7 records in none" in line
