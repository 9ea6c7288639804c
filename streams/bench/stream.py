"""Runs of the labels role under load: a backlog for throughput, a steady rate for delay, and a soak for memory."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from kafka import TopicPartition
from kafka.admin import ConfigResource, ConfigResourceType
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from streams import topics
from streams.bench import worker
from streams.bench.workload import Load, Workload, send
from streams.broker.process import tail
from streams.contracts import Recall, encode
from streams.demo.processes import Part
from streams.kafka import admin, consumer, producer
from streams.labels.published import CLOSED_AT, REQUEST_ID, REVISION
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
_START = 300.0
"""Seconds for workers to become ready."""
_STALLED = 120.0
"""Seconds without a closed request, or a record read, after which a run is given up."""
_PATIENCE = 60.0
"""Seconds after the last request of a steady run in which what it closes must be labelled; the rest is missing."""


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
        with admin(kafka, timeout=30) as client:
            resource = ConfigResource(
                ConfigResourceType.TOPIC, full_name(kafka, "labels"), {"message.timestamp.type": "LogAppendTime"}
            )
            client.alter_configs([resource])
        return kafka

    @contextmanager
    def workers(self, kafka: KafkaSettings, name: str, count: int) -> Iterator[list[Part]]:
        """So many workers, ready to label."""
        config = self.directory / f"{name}.toml"
        config.write_text(_CONFIG.format(bench=self, kafka=kafka))
        with ExitStack() as stack:
            parts = []
            for n in range(count):
                cores = None if self.cores is None else self.cores[n % len(self.cores)]
                part = worker.start(f"{name}-worker-{n}", self.directory, cores, config)
                stack.callback(part.stop, 20.0)
                parts.append(part)
            deadline = time.monotonic() + _START
            while not all(part.ready() for part in parts):
                for part in parts:
                    part.check()
                if time.monotonic() > deadline:
                    logs = "\n".join(tail(part.log) for part in parts)
                    raise TimeoutError(f"{name}: workers were not ready within {_START:.0f} s\n{logs}")
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


def _until_closed(parts: list[Part], requests: int, within: float = math.inf) -> float:
    """Wait until the workers have closed so many requests since their start, ``within`` seconds at most; the most bytes
    they held meanwhile.

    Raises TimeoutError when none of them has closed a request for long.
    """
    peak, closed = 0.0, -1.0
    began = moved = looked = look = time.monotonic()
    while True:
        peak = max(peak, sum(worker.resident(part) for part in parts))
        now = time.monotonic()
        if now >= look:
            before, closed = closed, sum(worker.read(part).closed for part in parts)
            if closed >= requests or now - began > within:
                return peak
            if closed > before:
                moved = now
            elif now - moved > _STALLED:
                raise TimeoutError(
                    f"no request was closed for {_STALLED:.0f} s, {requests - closed:,.0f} are left\n"
                    + "\n".join(tail(part.log) for part in parts)
                )
            # An answer takes a worker's time, so it is asked once a second; sooner at the end, which is to be met.
            speed = (closed - before) / (now - looked) if now > looked else 0.0
            looked, look = now, now + min(1.0, max(0.1, (requests - closed) / max(speed, 1e-9)))
        time.sleep(0.1)


@dataclass(frozen=True)
class Delay:
    """Of labels at a steady rate: from the Kafka time of the record that closed a request to the broker's append of
    its label, in milliseconds. ``asked``, ``sent``: requests a second. ``labels``: those that the figures are of;
    ``missing``: requests that were to be closed by a record and had no label when the run ended.
    ``by_minute``: (minute, median, p99), by the time of closing; ``memory``: (minute, resident MB, requests held).
    """

    asked: float
    sent: float
    labels: int
    missing: int
    p50_ms: float
    p95_ms: float
    p99_ms: float
    requests_per_cpu_second: float
    peak_rss_mb: float
    slope_mb_per_minute: float
    by_minute: list[tuple[int, float, float]] = field(default_factory=list)
    memory: list[tuple[float, float, float]] = field(default_factory=list)


class Sent(NamedTuple):
    """A request that is on the log. ``ts``: ms, of event time and of the wall."""

    request_id: str
    partition: int
    ts: int


class Labelled(NamedTuple):
    """First label of a request: when the request closed and when the label was appended, in ms."""

    closed: int
    appended: int


def steady(bench: Bench, name: str, rate: float, seconds: float, say: Say) -> Delay:
    """Send requests at a rate, event time being wall time, to one worker, and take its delays and its memory."""
    memory: list[tuple[float, float, float]] = []
    with _warm(bench, name, 1, say) as (kafka, workload, (part,)):
        say(f"{name}: {rate:.0f} requests/s for {seconds / 60:.1f} minutes")
        settled, stop = WARM + kafka.partitions, threading.Event()
        first, began, began_ms = None, time.monotonic(), time.time() * 1000
        with ThreadPoolExecutor(1) as pool:
            sending = pool.submit(_send_paced, kafka, workload, rate, seconds, settled, stop)
            try:
                while not sending.done():
                    wait([sending], min(5.0, seconds / 20))
                    last, elapsed = worker.read(part), time.monotonic() - began
                    memory.append((elapsed / 60, worker.resident(part) / 2**20, last.held))
                    if first is None and elapsed > WINDOW + LATENESS:
                        first = last
            finally:
                stop.set()
            sent, took = sending.result()
        # The last requests are closed by the idle timeout; until then the worker works off what it is behind.
        _until_closed([part], settled + len(sent), _PATIENCE)
    expected, labelled = due(sent), _labelled(kafka)
    found = delays(expected, labelled)
    p50, p95, p99 = np.percentile(found[:, 1], (50, 95, 99)) if len(found) else (np.nan,) * 3
    return Delay(
        asked=rate,
        sent=len(sent) / took,
        labels=len(found),
        missing=len(expected.keys() - labelled.keys()),
        p50_ms=float(p50),
        p95_ms=float(p95),
        p99_ms=float(p99),
        requests_per_cpu_second=worker.per_cpu_second([first or last], [last]),
        peak_rss_mb=max(m[1] for m in memory),
        slope_mb_per_minute=_slope(memory),
        by_minute=_by_minute(found, began_ms),
        memory=memory,
    )


def _send_paced(
    kafka: KafkaSettings, workload: Workload, rate: float, seconds: float, first: int, stop: threading.Event
) -> tuple[list[Sent], float]:
    """Requests on a timetable: what came to the log, and the seconds that it took. Raises what the broker refuses."""
    # Drawn beforehand: who sends shares the machine with the worker and the broker.
    lists = [workload.candidates() for _ in range(LISTS)]
    recalls: list[tuple[Recall, Any]] = []
    with producer(kafka) as out:
        began = time.monotonic()
        for n in range(int(rate * seconds)):
            ahead = began + n / rate - time.monotonic()
            if ahead > 0:
                stop.wait(ahead)
            if stop.is_set():
                break
            for record in workload.request(first + n, int(time.time() * 1000), lists[n % LISTS]):
                topic = "recalls" if isinstance(record, Recall) else "feedback"
                future = out.send(full_name(kafka, topic), key=record.user_id.encode(), value=encode(record))
                if isinstance(record, Recall):
                    recalls.append((record, future))
        out.flush()
        took = time.monotonic() - began
        return [Sent(of.request_id, future.get(60).partition, of.ts) for of, future in recalls], took


def due(sent: Sequence[Sent]) -> dict[str, int]:
    """Request id -> its time in ms, of the requests that a later one of their partition closes."""
    newest: dict[int, int] = {}
    for request in sent:
        newest[request.partition] = max(newest.get(request.partition, 0), request.ts)
    return {one.request_id: one.ts for one in sent if one.ts + CLOSES_AFTER_MS <= newest[one.partition]}


def delays(expected: Mapping[str, int], labelled: Mapping[str, Labelled]) -> NDArray[np.float64]:
    """(n, 2): when a request closed and how long after that its label was appended, in ms, of those ``expected``.

    One that the idle timeout closed, before a record could, is left out: nothing had to be worked off there.
    """
    found = [(labelled[name], ts) for name, ts in expected.items() if name in labelled]
    rows = [(one.closed, one.appended - one.closed) for one, ts in found if one.closed >= ts + CLOSES_AFTER_MS]
    return np.array(rows, dtype=np.float64).reshape(-1, 2)


def _labelled(kafka: KafkaSettings) -> dict[str, Labelled]:
    """The first label of every request on the log. Raises TimeoutError when the log cannot be read to its end."""
    reader = consumer(kafka)
    name = full_name(kafka, "labels")
    found: dict[str, Labelled] = {}
    try:
        parts = [TopicPartition(name, p) for p in sorted(reader.partitions_for_topic(name) or ())]
        reader.assign(parts)
        reader.seek_to_beginning(*parts)
        ends, moved = reader.end_offsets(parts), time.monotonic()
        while any(reader.position(tp) < end for tp, end in ends.items()):
            batches = reader.poll(timeout_ms=500)
            if batches:
                moved = time.monotonic()
            elif time.monotonic() - moved > _STALLED:
                raise TimeoutError(f"{name}: nothing could be read for {_STALLED:.0f} s")
            for batch in batches.values():
                for record in batch:
                    headers = dict(record.headers)
                    if int(headers[REVISION]) == 0:
                        found[headers[REQUEST_ID].decode()] = Labelled(int(headers[CLOSED_AT]), record.timestamp)
    finally:
        reader.close()
    return found


def _by_minute(found: NDArray[np.float64], began_ms: float) -> list[tuple[int, float, float]]:
    minutes = ((found[:, 0] - began_ms) // 60_000).astype(int)
    rows = []
    for minute in np.unique(minutes):
        p50, p99 = np.percentile(found[minutes == minute, 1], (50, 99))
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
