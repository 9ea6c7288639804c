"""The language model fails for a while: labels go on with the last good anchors; requests wait and get answered."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import pytest

from gpl.anchors.base import AnchorGenerator, Beams, History
from gpl.artefacts import Artefacts
from gpl.codes.trie import SidTrie
from streams.contracts import AnchorRequest, decode, encode
from streams.dlq.letters import index
from streams.kafka import producer
from streams.settings import KafkaSettings, Settings
from streams.topics import full_name
from tests.crash.fleet import Fleet, Worker
from tests.crash.site import ITEMS, START, Follower, Outcome, Sender, event_log, send_items, settings, until_same
from tests.integration.pipeline import read_all, wait_for

POISON = 7
"""A history of this length makes the generator fail, where the test says so."""


class Failing:
    """The real generator, which raises while a file exists, and for histories of one length while another does."""

    def __init__(self, inner: AnchorGenerator, down: Path, poison: Path) -> None:
        self._inner, self._down, self._poison = inner, down, poison
        self.version = inner.version

    def generate(self, histories: Sequence[History], trie: SidTrie, beams: int) -> list[Beams]:
        if self._down.exists():
            raise RuntimeError("out of memory, say")
        if self._poison.exists() and any(len(history) == POISON for history in histories):
            raise RuntimeError(f"a history of {POISON}")
        return self._inner.generate(histories, trie, beams)


def run_failing(chosen: Settings, role: str, down: Path, poison: Path) -> None:
    """A worker whose generator fails on command."""
    from streams import worker

    load = Artefacts.load

    class Wrapped(Artefacts):
        @classmethod
        def load(cls, directory: Path, *, with_generator: bool = True) -> Artefacts:
            loaded = load(directory, with_generator=with_generator)
            if not with_generator:
                return loaded
            return dataclasses.replace(loaded, generator=Failing(loaded.generator, down, poison))  # type: ignore[arg-type]

    worker.Artefacts = Wrapped  # type: ignore[misc]
    worker.run(chosen, role)  # type: ignore[arg-type]


@pytest.mark.kafka
def test_a_failing_generator_delays_anchors_and_loses_none(
    crash_kafka: KafkaSettings, artefacts: Path, reference: Outcome, tmp_path: Path
) -> None:
    kafka, down, poison = crash_kafka, tmp_path / "down", tmp_path / "poison"
    limits = {"breaker_failures": 2, "breaker_open_wall_seconds": 1.0, "batch_size": 4, "refreshes_per_minute": 600}
    workers = [
        Worker(settings(kafka, artefacts, tmp_path / "index"), "labels", tmp_path / "labels.log"),
        Worker(settings(kafka, artefacts, tmp_path / "none"), "profiles", tmp_path / "profiles.log"),
        Worker(
            settings(kafka, artefacts, tmp_path / "none", anchors=limits),
            "anchors",
            tmp_path / "anchors.log",
            run_failing,
            (down, poison),
        ),
    ]
    generator = workers[2]
    with Fleet(*workers) as fleet, Follower(kafka) as follower:
        fleet.wait_ready()
        send_items(kafka)
        wait_for("the catalogue", lambda: len(follower.poll().vectors) == ITEMS)
        wait_for("the workers' catalogues", lambda: all(w.metric("gpl_catalogue_items") == ITEMS for w in workers))
        half = len(event_log()) // 2
        first, second = Sender(kafka, 2.0, slice(half)), Sender(kafka, 2.0, slice(half, None))
        first.start()
        wait_for("some anchors", lambda: len(follower.poll().anchors) > 5)
        first.finish()
        down.touch()
        labelled = len(follower.poll().labels)
        second.start()
        wait_for("the breaker to open", lambda: generator.metric("gpl_anchor_breaker_state") == 2)
        answered = len(follower.poll().anchors)
        wait_for("requests to wait", lambda: generator.metric("gpl_anchor_requests_waiting") > 3)
        wait_for("labels meanwhile", lambda: len(follower.poll().labels) > labelled + 50)
        assert len(follower.poll().anchors) == answered
        fleet.kill(2)  # what waits is in the log, not only in memory
        second.finish()
        wait_for("requests to wait again", lambda: generator.metric("gpl_anchor_requests_waiting") > 3)
        assert generator.get("/health")[0] == 200
        down.unlink()
        outcome = until_same(follower, reference)
        assert outcome.twice == []
        assert generator.metric("gpl_anchor_breaker_state") == 0
        assert [worker.failures for worker in workers] == [0, 0, 0]

        # One request that the generator cannot take does not hold up the others, and ends as a dead letter.
        poison.touch()
        with producer(kafka) as out:
            for n, length in enumerate([3, POISON, 4, 5]):
                request = AnchorRequest(f"new-{n}", START, 1, "cold", [f"item-{i}" for i in range(length)])
                out.send(full_name(kafka, "anchor-requests"), key=request.user_id.encode(), value=encode(request))
        wait_for(
            "the others' anchors", lambda: {f"new-{n}" for n in (0, 2, 3)} <= {u for u, _ in follower.poll().anchors}
        )
        # The generator is known to work once it has answered somebody after the first failure.
        with producer(kafka) as out:
            request = AnchorRequest("new-4", START, 1, "cold", ["item-1"])
            out.send(full_name(kafka, "anchor-requests"), key=b"new-4", value=encode(request))
        wait_for("the dead letter", lambda: [letter.reason for letter in index(kafka)] == ["generator"])
        letter = next(record for record in read_all(kafka, "dead-letters"))
        assert decode(AnchorRequest, letter.value).user_id == "new-1"
        wait_for("nothing to wait", lambda: generator.metric("gpl_anchor_requests_waiting") == 0)
