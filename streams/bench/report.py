"""Results of `gpl bench stream`, as JSON and as tables."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from streams.bench.stream import Delay, Throughput
from streams.bench.worker import STAGES
from streams.bench.workload import Load
from streams.storage import LocalStorage


def write(path: Path, load: Load, limit: dict[str, float], runs: Sequence[Throughput], delays: Sequence[Delay]) -> None:
    """Write everything that was measured as JSON."""
    said = {
        "machine": {"processor": platform.processor() or platform.machine(), "python": platform.python_version()},
        "load": asdict(load),
        "limit": limit,
        "throughput": [asdict(run) for run in runs],
        "steady": [asdict(delay) for delay in delays],
    }
    LocalStorage(path.parent).put(path.name, (json.dumps(said, indent=2) + "\n").encode())


def show(
    console: Console, load: Load, limit: dict[str, float], runs: Sequence[Throughput], delays: Sequence[Delay]
) -> None:
    """Print tables of it."""
    if runs:
        table = Table(title=f"Backlog: {load.candidates:,} candidates, {load.shown} impressions and a click a request")
        for column in ("workers", "requests/s", "labels/s", "requests/s of processor time", "peak MB"):
            table.add_column(column, justify="right")
        for run in runs:
            rates = (run.requests_per_second, run.labels_per_second, run.requests_per_cpu_second)
            table.add_row(str(run.workers), *(f"{rate:,.0f}" for rate in rates), f"{run.peak_rss_mb:,.0f}")
        console.print(table)
        stages = Table(title="Where the time goes: microseconds a request")
        stages.add_column("workers", justify="right")
        for stage in (*STAGES, "other", "processor"):
            stages.add_column(stage, justify="right")
        stages.add_column("bare product", justify="right")
        for run in runs:
            shares = (f"{run.stages[stage]:,.0f}" for stage in (*STAGES, "other", "processor"))
            stages.add_row(str(run.workers), *shares, f"{limit['gather_and_product']:,.0f}")
        console.print(stages)
    if delays:
        table = Table(title="Steady rate, one worker: from the record that closes a request to its label in the log")
        for column in (
            "requests/s asked",
            "sent",
            "of processor time",
            "labels",
            "missing",
            "p50 ms",
            "p95 ms",
            "p99 ms",
            "peak MB",
            "MB a minute",
        ):
            table.add_column(column, justify="right")
        for delay in delays:
            times = (f"{value:,.0f}" for value in (delay.p50_ms, delay.p95_ms, delay.p99_ms, delay.peak_rss_mb))
            rates = (delay.asked, delay.sent, delay.requests_per_cpu_second)
            said = (*(f"{rate:,.0f}" for rate in rates), f"{delay.labels:,}", f"{delay.missing:,}")
            table.add_row(*said, *times, f"{delay.slope_mb_per_minute:+.2f}")
        console.print(table)
    console.print(
        f"The limit, gather and product of a request alone on one thread: {limit['gather_and_product']:,.0f} us "
        f"(product {limit['product']:,.0f} us), {limit['requests_per_second']:,.0f} requests/s"
    )
