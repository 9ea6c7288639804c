"""Runs of the labels role under load: a backlog for throughput, a steady rate for delay, and a soak for memory."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from kafka import KafkaAdminClient, TopicPartition
from kafka.admin import ConfigResource, ConfigResourceType
from threadpoolctl import threadpool_limits

from streams import topics
from streams.bench import worker
from streams.bench.worker import Reading
from streams.bench.workload import Load, Workload, send_requests
from streams.contracts import Recall, encode
from streams.demo.processes import Part
from streams.kafka import client_options, consumer, producer
from streams.labels.published import CLOSED_AT
from streams.settings import KafkaSettings
from streams.topics import full_name

Say = Callable[[str], None]
WINDOW, LATENESS, RETENTION, IDLE = 20, 2, 20, 3
"""Seconds: short, so that a run of a minute sees requests open, close and go."""
SETTLED = (0.15, 0.9)
"""Part of a backlog over which throughput is taken: after the first fetches, before the last."""


@dataclass(frozen=True)
class Bench:
    """Where a run takes place. ``cores``: of each worker, taskset's list; None: not pinned."""

    directory: Path
    artefacts: Path
    kafka: KafkaSettings
    load: Load
    cores: list[str] | None
    store: str = "memory"

    def own_topics(self, name: str) -> KafkaSettings:
        """Fresh topics under a prefix of the run's own; labels are stamped by the broker as they are appended."""
        kafka = self.kafka.model_copy(update={"prefix": f"bench-{name}.", "group_prefix": f"bench-{name}-"})
        topics.create(kafka)
        with KafkaAdminClient(**client_options(kafka)) as admin:
            resource = ConfigResource(
                ConfigResourceType.TOPIC, full_name(kafka, "labels"), {"message.timestamp.type": "LogAppendTime"}
            )
            admin.alter_configs([resource])
        return kafka

    @contextmanager
    def workers(self, kafka: KafkaSettings, name: str, count: int) -> Iterator[list[Part]]:
        """So many workers, ready to label."""
        config = self.directory / f"{name}.toml"
        config.write_text(_CONFIG.format(bench=self, kafka=kafka, store=self.directory / name / "recalls"))
        os.environ["GPL_CONFIG"] = str(config)
        with ExitStack() as stack:
            parts = []
            for n in range(count):
                cores = None if self.cores is None else self.cores[n % len(self.cores)]
                part = worker.start(f"{name}-worker-{n}", self.directory, cores)
                stack.callback(part.stop, 20.0)
                parts.append(part)
            while not all(part.ready() for part in parts):
                for part in parts:
                    part.check()
                time.sleep(0.2)
            yield parts


_CONFIG = """\
artefacts = "{bench.artefacts}"
[kafka]
bootstrap_servers = "{kafka.bootstrap_servers}"
prefix = "{kafka.prefix}"
group_prefix = "{kafka.group_prefix}"
partitions = {kafka.partitions}
compression = "{kafka.compression}"
[labels]
window_seconds = 20
allowed_lateness_seconds = 2
retention_seconds = 20
retention_wall_seconds = 5
idle_timeout_wall_seconds = 3
store = "{bench.store}"
store_path = "{store}"
"""


@dataclass(frozen=True)
class Throughput:
    """Of a backlog. Rates are a second of wall time, over all workers; ``stages``: microseconds a request."""

    workers: int
    requests: int
    seconds: float
    requests_per_second: float
    labels_per_second: float
    requests_per_cpu_second: float
    stages: dict[str, float]
    peak_rss_mb: float


def throughput(bench: Bench, name: str, workers: int, requests: int, say: Say) -> Throughput:
    """Produce a backlog, start the workers, and take their rate while they work it off."""
    kafka = bench.own_topics(name)
    workload = Workload(bench.load, bench.artefacts)
    say(f"{name}: catalogue of {bench.load.items:,} items, {bench.load.users:,} users with anchors")
    workload.publish_state(kafka)
    start = int(time.time() * 1000) - requests * 10
    say(f"{name}: a backlog of {requests:,} requests of {bench.load.candidates:,} candidates")
    send_requests(kafka, workload.requests(start, 10, requests))
    with bench.workers(kafka, name, workers) as parts:
        return _drain(parts, requests)


def _drain(parts: list[Part], requests: int) -> Throughput:
    readings: list[tuple[float, list[Reading]]] = []
    while True:
        for part in parts:
            part.check()
        readings.append((time.monotonic(), [worker.read(part) for part in parts]))
        closed = sum(reading.closed for reading in readings[-1][1])
        if closed >= SETTLED[1] * requests:
            break
        time.sleep(0.25)
    settled = [row for row in readings if sum(r.closed for r in row[1]) >= SETTLED[0] * requests]
    (t0, first), (t1, last) = settled[0], settled[-1]
    seconds = max(1e-9, t1 - t0)
    return Throughput(
        workers=len(parts),
        requests=requests,
        seconds=seconds,
        requests_per_second=worker.rate(first, last, "closed", seconds),
        labels_per_second=worker.rate(first, last, "labels", seconds),
        requests_per_cpu_second=worker.per_cpu_second(first, last),
        stages=worker.stages_per_request(first, last),
        peak_rss_mb=max(sum(r.rss for r in row) for _, row in readings) / 2**20,
    )


