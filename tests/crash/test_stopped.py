"""A worker that is stopped for longer than its session, and goes on when others have its partitions."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import numpy as np
import pytest

from streams.settings import KafkaSettings
from tests.crash.fleet import Fleet, Worker
from tests.crash.site import ITEMS, REQUESTS, Follower, Outcome, Sender, event_log, send_items, settings, until_same
from tests.integration.pipeline import wait_for

SESSION = 10.0


@pytest.mark.kafka
def test_a_worker_that_was_stopped_says_nothing_that_its_successor_has_said(
    crash_kafka: KafkaSettings, artefacts: Path, reference: Outcome, tmp_path: Path, seed: int
) -> None:
    workers = [
        Worker(settings(crash_kafka, artefacts, tmp_path / f"index-{n}"), "all", tmp_path / f"{n}.log")
        for n in range(2)
    ]
    rng = np.random.default_rng(seed)
    half = len(event_log()) // 2
    with Fleet(*workers) as fleet, Follower(crash_kafka) as follower:
        fleet.wait_ready()
        send_items(crash_kafka)
        wait_for("the workers' catalogues", lambda: all(w.metric("gpl_catalogue_items") == ITEMS for w in workers))
        for worker, part in zip(workers, (slice(None, half), slice(half, None)), strict=True):
            enough = len(follower.poll().labels) + int(rng.integers(20, REQUESTS // 4))
            sender = Sender(crash_kafka, 1.0, part)
            sender.start()
            # In the midst of labelling: some are on their way, some are due.
            wait_for("labels", lambda enough=enough: len(follower.poll(0.05).labels) >= enough)
            worker.signal(signal.SIGSTOP)
            sender.finish()
            time.sleep(SESSION + float(rng.uniform(1, 3)))
            worker.signal(signal.SIGCONT)
        until_same(follower, reference)
    with Follower(crash_kafka) as follower:
        outcome = follower.poll(2.0)
    assert outcome.same_as(reference), outcome.differences(reference)
    assert outcome.twice == []
    assert [worker.failures for worker in workers] == [0, 0]
