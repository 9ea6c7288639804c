"""``gpl bench stream``: the labels role under load on a real Kafka."""

from __future__ import annotations

import os
import shutil
import uuid
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console


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
    from streams.bench.stream import Bench, bare_product, steady, throughput
    from streams.bench.workload import Load, save_artefacts
    from streams.broker.process import BrokerError
    from streams.broker.select import choose, open_broker
    from streams.settings import KafkaSettings

    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    load = Load(items=items, candidates=candidates)
    run = uuid.uuid4().hex[:6]
    directory = (out / run).absolute()
    try:
        choice = choose(broker)
        directory.mkdir(parents=True)
        artefacts = directory / "artefacts"
        save_artefacts(load, artefacts)
        with open_broker(choice, KafkaSettings(), directory / "broker") as opened:
            kafka = KafkaSettings(bootstrap_servers=opened.bootstrap)
            pinned = [core for core in cores.split(",") if core] or None
            bench = Bench(directory, artefacts, kafka, load, pinned, store)
            typer.echo(f"broker: {choice.description}; results in {directory}")
            limit = bare_product(load)
            runs = [
                throughput(bench, f"{run}-{n}w", int(n), requests, typer.echo) for n in workers.split(",") if int(n)
            ]
            delays = []
            if rate:
                delays.append(steady(bench, f"{run}-steady", rate, seconds, typer.echo))
            if soak:
                delays.append(steady(bench, f"{run}-soak", rate or 200, soak * 60, typer.echo))
    except (BrokerError, ValueError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error
    report.write(directory / "stream.json", load, limit, runs, delays)
    report.show(Console(), load, limit, runs, delays)
    shutil.rmtree(directory / "broker", ignore_errors=True)
    typer.echo(f"written: {directory / 'stream.json'}")
