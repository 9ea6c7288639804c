"""A worker that makes no progress stops being live, whatever the reason, and ends itself where it is told to."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from streams.broker.apache import ApacheKafka
from streams.liveness import EXIT_STALLED
from streams.settings import KafkaSettings, Settings
from tests.crash.conftest import topics_of
from tests.crash.fleet import Worker
from tests.crash.site import Sender, settings
from tests.integration.pipeline import wait_for

STALLED_AFTER = 6.0


def run_with_faults(chosen: Settings, role: str) -> None:
    """A worker whose event loop blocks on SIGUSR1 and whose Faust consumer hands nothing over after SIGUSR2."""
    from streams import worker
    from streams.role import Role

    started: list[Role] = []  # type: ignore[type-arg]
    start = Role.start

    async def noted(self: Role) -> None:  # type: ignore[type-arg]
        await start(self)
        started.append(self)

    def starve(*_: object) -> None:
        for each in started:
            each.app.flow_control.suspend()
            each.app.consumer.stop_flow()

    Role.start = noted  # type: ignore[method-assign]
    signal.signal(signal.SIGUSR1, lambda *_: time.sleep(1000))
    signal.signal(signal.SIGUSR2, starve)
    worker.run(chosen, role)  # type: ignore[arg-type]


@pytest.fixture
def profiles(crash_kafka: KafkaSettings, artefacts: Path, tmp_path: Path) -> Iterator[Worker]:
    live = {"stalled_after_wall_seconds": STALLED_AFTER}
    chosen = settings(crash_kafka, artefacts, tmp_path / "index", metrics=live)
    worker = Worker(chosen, "profiles", tmp_path / "profiles.log", run_with_faults)
    worker.start()
    try:
        wait_for("the worker to be ready", lambda: worker.get("/ready")[0] == 200)
        yield worker
    finally:
        worker.signal(signal.SIGQUIT)
        time.sleep(1)
        worker.kill()
        print(worker.log.read_text()[-20000:])


def stalled(worker: Worker) -> list[str]:
    status, said = worker.get("/health")
    return json.loads(said)["stalled"] if status == 503 else []


@pytest.mark.kafka
def test_a_blocked_loop_is_not_live(profiles: Worker) -> None:
    wait_for("the worker to be live", lambda: profiles.get("/health")[0] == 200)
    profiles.signal(signal.SIGUSR1)
    wait_for("the loop to count as stalled", lambda: "profiles" in stalled(profiles))


@pytest.mark.kafka
def test_a_consumer_that_is_stuck_while_there_are_records_is_not_live(
    profiles: Worker, crash_kafka: KafkaSettings
) -> None:
    profiles.signal(signal.SIGUSR2)
    time.sleep(2 * STALLED_AFTER)
    # Nothing is there to be read: it is idle, not stuck.
    wait_for("the worker to be live", lambda: profiles.get("/health")[0] == 200)
    sender = Sender(crash_kafka, 0.1)
    sender.start()
    sender.finish()
    wait_for("the consumer to count as stuck", lambda: stalled(profiles))


@pytest.mark.kafka
def test_a_silent_broker_makes_a_worker_end_itself(kafka_jars: Path, artefacts: Path, tmp_path: Path) -> None:
    live = {"stalled_after_wall_seconds": STALLED_AFTER, "exit_when_stalled": True}
    with ApacheKafka(tmp_path / "kafka", heap_mb=256, cache=kafka_jars) as broker:
        chosen = settings(topics_of(broker.bootstrap), artefacts, tmp_path / "index", metrics=live)
        worker = Worker(chosen, "profiles", tmp_path / "profiles.log")
        worker.start()
        try:
            wait_for("the worker to be ready", lambda: worker.get("/ready")[0] == 200)
            assert worker.ended() is None
            os.kill(broker.pid, signal.SIGSTOP)
            try:
                wait_for("the worker to end", lambda: worker.ended() is not None)
            finally:
                os.kill(broker.pid, signal.SIGCONT)
            assert worker.ended() == EXIT_STALLED, worker.log.read_text()[-2000:]
        finally:
            worker.kill()
