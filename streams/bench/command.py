"""The ``gpl bench`` commands."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from streams.bench import generators, stream_command
from streams.bench.options import broker_of, clear_errors, numbers
from streams.cli_options import ConfigOption

if TYPE_CHECKING:
    from streams.bench.live import Stages
    from streams.broker.select import Choice

app = typer.Typer(help="What the system does on this machine, measured through its real parts.", no_args_is_help=True)
app.command()(generators.generator)
app.command()(generators.anchors)
app.command()(generators.codes)
app.command()(stream_command.stream)


@app.command()
def serve(
    items: Annotated[int, typer.Option(min=1, help="Catalogue.")] = 20_000,
    users: Annotated[int, typer.Option(min=1, help="Users with anchors.")] = 2_000,
    anchors: Annotated[int, typer.Option(min=1, help="A user.")] = 10,
    dim: Annotated[int, typer.Option(min=1, help="Of the frozen space.")] = 384,
    calls: Annotated[int, typer.Option(min=1, help="Of the library, for each figure.")] = 300,
    candidates: Annotated[int, typer.Option(min=1, help="An HTTP request.")] = 500,
    rate: Annotated[float, typer.Option(min=1, help="HTTP requests a second; they leave on a timetable.")] = 1000,
    seconds: Annotated[float, typer.Option(min=1)] = 20,
    connections: Annotated[int, typer.Option(min=1)] = 64,
    workers: Annotated[int, typer.Option(min=1, help="Serving processes.")] = 2,
    reload_every: Annotated[
        float, typer.Option(min=0.1, help="Seconds between new models in the second HTTP run.")
    ] = 1.0,
    http: Annotated[bool, typer.Option(help="Measure over HTTP too.")] = True,
    broker: Annotated[str, typer.Option(help="auto, apache, or host:port.")] = "auto",
) -> None:
    """The scorer: latency of the library, and of HTTP requests with and without reloads.

    "again": a second request of each user, for the candidates of the first. HTTP runs without the memo that makes those
    cheaper (serve.memo_mb = 0), so each request there costs what a first one does.

    The HTTP part starts a broker (unless given one), `gpl serve`, and a load generator, each in processes of their
    own, on made-up vectors. All of them share this machine's cores, the generator included.
    """
    import os

    import numpy as np
    from threadpoolctl import threadpool_limits

    from streams.bench import serve as bench
    from streams.bench.http_load import Outcome
    from streams.bench.synthetic import SyntheticState
    from streams.broker import select
    from streams.settings import KafkaSettings

    if users < 3 * calls:
        raise typer.BadParameter(
            f"{users}, expected at least 3 x --calls ({3 * calls}): no user is asked for twice", param_hint="--users"
        )
    with clear_errors():
        choice = broker_of(broker) if http else None
    state = SyntheticState(items, users, anchors, dim, seed=0)
    typer.echo(f"{items:,} items x {dim}, {users:,} users with {anchors} anchors, {os.cpu_count()} cores")
    with tempfile.TemporaryDirectory(prefix="gpl-bench-") as name:
        directory = Path(name)
        threadpool_limits(1)  # one core, as the figures say
        rounds, counts = calls * 6 // 5, (500, 5000)
        scorer = bench.loaded_scorer(state, directory / "library", rounds * sum(counts))
        for count, first in zip(counts, (0, rounds), strict=True):
            some = state.users[first : first + rounds]
            runs = (("with anchors", some), ("with anchors, again", some), ("without", ["nobody"] * rounds))
            for label, who in runs:
                p50, p99 = np.percentile(np.array(bench.library(scorer, state, count, who)) * 1000, [50, 99])
                typer.echo(f"library, {count:>5,} candidates, {label:<19}  p50 {p50:6.2f} ms  p99 {p99:6.2f} ms")
        if choice is None:
            return
        del scorer
        kafka = KafkaSettings(prefix=f"bench-{os.getpid()}.")
        with clear_errors(), select.open_broker(choice, kafka, directory / "broker") as opened:
            kafka = kafka.model_copy(update={"bootstrap_servers": opened.bootstrap})
            sent = bench.bodies(state, candidates, 500)
            with bench.ServedSystem(kafka, state, directory, workers) as system:
                for label, every in (("", None), (f", a new model every {reload_every:g} s", reload_every)):
                    before = system.cpu_seconds()
                    outcome: Outcome = system.load(sent, rate, seconds, connections, every)
                    cpu = system.cpu_seconds() - before
                    scored, answered = len(outcome.seconds), max(outcome.statuses.total(), 1)
                    typer.echo(
                        f"HTTP, {candidates} candidates, {workers} processes, {connections} connections{label}\n"
                        f"  {scored / outcome.duration:,.0f} of {rate:,.0f} requests/s   "
                        f"p50 {outcome.milliseconds(50):.1f}  p95 {outcome.milliseconds(95):.1f}  "
                        f"p99 {outcome.milliseconds(99):.1f} ms\n"
                        f"  statuses {dict(outcome.statuses)}, connection errors {dict(outcome.errors)}, "
                        f"{len(outcome.versions)} versions\n"
                        f"  processor time a request: {cpu / answered * 1000:.2f} ms serving, "
                        f"{outcome.cpu_seconds / answered * 1000:.2f} ms generating"
                    )


@app.command()
def freshness(
    out: Annotated[Path, typer.Option("--out", help="Directory of what was fitted and run; it is taken up.")] = Path(
        "runs/freshness"
    ),
    write: Annotated[Path | None, typer.Option("--write", help="Also write the page of results there.")] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            "--data",
            help="Directory for a second stream, with online_retail/items.csv.gz (columns item, title) and "
            "online_retail/events.csv.gz (user, item, timestamp in seconds).",
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1)] = 3,
    candidates: Annotated[int, typer.Option(min=50, help="A request; recall is simulated.")] = 200,
    jobs: Annotated[int, typer.Option(min=1, help="Runs at a time, a process each.")] = 1,
    window: Annotated[float, typer.Option(min=1, help="Seconds of event time until a request is labelled.")] = 300,
    live: Annotated[bool, typer.Option("--live", help="Also time clicks through a running system.")] = False,
    broker: Annotated[str, typer.Option(help="Of the live run: auto, apache, or host:port.")] = "auto",
    config: ConfigOption = None,
) -> None:
    """The value of a fresh model and of fresh anchors: sync intervals, and refreshes by drift, daily and weekly.

    Offline and deterministic, through the parts that the roles run. Needs MovieLens-100K (the recbole wheel). With
    --live also the time from a click to a served model that was trained on it: broker, roles, trainer and scorer run.
    """
    from streams.bench import freshness as bench
    from streams.bench.timed import movielens_100k, online_retail
    from streams.settings import load

    if write is not None and not write.parent.is_dir():
        raise typer.BadParameter(f"{write.parent} is no directory", param_hint="--write")
    settings = load(config)
    settings = settings.model_copy(
        update={"labels": settings.labels.model_copy(update={"window_seconds": window, "retention_seconds": 0.0})}
    )
    plan = bench.Study(seeds, candidates)
    with clear_errors():
        choice = broker_of(broker) if live else None
        try:
            streams = [movielens_100k(), *([] if data is None else [online_retail(data / "online_retail")])]
        except (FileNotFoundError, ValueError) as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(1) from error
        stages = None if choice is None else _live(out, choice)
    found = [(stream, bench.study(stream, settings, plan, out, jobs, typer.echo)) for stream in streams]
    command = f"gpl bench freshness --seeds {seeds} --candidates {candidates} --window {window:g}"
    command += "".join([" --data DIR" if data else "", " --live" if live else ""])
    command += f" --config {config.name}" if config else ""
    text = bench.page(found, settings, plan, f"{command} --write FILE", stages)
    if write is None:
        typer.echo(text)
        return
    write.write_text(text)
    typer.echo(f"written to {write}")


def _live(out: Path, choice: Choice) -> Stages:
    """What ``out`` holds of such a broker and such a plan, or measured now."""
    import hashlib
    import os

    import msgspec

    from streams.bench import live
    from streams.broker import select
    from streams.settings import KafkaSettings
    from streams.storage import LocalStorage

    plan = live.Plan(rate=20, seconds=20, window=2, publish=1)
    made_by = hashlib.sha256(msgspec.json.encode((plan, choice.description))).hexdigest()[:8]
    path = out / f"live-{made_by}.json"
    if not path.exists():
        name = f"live-{os.getpid()}"
        kafka = KafkaSettings(prefix=f"{name}.", group_prefix=f"{name}-")
        with tempfile.TemporaryDirectory(prefix="gpl-bench-") as directory:
            at = Path(directory)
            with select.open_broker(choice, kafka, at / "broker") as opened:
                kafka = kafka.model_copy(update={"bootstrap_servers": opened.bootstrap})
                found = live.measure(kafka, choice.description, at, plan)
        LocalStorage(out).put(path.name, msgspec.json.encode(found))
    return msgspec.json.decode(path.read_bytes(), type=live.Stages)


@app.command()
def trainer(
    records: Annotated[int, typer.Option(min=200, help="Label records of the throughput run.")] = 4000,
    rates: Annotated[str, typer.Option(help="Label records a second, a freshness run each; empty: none.")] = (
        "100,300,1000"
    ),
    seconds: Annotated[float, typer.Option(min=1, help="Of each freshness run.")] = 20,
    candidates: Annotated[int, typer.Option(min=20, help="A request, a tenth of them exposed.")] = 100,
    items: Annotated[int, typer.Option(min=1000, help="Catalogue.")] = 20_000,
    users: Annotated[int, typer.Option(min=50, help="With a taste each.")] = 20_000,
    dim: Annotated[int, typer.Option(min=2, help="Of the frozen space.")] = 384,
    threads: Annotated[int, typer.Option(min=1, help="Of torch, for every figure.")] = 1,
    ranks: Annotated[int, typer.Option(min=1, help="Processes of the data-parallel run.")] = 2,
    as_json: Annotated[bool, typer.Option("--json", help="JSON on standard output.")] = False,
    broker: Annotated[str, typer.Option(help="auto, apache, or host:port.")] = "auto",
) -> None:
    """The trainer: label records a second beside the bare torch loop, and seconds from a label to a model with it.

    Starts a broker (unless given one). In the freshness runs the trainer is a process of its own; the producer and
    the broker share this machine's cores with it.
    """
    import json
    import os

    each = numbers(rates, float, 1.0, "--rates")
    if items < 2 * candidates:
        raise typer.BadParameter(f"{items}: expected 2 x --candidates or more", param_hint="--items")
    with clear_errors():
        choice = broker_of(broker)
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = str(threads)  # of the processes
    import torch
    from threadpoolctl import threadpool_limits

    from streams.bench import trainer as bench
    from streams.broker import select
    from streams.settings import KafkaSettings

    torch.set_num_threads(threads)
    threadpool_limits(threads)  # numpy was loaded before the variables were set
    workload = bench.Workload(bench.Load(items, users, candidates, candidates // 10, dim))

    def say(line: str) -> None:
        if not as_json:
            typer.echo(line)

    say(f"{items:,} items x {dim}, {users:,} users, {candidates} candidates a request, {os.cpu_count()} cores")
    labels = workload.labels(2 * records)
    with tempfile.TemporaryDirectory(prefix="gpl-bench-") as name:
        directory = Path(name)
        kafka = KafkaSettings(prefix=f"bench-{os.getpid()}.")
        with clear_errors(), select.open_broker(choice, kafka, directory / "broker") as opened:
            kafka = kafka.model_copy(update={"bootstrap_servers": opened.bootstrap})
            at = bench.Topics(kafka, workload)
            at.send(labels)
            settings = bench.settings_for(kafka, directory / "trainer")
            result = bench.throughput(workload, [value for _, value in labels], records, settings, ranks)
            for line in result.lines():
                say(line)
            found = []
            with bench.running_trainer(settings, workload.frame):
                first = 2 * records
                for rate in each:
                    run = bench.freshness(workload, at, settings, rate, seconds, first)
                    first += int(rate * seconds)
                    found.append(run)
                    say(run.line())
            at.close()
    if as_json:
        document = {"throughput": result.to_dict(), "freshness": [run.to_dict() for run in found]}
        typer.echo(json.dumps(document, indent=2))
