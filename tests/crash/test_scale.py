"""Workers of the labels role come and go under load, one by its own will and one by SIGKILL: 1 -> 3 -> 2."""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from streams.settings import KafkaSettings
from tests.crash.fleet import Fleet, Worker
from tests.crash.site import ITEMS, Follower, Outcome, Sender, send_items, settings, until_same
from tests.integration.pipeline import wait_for

SECONDS = 15.0


def partitions_of(worker: Worker) -> int:
    """Of recalls that the worker reads, as its metrics tell."""
    rows = worker.get("/metrics")[1].splitlines()
    mine = {row for row in rows if row.startswith("gpl_consumer_lag{") and 'topic="recalls"' in row}
    return len(mine)


@pytest.mark.kafka
@pytest.mark.parametrize("store", ["memory", "disk"])
def test_workers_that_come_and_go_leave_the_labels_of_a_run_with_one(
    crash_kafka: KafkaSettings, artefacts: Path, reference: Outcome, tmp_path: Path, store: str
) -> None:
    def labels_worker(n: int) -> Worker:
        section = {"store": store, "store_path": tmp_path / f"recalls-{n}"}
        made = settings(crash_kafka, artefacts, tmp_path / f"index-{n}", labels=section)
        return Worker(made, "labels", tmp_path / f"labels-{n}.log")

    workers = [labels_worker(n) for n in range(3)]
    others = [
        Worker(settings(crash_kafka, artefacts, tmp_path / role), role, tmp_path / f"{role}.log")
        for role in ("profiles", "anchors")
    ]
    with ExitStack() as stack:
        fleet = stack.enter_context(Fleet(workers[0], *others))
        follower = stack.enter_context(Follower(crash_kafka))
        fleet.wait_ready()
        send_items(crash_kafka)
        wait_for("the catalogue", lambda: len(follower.poll().vectors) == ITEMS)
        wait_for("the worker's catalogue", lambda: workers[0].metric("gpl_catalogue_items") == ITEMS)
        sender = Sender(crash_kafka, SECONDS)
        sender.start()
        time.sleep(SECONDS / 5)
        for worker in workers[1:]:
            stack.callback(worker.stop)
            worker.start()
        wait_for("every worker to have its part", lambda: all(partitions_of(w) for w in workers[1:]))
        time.sleep(SECONDS / 5)
        workers[1].stop(patience=180.0)
        assert workers[1].ended() == 0, workers[1].log.read_text()[-2000:]
        sender.finish()
        until_same(follower, reference)
        outcome = follower.poll(2.0)
    assert outcome.same_as(reference), outcome.differences(reference)
    assert outcome.twice == []
