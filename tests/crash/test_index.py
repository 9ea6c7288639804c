"""The index server is away: requests and items wait for it, and then come out as if it had always been there."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest

from streams.contracts import ItemVector, decode
from streams.settings import KafkaSettings
from streams.views import vectors_from
from tests.crash.fleet import Fleet, Worker
from tests.crash.qdrant import Server
from tests.crash.site import DIM, ITEMS, Follower, Outcome, Sender, send_items, settings, until_same
from tests.integration.pipeline import wait_for


@pytest.mark.kafka
def test_an_index_that_is_away_delays_labels_and_changes_none(
    crash_kafka: KafkaSettings, artefacts: Path, reference: Outcome, tmp_path: Path, outage: float
) -> None:
    """It refuses calls, is late, and is not there at all, while items are written and while requests are labelled."""
    with Server(tmp_path / "qdrant", DIM) as server:
        remote = {"kind": "server", "grpc_port": server.port, "timeout_seconds": 2}
        workers = [
            Worker(settings(crash_kafka, artefacts, tmp_path / "none", index=remote), role, tmp_path / f"{role}.log")
            for role in ("labels", "profiles", "anchors")
        ]
        with Fleet(*workers) as fleet, Follower(crash_kafka) as follower:
            fleet.wait_ready()
            server.broken = True
            send_items(crash_kafka)
            wait_for("calls to be refused", lambda: server.refused > 3)
            assert follower.poll().vectors == {}
            server.broken = False
            wait_for("the catalogue", lambda: len(follower.poll().vectors) == ITEMS)
            wait_for("the catalogues", lambda: all(w.metric("gpl_catalogue_items") == ITEMS for w in workers))

            server.broken = True
            refused = server.refused
            sender = Sender(crash_kafka, 4.0)
            sender.start()
            wait_for("calls to be refused", lambda: server.refused > refused + 3)
            server.broken, server.delay = False, 3.0  # later than a worker waits
            time.sleep(outage / 3)
            server.delay = 0.0
            server.stop()
            time.sleep(outage / 3)
            assert workers[0].get("/health")[0] == 200
            server.start()
            sender.finish()
            outcome = until_same(follower, reference)
            assert workers[0].metric("gpl_index_unavailable_total") > 0
            # What it holds is the catalogue; and again after it was put back to an earlier state.
            said = [decode(ItemVector, value) for value in follower.poll().vectors.values()]
            items = {item.item_id: vectors_from(item.vector, DIM)[0] for item in said}

            def whole() -> bool:
                held = server.vectors(list(items))
                return held.keys() == items.keys() and all(
                    np.allclose(held[name], items[name], atol=1e-5) for name in items
                )

            assert whole()
            server.lose(0.5)
            assert not whole()
            fleet.kill(0)
            wait_for("the index to be whole again", whole)
        assert outcome.twice == []
        assert [worker.failures for worker in workers] == [0, 0, 0]
