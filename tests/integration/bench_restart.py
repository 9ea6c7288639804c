"""Restart of the profiles role with 100,000 profiles and their anchors on a real Kafka: process start to /ready.

pytest tests/integration/bench_restart.py -o addopts= -s prints it; nothing is asserted of the time.
"""

from __future__ import annotations

import time
from pathlib import Path

import msgspec
import numpy as np
import pytest

from streams import topics
from streams.broker.apache import ApacheKafka
from streams.contracts import UserAnchors, encode
from streams.kafka import producer
from streams.profiles.drift import PageHinkley
from streams.profiles.state import Positive, Profile
from streams.settings import KafkaSettings
from streams.topics import full_name
from streams.views import vector_bytes
from tests.crash.site import make_artefacts
from tests.integration.pipeline import Process, wait_for

PROFILES, POSITIVES, ANCHORS, PARTITIONS = 100_000, 30, 10, 6


@pytest.mark.parametrize("dim", [16, 384])
def test_restart(dim: int, kafka_jars: Path, tmp_path: Path) -> None:
    artefacts = make_artefacts(tmp_path / "fitted", dim)
    with ApacheKafka(tmp_path / "kafka", cache=kafka_jars) as broker:
        kafka = KafkaSettings(bootstrap_servers=broker.bootstrap, partitions=PARTITIONS)
        topics.create(kafka)
        fill(kafka, dim)
        config = tmp_path / "gpl.toml"
        config.write_text(
            f'artefacts = "{artefacts}"\n[kafka]\nbootstrap_servers = "{broker.bootstrap}"\npartitions = {PARTITIONS}\n'
        )
        for attempt in range(2):
            started = time.monotonic()
            worker = Process(["worker", "profiles"], config, tmp_path / "profiles.log")
            try:
                wait_for("the worker to be up", lambda w=worker: w.get("/ready")[0] in (200, 503), 120)
                up = time.monotonic() - started
                wait_for("the worker to be ready", worker.ready, 300)
                ready = time.monotonic() - started
                memory = worker.metric("process_resident_memory_bytes") / 2**20
                print(f"dim {dim}, start {attempt}: {up:.1f} s to be up, {ready:.1f} s to be ready, {memory:.0f} MiB")
                if attempt == 0:
                    worker.kill()
            finally:
                worker.stop()


def fill(kafka: KafkaSettings, dim: int) -> None:
    """Profiles and anchors of the size that a busy site has, in the partition of their user."""
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((64, ANCHORS, dim)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=2, keepdims=True)
    with producer(kafka, linger_ms=50, batch_size=2**20) as out:
        for n in range(PROFILES):
            user, partition = f"user-{n}", n % PARTITIONS
            ts = 1_700_000_000_000 + n
            clicks = tuple(Positive(ts + k, f"event-{n}-{k}", f"item-{k}") for k in range(POSITIVES))
            cursor = (clicks[-1].ts, clicks[-1].event_id)
            profile = Profile(user, cursor, clicks, POSITIVES, 1, False, ts, PageHinkley(5, 0.4, 0.1, 0.0))
            anchors = UserAnchors(
                user_id=user,
                ts=ts,
                version=1,
                sid=[[k % 8, k % 8, k % 8] for k in range(ANCHORS)],
                logprob=[-1.0 - k for k in range(ANCHORS)],
                vectors=vector_bytes(vectors[n % 64]),
                history_factor=[0.5] * ANCHORS,
                history=[click.item_id for click in clicks],
                generator="g",
                quantiser="q",
                encoder="e",
            )
            key = user.encode()
            out.send(full_name(kafka, "profiles"), key=key, value=msgspec.json.encode(profile), partition=partition)
            out.send(full_name(kafka, "user-anchors"), key=key, value=encode(anchors), partition=partition)
