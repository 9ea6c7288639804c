"""`gpl serve` as real processes over the real Kafka: reloads under load, and a killed worker."""

from __future__ import annotations

import http.client
import os
import signal
import time
from contextlib import closing
from pathlib import Path

import msgspec
import numpy as np
import pytest

from gpl.labels.matching import max_cosine
from streams.bench.serve import WIDTH, ServedSystem, bodies
from streams.bench.synthetic import SyntheticState
from streams.scoring import processes
from streams.scoring.server import ScoreRequest, ScoreResponse
from streams.settings import KafkaSettings


def expected(state: SyntheticState, number: int, request: ScoreRequest) -> dict[str, float]:
    """Scores by version ``number``, by the network itself."""
    rows = np.array([int(item.removeprefix("item-")) for item in request.candidates])
    vectors = state.vectors[rows]
    user = state.users.index(request.user_id)
    cross = max_cosine(state.anchors[request.user_id], vectors)[0]
    liked = np.array([int(item.removeprefix("item-")) for item in state.histories[request.user_id]])
    logits = state.network(WIDTH, number).score(user + 1, rows + 1, vectors, cross, liked + 1)
    return dict(zip(request.candidates, logits.tolist(), strict=True))


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_reloads_under_load_drop_and_mix_nothing(kafka_settings: KafkaSettings, tmp_path: Path) -> None:
    state = SyntheticState(items=400, users=20, anchors=5, dim=32, seed=3)
    sent = bodies(state, candidates=50, count=30)
    with ServedSystem(kafka_settings, state, tmp_path, workers=2, memo_mb=64) as system:
        outcome = system.load(sent, rate=150, seconds=6, connections=12, reload_every=0.1, keep=True)
        figures = system.get("/metrics")
    assert outcome.errors == {} and outcome.statuses == {200: 900}
    assert outcome.answers is not None and len(outcome.answers) == 900
    assert len(outcome.versions) >= 5, "the load met few reloads"
    wanted: dict[tuple[int, str], dict[str, float]] = {}
    for at, answer in outcome.answers:
        response = msgspec.json.decode(answer, type=ScoreResponse)
        key = (at, response.model_version)
        if key not in wanted:
            number = int(response.model_version[1:7])
            wanted[key] = expected(state, number, msgspec.json.decode(sent[at], type=ScoreRequest))
        assert dict(zip(response.items, response.scores, strict=True)) == pytest.approx(wanted[key], abs=1e-4)
        assert response.scores == sorted(response.scores, reverse=True)  # type: ignore[type-var]
        assert response.known_user and response.anchors and not response.unknown
    # One scrape speaks for all processes.
    counted = [line.split()[-1] for line in figures.splitlines() if line.startswith("gpl_score_candidates_total")]
    assert [float(value) for value in counted] == [900 * 50]


def test_a_killed_worker_is_replaced(kafka_settings: KafkaSettings, tmp_path: Path) -> None:
    state = SyntheticState(items=50, users=5, anchors=2, dim=8, seed=3)
    sent = bodies(state, candidates=10, count=5)
    with ServedSystem(kafka_settings, state, tmp_path, workers=2) as system:
        assert system.pid is not None
        before = children(system.pid)
        victim = next(pid for pid in before if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes())
        os.kill(victim, signal.SIGKILL)
        deadline = time.monotonic() + 60
        while victim in children(system.pid) or len(children(system.pid)) < len(before):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        system.wait_until_ready()
        outcome = system.load(sent, rate=50, seconds=1, connections=8, reload_every=None)
        assert outcome.errors == {} and outcome.statuses == {200: 50}


def test_a_client_that_sends_far_too_much_is_told_so(kafka_settings: KafkaSettings, tmp_path: Path) -> None:
    state = SyntheticState(items=50, users=5, anchors=2, dim=8, seed=3)
    part, parts = b" " * 2**20, 40
    with ServedSystem(kafka_settings, state, tmp_path, workers=1) as system:
        for body in (part * parts, iter([part] * parts)):  # with its length, and in chunks
            with closing(http.client.HTTPConnection("127.0.0.1", system.port, timeout=30)) as connection:
                connection.request("POST", "/v1/score", body)  # all of it, before it reads the answer
                answer = connection.getresponse()
                assert answer.status == 413 and b"at most" in answer.read()


def test_no_process_outlives_its_supervisor_and_a_port_that_is_served_is_taken(
    kafka_settings: KafkaSettings, tmp_path: Path
) -> None:
    state = SyntheticState(items=50, users=5, anchors=2, dim=8, seed=3)
    with ServedSystem(kafka_settings, state, tmp_path, workers=2) as system:
        with pytest.raises(OSError, match=f"serve.port: 127.0.0.1:{system.port}: Address already in use"):
            processes.run(system.settings, state.frame)
        assert system.pid is not None
        serving = [p for p in children(system.pid) if b"spawn_main" in Path(f"/proc/{p}/cmdline").read_bytes()]
        assert len(serving) == 2
        os.kill(system.pid, signal.SIGKILL)
        deadline = time.monotonic() + 60
        while any(Path(f"/proc/{pid}").exists() for pid in serving):
            assert time.monotonic() < deadline
            time.sleep(0.05)
