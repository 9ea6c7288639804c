"""A worker that is stopped for longer than its session, and goes on when others have its partitions."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import numpy as np
import pytest

from streams.settings import KafkaSettings
from tests.crash.fleet import Fleet, Worker
from tests.crash.site import ITEMS, Follower, Outcome, Sender, send_items, settings, until_same
from tests.integration.pipeline import wait_for

SESSION = 10.0


@pytest.mark.kafka
def test_a_worker_that_was_stopped_says_nothing_that_its_successor_has_said(
    crash_kafka: KafkaSettings, artefacts: Path, reference: Outcome, tmp_path: Path, seed: int, rounds: int
) -> None:
    workers = [
        Worker(settings(crash_kafka, artefacts, tmp_path / f"index-{n}"), "all", tmp_path / f"{n}.log")
        for n in range(2)
    ]
    rng = np.random.default_rng(seed)
    stops = max(1, rounds // 4)
    with Fleet(*workers) as fleet, Follower(crash_kafka) as follower:
        fleet.wait_ready()
        send_items(crash_kafka)
        wait_for("the workers' catalogues", lambda: all(w.metric("gpl_catalogue_items") == ITEMS for w in workers))
        sender = Sender(crash_kafka, (SESSION + 8) * stops)
        sender.start()
        for n in range(stops):
            time.sleep(float(rng.uniform(2, 5)))
            workers[n % 2].signal(signal.SIGSTOP)
            time.sleep(SESSION + float(rng.uniform(1, 3)))
            workers[n % 2].signal(signal.SIGCONT)
        sender.finish()
        until_same(follower, reference)
    with Follower(crash_kafka) as follower:
        outcome = follower.poll(2.0)
    assert outcome.same_as(reference), outcome.differences(reference)
    assert outcome.twice == []
    assert [worker.failures for worker in workers] == [0, 0]
