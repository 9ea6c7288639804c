"""Fixtures of the crash suite: what the workers are built from, and the undisturbed run that others must equal."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from kafka import KafkaAdminClient

from streams import topics
from streams.broker.apache import ApacheKafka
from streams.kafka import client_options
from streams.settings import KafkaSettings
from tests.crash.fleet import Fleet, Worker
from tests.crash.site import ITEMS, REQUESTS, Follower, Outcome, Sender, make_artefacts, send_items, settings
from tests.integration.pipeline import wait_for

PARTITIONS = 6


@pytest.fixture(scope="session")
def artefacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_artefacts(tmp_path_factory.mktemp("crash-artefacts") / "fitted")


@pytest.fixture
def rounds(request: pytest.FixtureRequest) -> int:
    return int(request.config.getoption("--crash-rounds"))


@pytest.fixture
def outage(rounds: int) -> float:
    """Seconds that a part of the site is away: 6 in CI, a minute with ``--crash-rounds 40``."""
    return 1.5 * rounds


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    seed = int(request.config.getoption("--crash-seed"))
    print(f"--crash-seed {seed}")
    return seed


def topics_of(bootstrap: str) -> KafkaSettings:
    """Topics of a run's own on a broker."""
    name = f"crash-{uuid.uuid4().hex[:8]}"
    own = KafkaSettings(bootstrap_servers=bootstrap, prefix=f"{name}.", group_prefix=f"{name}-", partitions=PARTITIONS)
    topics.create(own)
    return own


@pytest.fixture
def crash_kafka(kafka: ApacheKafka) -> Iterator[KafkaSettings]:
    own = topics_of(kafka.bootstrap)
    yield own
    with KafkaAdminClient(**client_options(own)) as admin:
        admin.delete_topics([t for t in admin.list_topics() if t.startswith(own.prefix)], raise_errors=False)


@pytest.fixture(scope="session")
def reference(kafka: ApacheKafka, artefacts: Path, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """What the log's labels are when nothing happens: one process, all roles."""
    own, directory = topics_of(kafka.bootstrap), tmp_path_factory.mktemp("undisturbed")
    worker = Worker(settings(own, artefacts, directory / "index"), "all", directory / "worker.log")
    with Fleet(worker) as fleet, Follower(own) as follower:
        fleet.wait_ready()
        send_items(own)
        wait_for("the catalogue", lambda: len(follower.poll().vectors) == ITEMS)
        wait_for("the worker's catalogue", lambda: worker.metric("gpl_catalogue_items") == ITEMS)
        sender = Sender(own, 2.0)
        sender.start()
        sender.finish()
        wait_for("all labels", lambda: len(follower.poll().labels) == REQUESTS, 300)
        outcome = settle(follower)
    assert worker.failures == 0 and outcome.twice == []
    assert len({key[0] for key in outcome.anchors}) > 20 and any(version > 1 for _, version in outcome.anchors)
    return outcome


def settle(follower: Follower, quiet: float = 4.0) -> Outcome:
    """What the topics say once they have said nothing new for ``quiet`` seconds."""
    outcome, since = follower.poll(), time.monotonic()
    while time.monotonic() - since < quiet:
        newer = follower.poll()
        if not newer.same_as(outcome):
            outcome, since = newer, time.monotonic()
    return outcome
