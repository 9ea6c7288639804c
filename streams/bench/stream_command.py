"""``gpl bench stream``: the labels role under load on a real Kafka."""

from __future__ import annotations

import os
import re
import shutil
import uuid
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from streams.bench.options import broker_of, clear_errors, numbers, one_of


def stream(
    workers: Annotated[str, typer.Option(help="Numbers of workers to measure throughput with.")] = "1",
    requests: Annotated[int, typer.Option(min=100, help="Requests of the backlog.")] = 8_000,
    candidates: Annotated[int, typer.Option(min=10, help="Candidates a request.")] = 1_000,
    items: Annotated[int, typer.Option(min=1_000, help="Items of the catalogue.")] = 100_000,
    rate: Annotated[float, typer.Option(min=0, help="Requests/s of the steady run; 0: none.")] = 200,
    seconds: Annotated[float, typer.Option(min=45, help="Length of the steady run.")] = 75,
    soak: Annotated[float, typer.Option(min=0, metavar="MINUTES", help="A longer steady run, for memory.")] = 0,
    store: Annotated[str, typer.Option(help="labels.store of the workers: memory or disk.")] = "memory",
    cores: Annotated[
        str, typer.Option(help='A core a worker, in turn, as taskset takes them, such as "0" or "0,1"; "": not pinned.')
    ] = "0",
    broker: Annotated[str, typer.Option(help="auto, apache, noida or host:port.")] = "apache",
    out: Annotated[Path, typer.Option(help="Directory of results, logs and data.")] = Path("runs/bench"),
) -> None:
    """Measure throughput by workers, label delay and memory, by stage, beside the bare matrix product."""
    from streams.bench import report
    from streams.bench.stream import Bench, Delay, Throughput, bare_product, steady, throughput
    from streams.bench.workload import Load, save_artefacts
    from streams.broker.select import open_broker
    from streams.settings import KafkaSettings

    counts = numbers(workers, int, 0, "--workers")
    one_of([store], ("memory", "disk"), "--store")
    if store == "disk" and find_spec("rocksdict") is None:
        raise typer.BadParameter('disk needs rocksdict: pip install "gpl-streams[disk]"', param_hint="--store")
    pinned = _cores(cores)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    load = Load(items=items, candidates=candidates)
    run = uuid.uuid4().hex[:6]
    directory = (out / run).absolute()
    runs: list[Throughput] = []
    delays: list[Delay] = []
    with clear_errors():
        choice = broker_of(broker)
        directory.mkdir(parents=True)
        typer.echo(f"broker: {choice.description}; results in {directory}")
        if pinned is not None and max(counts, default=0) > len(pinned):
            typer.echo(f"more workers than --cores ({cores}): some share one, and what they reach is of fewer cores")
        try:
            artefacts = directory / "artefacts"
            save_artefacts(load, artefacts)
            with open_broker(choice, KafkaSettings(), directory / "broker") as opened:
                bench = Bench(
                    directory, artefacts, KafkaSettings(bootstrap_servers=opened.bootstrap), load, pinned, store
                )
                limit = bare_product(load)

                def keep() -> None:
                    report.write(directory / "stream.json", load, limit, runs, delays)

                for count in counts:
                    if count:
                        runs.append(throughput(bench, f"{run}-{count}w", count, requests, typer.echo))
                        keep()
                for name, length in (("steady", seconds if rate else 0), ("soak", soak * 60)):
                    if length:
                        delays.append(steady(bench, f"{run}-{name}", rate or 200, length, typer.echo))
                        keep()
                keep()
        finally:
            for left in (directory / "broker", *directory.glob("*-worker-*/")):
                shutil.rmtree(left, ignore_errors=True)
    report.show(Console(), load, limit, runs, delays)
    typer.echo(f"written: {directory / 'stream.json'}")


def _cores(text: str) -> list[str] | None:
    """Of ``--cores``: a core, or a range of them, a worker; None when workers are not to be pinned."""
    listed = [part.strip() for part in text.split(",") if part.strip()]
    if not listed:
        return None
    if shutil.which("taskset") is None:
        raise typer.BadParameter('no taskset on PATH to pin workers with; --cores "" pins none', param_hint="--cores")
    for part in listed:
        found = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        if found is None or not set(range(int(found[1]), int(found[2] or found[1]) + 1)) & os.sched_getaffinity(0):
            own = ", ".join(map(str, sorted(os.sched_getaffinity(0))))
            raise typer.BadParameter(f"{part!r}: expected cores of this process ({own})", param_hint="--cores")
    return listed
