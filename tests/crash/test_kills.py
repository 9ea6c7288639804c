"""SIGKILL at random moments: the labels, anchors and vectors are those of a run that nothing happened to."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from streams.settings import KafkaSettings
from tests.crash.conftest import PARTITIONS
from tests.crash.fleet import Fleet, Worker
from tests.crash.site import ITEMS, REQUESTS, Follower, Outcome, Sender, send_items, settings, steps, until_same
from tests.integration.pipeline import wait_for

SECONDS = 8.0
TAKEOVER_SECONDS = 30.0
"""What is promised; the group's session timeout is 10 of them."""


@pytest.mark.kafka
@pytest.mark.parametrize(
    "roles", [["labels", "profiles", "anchors"], ["all", "all", "all"]], ids=["one-each", "three-of-all"]
)
def test_killed_roles_lose_nothing_and_say_nothing_twice(
    crash_kafka: KafkaSettings,
    artefacts: Path,
    reference: Outcome,
    tmp_path: Path,
    seed: int,
    rounds: int,
    roles: list[str],
) -> None:
    workers = [
        Worker(settings(crash_kafka, artefacts, tmp_path / f"index-{n}"), role, tmp_path / f"{n}-{role}.log")
        for n, role in enumerate(roles)
    ]
    with Fleet(*workers) as fleet, Follower(crash_kafka) as follower:
        fleet.wait_ready()
        # The process that encodes items dies while it does.
        send_items(crash_kafka, range(ITEMS // 2), pause=0.01)
        fleet.kill(0)
        send_items(crash_kafka, range(ITEMS // 2, ITEMS))
        wait_for("the catalogue", lambda: len(follower.poll().vectors) == ITEMS)
        wait_for("the workers' catalogues", lambda: all(w.metric("gpl_catalogue_items") == ITEMS for w in workers))
        seconds = SECONDS * rounds / 4
        sender = Sender(crash_kafka, seconds)
        sender.start()
        started = time.monotonic()
        for moment, number in steps(seed, rounds, seconds):
            time.sleep(max(0.0, started + moment - time.monotonic()))
            print(f"kill {workers[number % len(workers)].role} {number % len(workers)} at {moment:.2f} s")
            fleet.kill(number % len(workers), down=(number // 7 % 3) * 0.5)
        sender.finish()
        until_same(follower, reference)
    outcome = None
    with Follower(crash_kafka) as follower:
        outcome = follower.poll(2.0)
    assert outcome.same_as(reference), outcome.differences(reference)
    assert outcome.twice == []
    assert [worker.failures for worker in workers] == [0] * len(workers)


@pytest.mark.kafka
def test_a_dead_workers_partitions_are_taken_over(
    crash_kafka: KafkaSettings, artefacts: Path, reference: Outcome, tmp_path: Path
) -> None:
    """One of two workers is killed and stays away: the other labels for all partitions within the promised time."""
    workers = [
        Worker(settings(crash_kafka, artefacts, tmp_path / f"index-{n}"), "all", tmp_path / f"{n}.log")
        for n in range(2)
    ]
    with Fleet(*workers) as fleet, Follower(crash_kafka) as follower:
        fleet.wait_ready()
        send_items(crash_kafka)
        wait_for("the catalogue", lambda: len(follower.poll().vectors) == ITEMS)
        wait_for("the workers' catalogues", lambda: all(w.metric("gpl_catalogue_items") == ITEMS for w in workers))
        for part in (slice(None, 1500), slice(1500, None)):
            sender = Sender(crash_kafka, 1.0, part)
            sender.start()
            sender.finish()
            if part.stop is not None:
                wait_for("labels", lambda: len(follower.poll().labels) > REQUESTS // 3)
                assert all(sum(worker_lag(w)) > 0 for w in workers), "each has partitions"
                fleet.keep_down(0)
                killed = time.time() * 1000
        until_same(follower, reference)
        first = {
            partition: min((at for p, at in follower.label_times if p == partition and at > killed), default=None)
            for partition in range(PARTITIONS)
        }
    print({partition: None if at is None else round((at - killed) / 1000, 1) for partition, at in first.items()})
    assert all(at is not None and at - killed < TAKEOVER_SECONDS * 1000 for at in first.values())


def worker_lag(worker: Worker) -> list[int]:
    """A one for every partition of recalls that the worker reports on."""
    rows = worker.get("/metrics")[1].splitlines()
    return [1 for row in rows if row.startswith("gpl_consumer_lag{") and 'topic="recalls"' in row]
