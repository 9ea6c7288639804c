"""A worker that is stopped for longer than its session, and goes on when others have its partitions."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from streams.settings import KafkaSettings, Settings
from streams.topics import full_name
from tests.crash.fleet import Fleet, Worker, run_role
from tests.crash.site import ITEMS, REQUESTS, Follower, Outcome, Sender, event_log, send_items, settings, until_same
from tests.integration.pipeline import wait_for

SESSION = 10.0


def run_and_stop(chosen: Settings, role: str) -> None:
    """A worker that stops itself, once, with a request of labels in hand that it holds itself entitled to send."""
    from aiokafka.conn import AIOKafkaConnection
    from aiokafka.producer.sender import ProduceRequest

    send, labels, requests = AIOKafkaConnection.send, full_name(chosen.kafka, "labels"), 0

    def stop_before(self: Any, request: Any, expect_response: bool = True) -> Any:
        nonlocal requests
        if isinstance(request, ProduceRequest) and labels in dict(request._topics):
            requests += 1
            if requests == 10:  # in the midst of labelling
                os.kill(os.getpid(), signal.SIGSTOP)
        return send(self, request, expect_response)

    AIOKafkaConnection.send = stop_before
    run_role(chosen, role)


def is_stopped(worker: Worker) -> bool:
    return Path(f"/proc/{worker.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


@contextmanager
def two_workers(
    kafka: KafkaSettings, artefacts: Path, directory: Path, first: str = "all", target: Any = run_role
) -> Iterator[tuple[list[Worker], Follower]]:
    """One with the role ``first``, one with all, both with the catalogue; afterwards neither has ended by itself."""
    chosen = [settings(kafka, artefacts, directory / f"index-{n}") for n in range(2)]
    workers = [
        Worker(chosen[0], first, directory / "0.log", target),
        Worker(chosen[1], "all", directory / "1.log"),
    ]
    with Fleet(*workers) as fleet, Follower(kafka) as follower:
        fleet.wait_ready()
        send_items(kafka)
        wait_for("the workers' catalogues", lambda: all(w.metric("gpl_catalogue_items") == ITEMS for w in workers))
        yield workers, follower
    assert [worker.failures for worker in workers] == [0, 0]


def rest(rng: np.random.Generator) -> None:
    """Until the group has gone on without the worker that is stopped."""
    time.sleep(SESSION + float(rng.uniform(1, 3)))


def outcome_of(kafka: KafkaSettings) -> Outcome:
    with Follower(kafka) as follower:
        return follower.poll(2.0)


@pytest.mark.kafka
def test_a_worker_that_was_stopped_says_nothing_that_its_successor_has_said(
    crash_kafka: KafkaSettings, artefacts: Path, reference: Outcome, tmp_path: Path, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    half, stops = len(event_log()) // 2, []
    with two_workers(crash_kafka, artefacts, tmp_path) as (workers, follower):
        for worker, part in zip(workers, (slice(None, half), slice(half, None)), strict=True):
            enough = len(follower.poll().labels) + int(rng.integers(20, REQUESTS // 4))
            sender = Sender(crash_kafka, 1.0, part)
            sender.start()
            # In the midst of labelling: some are on their way, some are due.
            wait_for("labels", lambda enough=enough: len(follower.poll(0.05).labels) >= enough)
            worker.signal(signal.SIGSTOP)
            stops.append(time.time() * 1000)
            sender.finish()
            rest(rng)
            worker.signal(signal.SIGCONT)
        until_same(follower, reference)
    outcome = outcome_of(crash_kafka)
    assert outcome.same_as(reference), outcome.differences(reference)
    # What a worker held itself entitled to send, and was stopped before it did, is out of reach: the next test.
    assert all(any(again.again_ms <= stop < again.first_ms for stop in stops) for again in outcome.twice), outcome.twice


@pytest.mark.kafka
def test_a_request_that_was_under_way_when_its_worker_stopped_comes_too_late_and_changes_nothing(
    crash_kafka: KafkaSettings, artefacts: Path, reference: Outcome, tmp_path: Path, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    # Anchors are the other's alone: they go on, and the successor's first labels are made with newer ones.
    with two_workers(crash_kafka, artefacts, tmp_path, "labels", run_and_stop) as ((worker, _), follower):
        sender = Sender(crash_kafka, 1.0)
        sender.start()
        wait_for("the stop", lambda: is_stopped(worker))
        stopped = time.time() * 1000
        sender.finish()
        rest(rng)
        until_same(follower, reference)  # of its successor
        worker.signal(signal.SIGCONT)
        wait_for("what it had in hand", lambda: follower.poll().twice)
    outcome = outcome_of(crash_kafka)
    assert outcome.same_as(reference), outcome.differences(reference)
    assert all(again.again_ms <= stopped < again.first_ms for again in outcome.twice), outcome.twice
    topics = {again.topic for again in outcome.twice}
    assert full_name(crash_kafka, "labels") in topics, topics
