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
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from streams import topics
from streams.bench import worker
from streams.bench.workload import Load, Workload, send
from streams.contracts import Recall, encode
from streams.demo.processes import Part
from streams.kafka import client_options, consumer, producer
from streams.labels.published import CLOSED_AT
from streams.settings import KafkaSettings
from streams.topics import full_name

Say = Callable[[str], None]
WINDOW, LATENESS, RETENTION, IDLE = 20, 2, 20, 3
"""Seconds: short, so that a run of a minute sees requests open, close and go."""
CLOSES_AFTER_MS = (WINDOW + LATENESS) * 1000
STEP_MS = 10
"""Event time from a request of a backlog to the next."""
LISTS = 1_000
"""Lists of candidates that a steady run sends in turn; together they are many times what a processor caches."""
HOUR_MS = 3_600_000
WARM = 2_000
"""Requests before a backlog, in which a worker fetches the vectors of nearly all items from its index."""


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
    """Of a backlog, from its first record sent to its last label. Rates are a second of wall time, over all workers;
    ``stages``: microseconds a request."""

    workers: int
    requests: int
    seconds: float
    requests_per_second: float
    labels_per_second: float
    requests_per_cpu_second: float
    stages: dict[str, float]
    peak_rss_mb: float


def throughput(bench: Bench, name: str, workers: int, requests: int, say: Say) -> Throughput:
    """Start the workers, warm them up, hand them a backlog, and take their rate from then until all is labelled."""
    with _warm(bench, name, workers, say) as (kafka, workload, parts):
        settled = WARM + kafka.partitions
        backlog = workload.closed(
            int(time.time() * 1000) - HOUR_MS, STEP_MS, requests, CLOSES_AFTER_MS, kafka.partitions, settled
        )
        say(f"{name}: a backlog of {requests:,} requests of {bench.load.candidates:,} candidates")
        first, began = [worker.read(part) for part in parts], time.monotonic()
        send(kafka, backlog)
        peak = _until_closed(parts, settled + requests)
        last, seconds = [worker.read(part) for part in parts], time.monotonic() - began
    return Throughput(
        workers=len(parts),
        requests=requests,
        seconds=seconds,
        requests_per_second=worker.rate(first, last, "closed", seconds),
        labels_per_second=worker.rate(first, last, "labels", seconds),
        requests_per_cpu_second=worker.per_cpu_second(first, last),
        stages=worker.stages_per_request(first, last),
        peak_rss_mb=peak / 2**20,
    )


@contextmanager
def _warm(bench: Bench, name: str, workers: int, say: Say) -> Iterator[tuple[KafkaSettings, Workload, list[Part]]]:
    """Workers that have labelled ``WARM`` requests of two hours ago, and one a partition that closed those."""
    kafka = bench.own_topics(name)
    workload = Workload(bench.load, bench.artefacts)
    say(f"{name}: catalogue of {bench.load.items:,} items, {bench.load.users:,} users with anchors")
    workload.publish_state(kafka)
    warm = workload.closed(int(time.time() * 1000) - 2 * HOUR_MS, STEP_MS, WARM, CLOSES_AFTER_MS, kafka.partitions)
    with bench.workers(kafka, name, workers) as parts:
        say(f"{name}: {WARM:,} requests to warm up")
        send(kafka, warm)
        _until_closed(parts, WARM + kafka.partitions)
        yield kafka, workload, parts


def _until_closed(parts: list[Part], requests: int) -> float:
    """Wait until the workers have closed so many requests since their start; the most bytes they held meanwhile."""
    peak = 0.0
    while True:
        for part in parts:
            part.check()
        readings = [worker.read(part) for part in parts]
        peak = max(peak, sum(reading.rss for reading in readings))
        if sum(reading.closed for reading in readings) >= requests:
            return peak
        time.sleep(0.1)


