"""The broker restarts and dies in mid-stream: the same labels afterwards, none twice."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from streams.broker.apache import ApacheKafka
from streams.settings import KafkaSettings
from tests.crash.conftest import topics_of
from tests.crash.fleet import Fleet, Worker
from tests.crash.site import ITEMS, Follower, Outcome, Sender, send_items, settings, steps, until_same
from tests.integration.pipeline import wait_for


@pytest.fixture
def own_broker(kafka_jars: Path, tmp_path: Path) -> Iterator[ApacheKafka]:
    with ApacheKafka(tmp_path / "kafka", heap_mb=256, cache=kafka_jars) as broker:
        yield broker


def start(kafka: KafkaSettings, fleet: Fleet, follower: Follower) -> None:
    fleet.wait_ready()
    send_items(kafka)
    wait_for("the catalogue", lambda: len(follower.poll().vectors) == ITEMS)
    wait_for("the workers' catalogues", lambda: all(w.metric("gpl_catalogue_items") == ITEMS for w in fleet.workers))


def fleet_of(kafka: KafkaSettings, artefacts: Path, directory: Path, roles: list[str]) -> Fleet:
    return Fleet(
        *(
            Worker(settings(kafka, artefacts, directory / f"index-{n}"), role, directory / f"{n}-{role}.log")
            for n, role in enumerate(roles)
        )
    )


@pytest.mark.kafka
def test_a_broker_that_restarts_and_dies_changes_no_label(
    own_broker: ApacheKafka, artefacts: Path, reference: Outcome, tmp_path: Path, seed: int, rounds: int
) -> None:
    kafka = topics_of(own_broker.bootstrap)
    with fleet_of(kafka, artefacts, tmp_path, ["all", "all"]) as fleet, Follower(kafka) as follower:
        start(kafka, fleet, follower)
        restarts = max(2, rounds // 2)
        seconds = 5.0 * restarts
        sender = Sender(kafka, seconds)
        sender.start()
        started = time.monotonic()
        for n, (moment, _) in enumerate(steps(seed, restarts, seconds)):
            time.sleep(max(0.0, started + moment - time.monotonic()))
            print(f"{'SIGKILL' if n % 2 else 'SIGTERM'} of the broker at {moment:.2f} s")
            if n % 2:
                own_broker.kill()
                own_broker.start()
            else:
                own_broker.restart()
        sender.finish()
        outcome = until_same(follower, reference)
    assert outcome.twice == []
