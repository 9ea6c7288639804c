"""The broker restarts, dies, or cannot be reached for a while in mid-stream: the same labels afterwards, none twice."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from streams.broker.apache import ApacheKafka
from streams.settings import KafkaSettings
from tests.crash.conftest import topics_of
from tests.crash.fleet import Fleet, Worker
from tests.crash.proxy import Proxy
from tests.crash.site import ITEMS, Follower, Outcome, Sender, send_items, settings, steps, until_same
from tests.integration.pipeline import free_port, wait_for

STALL = 14.0
"""Longer than the session timeout of consumer groups: the broker gives the workers up meanwhile."""


@pytest.fixture
def own_broker(kafka_jars: Path, tmp_path: Path) -> Iterator[ApacheKafka]:
    with ApacheKafka(tmp_path / "kafka", heap_mb=256, cache=kafka_jars) as broker:
        yield broker


@pytest.fixture
def proxied(kafka_jars: Path, tmp_path: Path) -> Iterator[tuple[Proxy, KafkaSettings]]:
    """A broker that every client reaches through a proxy."""
    port = free_port()
    with (
        Proxy(port) as proxy,
        ApacheKafka(tmp_path / "kafka", port, heap_mb=256, cache=kafka_jars, advertised_port=proxy.port),
    ):
        yield proxy, topics_of(f"127.0.0.1:{proxy.port}")


def start(kafka: KafkaSettings, fleet: Fleet, follower: Follower) -> None:
    fleet.wait_ready()
    send_items(kafka)
    wait_for("the catalogue", lambda: len(follower.poll().vectors) == ITEMS)
    wait_for("the workers' catalogues", lambda: all(w.metric("gpl_catalogue_items") == ITEMS for w in fleet.workers))


def fleet_of(
    kafka: KafkaSettings, artefacts: Path, directory: Path, roles: list[str], **sections: dict[str, object]
) -> Fleet:
    return Fleet(
        *(
            Worker(
                settings(kafka, artefacts, directory / f"index-{n}", **sections), role, directory / f"{n}-{role}.log"
            )
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


@pytest.mark.kafka
def test_a_network_that_stalls_changes_no_label(
    proxied: tuple[Proxy, KafkaSettings], artefacts: Path, reference: Outcome, tmp_path: Path, seed: int, rounds: int
) -> None:
    proxy, kafka = proxied
    # Faust does not always find back into its group after such a stall; the process then ends itself.
    live = {"stalled_after_wall_seconds": 20, "exit_when_stalled": True}
    roles = ["labels", "profiles", "anchors"]
    with fleet_of(kafka, artefacts, tmp_path, roles, metrics=live) as fleet:
        with Follower(kafka) as follower:
            start(kafka, fleet, follower)
        stalls = max(2, rounds // 2)
        seconds = 4.0 * stalls
        sender = Sender(kafka, seconds)
        sender.start()
        for n, (_, number) in enumerate(steps(seed, stalls, seconds)):
            time.sleep(2.0)
            pause = 0.5 + number % 20 / 10 if n % 2 else STALL
            print(f"stall for {pause:.1f} s")
            proxy.stall()
            time.sleep(pause)
            proxy.resume()
        sender.finish()
        with Follower(kafka) as follower:
            outcome = until_same(follower, reference, 240)
    assert outcome.twice == []
