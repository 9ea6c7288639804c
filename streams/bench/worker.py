"""One worker of the labels role under load: its process, its counters, its memory and processor time."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from streams.demo.processes import Part, without_settings

STAGES = ("fetch", "decode", "join", "lookup", "match", "encode", "produce")
_PATIENCE = 30.0
"""Seconds in which a worker must answer what it is asked."""


@dataclass(frozen=True)
class Reading:
    """A worker's totals since its start. ``held``: requests that it holds now; ``cpu``: seconds of user and system
    time."""

    closed: float
    labels: float
    held: float
    cpu: float
    stages: dict[str, float]


def start(name: str, directory: Path, cores: str | None, config: Path) -> Part:
    """A worker process on the given cores (taskset's list; None: all) with the settings of ``config`` and no others.

    What it keeps on disk is in a directory of its own, ``directory / name``.
    """
    own = directory / name
    env = without_settings() | {
        "GPL_CONFIG": str(config),
        "GPL_INDEX__PATH": str(own / "index"),
        "GPL_LABELS__STORE_PATH": str(own / "recalls"),
    }
    prefix = [] if cores is None else ["taskset", "-c", cores]
    return Part(name, ["worker", "labels"], directory / f"{name}.log", prefix, env)


def read(part: Part) -> Reading:
    """What a worker says of itself now, and what the kernel says of it.

    Raises ProcessEndedError when it has ended, TimeoutError when it does not answer.
    """
    deadline = time.monotonic() + _PATIENCE
    while True:
        part.check()
        said = part.metrics()
        closed = said.total("gpl_requests_closed_total")
        if closed is not None:
            break
        if time.monotonic() > deadline:
            raise TimeoutError(f"{part.name}: /metrics has not answered for {_PATIENCE:.0f} s")
        time.sleep(0.1)
    stages = {stage: said.total("gpl_label_stage_seconds_total", stage=stage) or 0.0 for stage in STAGES}
    return Reading(
        closed=closed,
        labels=said.total("gpl_labels_total", kind="unexposed") or 0.0,
        held=said.total("gpl_retained_requests") or 0.0,
        cpu=_cpu_seconds(part.pid),
        stages=stages,
    )


def resident(part: Part) -> int:
    """Bytes of memory that a worker holds; asking costs it nothing, as ``read`` does."""
    return int(Path(f"/proc/{part.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def stages_per_request(first: Sequence[Reading], last: Sequence[Reading]) -> dict[str, float]:
    """Microseconds a request by stage, over all workers; "other" is processor time that no stage claims.

    All of it is processor time: fetch that of the consumer's thread, the others that of the event loop's.
    """
    closed = max(1.0, _gain(first, last, "closed"))
    stages = {
        stage: sum(b.stages[stage] - a.stages[stage] for a, b in zip(first, last, strict=True)) / closed * 1e6
        for stage in STAGES
    }
    cpu = _gain(first, last, "cpu") / closed * 1e6
    return {**stages, "other": cpu - sum(stages.values()), "processor": cpu}


def _gain(first: Sequence[Reading], last: Sequence[Reading], name: str) -> float:
    return float(sum(getattr(b, name) - getattr(a, name) for a, b in zip(first, last, strict=True)))


def rate(first: Sequence[Reading], last: Sequence[Reading], name: str, seconds: float) -> float:
    """Gain a second of a total, over all workers."""
    return _gain(first, last, name) / seconds


def per_cpu_second(first: Sequence[Reading], last: Sequence[Reading]) -> float:
    """Requests a second of processor time: what a core would do alone, whatever else the machine was doing."""
    return _gain(first, last, "closed") / max(1e-9, _gain(first, last, "cpu"))


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