@dataclass(frozen=True)
class Delay:
    """Of labels at a steady rate: from the Kafka time of the record that closed a request to the broker's append of
    its label, in milliseconds. ``by_minute``: (minute, median, p99); ``memory``: (minute, resident MB, requests held).
    """

    requests_per_second: float
    labels: int
    p50_ms: float
    p95_ms: float
    p99_ms: float
    requests_per_cpu_second: float
    peak_rss_mb: float
    slope_mb_per_minute: float
    by_minute: list[tuple[int, float, float]] = field(default_factory=list)
    memory: list[tuple[float, float, float]] = field(default_factory=list)


def steady(bench: Bench, name: str, rate: float, seconds: float, say: Say) -> Delay:
    """Send requests at a rate, event time being wall time, to one worker, and take its delays and its memory."""
    memory: list[tuple[float, float, float]] = []
    with _warm(bench, name, 1, say) as (kafka, workload, (part,)):
        say(f"{name}: {rate:.0f} requests/s for {seconds / 60:.1f} minutes")
        first, began, failed = None, time.monotonic(), []
        began_ms = time.time() * 1000

        def send_all() -> None:
            try:
                _send_paced(kafka, workload, rate, seconds, WARM + kafka.partitions)
            except Exception as error:
                failed.append(error)

        sender = threading.Thread(target=send_all, daemon=True)
        sender.start()
        while sender.is_alive():
            sender.join(min(5.0, seconds / 20))
            part.check()
            said = part.metrics().total("gpl_retained_requests") or 0.0
            last, elapsed = worker.read(part), time.monotonic() - began
            memory.append((elapsed / 60, last.rss / 2**20, said))
            if first is None and elapsed > WINDOW + LATENESS:
                first = last
        if failed:
            raise failed[0]
        ended_ms = time.time() * 1000
        time.sleep(WINDOW / 10)
    # The first window has nothing to close, and the last requests are closed by the idle timeout, not by a record.
    delays = _delays(kafka)
    delays = delays[(delays[:, 0] >= began_ms + CLOSES_AFTER_MS) & (delays[:, 0] < ended_ms)]
    p50, p95, p99 = np.percentile(delays[:, 1], (50, 95, 99)) if len(delays) else (np.nan,) * 3
    return Delay(
        requests_per_second=rate,
        labels=len(delays),
        p50_ms=float(p50),
        p95_ms=float(p95),
        p99_ms=float(p99),
        requests_per_cpu_second=worker.per_cpu_second([first or last], [last]),
        peak_rss_mb=max(m[1] for m in memory),
        slope_mb_per_minute=_slope(memory),
        by_minute=_by_minute(delays, began_ms),
        memory=memory,
    )


def _send_paced(kafka: KafkaSettings, workload: Workload, rate: float, seconds: float, first: int) -> None:
    # Drawn beforehand: who sends shares the machine with the worker and the broker.
    lists = [workload.candidates() for _ in range(LISTS)]
    with producer(kafka) as out:
        began = time.monotonic()
        for n in range(int(rate * seconds)):
            wait = began + n / rate - time.monotonic()
            if wait > 0:
                time.sleep(wait)
            for record in workload.request(first + n, int(time.time() * 1000), lists[n % LISTS]):
                topic = "recalls" if isinstance(record, Recall) else "feedback"
                out.send(full_name(kafka, topic), key=record.user_id.encode(), value=encode(record))


def _delays(kafka: KafkaSettings) -> NDArray[np.float64]:
    """Of every label: when it was appended and how long after the record that closed its request, in milliseconds."""
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
    return np.array(delays, dtype=np.float64).reshape(-1, 2)


def _by_minute(delays: NDArray[np.float64], began_ms: float) -> list[tuple[int, float, float]]:
    minutes = ((delays[:, 0] - began_ms) // 60_000).astype(int)
    rows = []
    for minute in np.unique(minutes):
        p50, p99 = np.percentile(delays[minutes == minute, 1], (50, 99))
        rows.append((int(minute), float(p50), float(p99)))
    return rows


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