@dataclass(frozen=True)
class Delay:
    """Of labels at a steady rate: from the Kafka time of the record that closed a request to the broker's append of
    its label, in milliseconds. ``memory``: (minute, resident MB, requests held)."""

    requests_per_second: float
    labels: int
    p50_ms: float
    p95_ms: float
    p99_ms: float
    peak_rss_mb: float
    slope_mb_per_minute: float
    memory: list[tuple[float, float, float]] = field(default_factory=list)


def steady(bench: Bench, name: str, rate: float, seconds: float, say: Say) -> Delay:
    """Send requests at a rate, event time being wall time, to one worker, and take its delays and its memory."""
    kafka = bench.own_topics(name)
    workload = Workload(bench.load, bench.artefacts)
    workload.publish_state(kafka)
    memory: list[tuple[float, float, float]] = []
    with bench.workers(kafka, name, 1) as (part,):
        say(f"{name}: {rate:.0f} requests/s for {seconds / 60:.1f} minutes")
        began, failed = time.monotonic(), []

        def send() -> None:
            try:
                _send_paced(kafka, workload, rate, seconds)
            except Exception as error:
                failed.append(error)

        sender = threading.Thread(target=send, daemon=True)
        sender.start()
        while sender.is_alive():
            sender.join(min(5.0, seconds / 20))
            part.check()
            said = part.metrics().total("gpl_retained_requests") or 0.0
            memory.append(((time.monotonic() - began) / 60, worker.read(part).rss / 2**20, said))
        if failed:
            raise failed[0]
        time.sleep(WINDOW / 10)
    # The first window has nothing to close, and the last requests are closed by the idle timeout.
    delays = _delays(kafka, int(rate * (WINDOW + LATENESS)))
    p50, p95, p99 = np.percentile(delays, (50, 95, 99)) if len(delays) else (np.nan,) * 3
    return Delay(
        rate, len(delays), float(p50), float(p95), float(p99), max(m[1] for m in memory), _slope(memory), memory
    )


def _send_paced(kafka: KafkaSettings, workload: Workload, rate: float, seconds: float) -> None:
    with producer(kafka) as out:
        began = time.monotonic()
        for n in range(int(rate * seconds)):
            wait = began + n / rate - time.monotonic()
            if wait > 0:
                time.sleep(wait)
            (records,) = workload.requests(int(time.time() * 1000), 0, 1, first=n)
            for record in records:
                topic = "recalls" if isinstance(record, Recall) else "feedback"
                out.send(full_name(kafka, topic), key=record.user_id.encode(), value=encode(record))


def _delays(kafka: KafkaSettings, skip: int) -> Any:
    reader = consumer(kafka)
    name = full_name(kafka, "labels")
    delays: list[tuple[int, int]] = []
    try:
        parts = [TopicPartition(name, p) for p in sorted(reader.partitions_for_topic(name) or ())]
        reader.assign(parts)
        reader.seek_to_beginning(*parts)
        ends = reader.end_offsets(parts)
        while any(reader.position(tp) < end for tp, end in ends.items()):
            for batch in reader.poll(timeout_ms=500).values():
                for record in batch:
                    closed_at = int(dict(record.headers)[CLOSED_AT])
                    delays.append((record.timestamp, record.timestamp - closed_at))
    finally:
        reader.close()
    delays.sort()
    # The last window's requests are closed by the idle timeout, not by a record.
    return np.array([delay for _, delay in delays[skip : max(skip, len(delays) - skip)]], dtype=np.float64)


def _slope(memory: list[tuple[float, float, float]]) -> float:
    """Megabytes a minute over the last two thirds, by least squares."""
    rows = np.array([(minute, rss) for minute, rss, _ in memory[len(memory) // 3 :]])
    if len(rows) < 3:
        return float("nan")
    return float(np.polyfit(rows[:, 0], rows[:, 1], 1)[0])


def bare_product(load: Load, rounds: int = 200) -> dict[str, float]:
    """The limit: gather a request's rows and multiply with its anchors, nothing else, one thread; microseconds."""
    rng = np.random.default_rng(load.seed)
    matrix = rng.standard_normal((load.items, load.dim), dtype=np.float32)
    anchors = matrix[: load.anchors].copy()
    rows = [rng.integers(0, load.items, load.candidates) for _ in range(rounds)]
    gathered = matrix[rows[0]]
    with threadpool_limits(1):
        both = _median(lambda r: matrix[r] @ anchors.T, rows)
        product = _median(lambda _: gathered @ anchors.T, rows)
    return {"gather_and_product": both, "product": product, "requests_per_second": 1e6 / both}


def _median(work: Callable[[Any], object], rows: list[Any]) -> float:
    marks = [time.perf_counter()]
    for row in rows:
        work(row)
        marks.append(time.perf_counter())
    return float(np.median([b - a for a, b in pairwise(marks)])) * 1e6
