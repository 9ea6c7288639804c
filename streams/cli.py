"""The ``gpl`` command: one noun or verb a command, the same ``--config`` everywhere."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import pydantic
import structlog
import typer
from rich.console import Console

from streams import contracts
from streams.bench.command import app as bench_app
from streams.broker.command import app as broker_app
from streams.calibrate_command import calibrate
from streams.cli_options import ConfigOption
from streams.data_command import validate
from streams.demo.command import demo
from streams.dlq.command import app as dlq_app
from streams.evaluation.command import datasets_app, evaluate
from streams.fit_command import fit
from streams.history.command import backfill
from streams.inspect_command import app as inspect_app
from streams.log_view import LogView, TopicMissingError
from streams.replay.command import capture, explain, replay
from streams.settings import SECRETS, ConfigError, Settings, load
from streams.topics_command import app as topics_app
from streams.trainer.command import app as models_app

app = typer.Typer(
    name="gpl",
    help="Streaming generative pseudo-labelling: labels for what users were never shown, a pre-ranker kept fresh.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
config_app = typer.Typer(help="The configuration in force.", no_args_is_help=True)
app.add_typer(bench_app, name="bench")
app.add_typer(inspect_app, name="inspect")
app.add_typer(broker_app, name="broker")
app.add_typer(topics_app, name="topics")
app.add_typer(models_app, name="models")
app.add_typer(config_app, name="config")
app.add_typer(dlq_app, name="dlq")
app.command()(demo)
app.command()(validate)
app.command()(fit)
app.command()(calibrate)
app.command()(backfill)
app.command()(replay)
app.command()(capture)
app.command()(evaluate)
app.add_typer(datasets_app, name="datasets")
app.command()(explain)


@app.command()
def worker(
    role: Annotated[str, typer.Argument(help="profiles, anchors, labels, or all in one process.")],
    config: ConfigOption = None,
) -> None:
    """Run a worker role until SIGTERM."""
    from streams import worker as workers

    if role not in ("profiles", "anchors", "labels", "all"):
        raise typer.BadParameter(f"{role!r} is no role; profiles, anchors, labels or all", param_hint="ROLE")
    settings = load(config)
    with _clear_errors():
        workers.run(settings, role)  # type: ignore[arg-type]


@app.command()
def train(
    start_from: Annotated[
        str,
        typer.Option(
            help="latest, earliest, step-N, before=TIME (a checkpoint written by then), or TIME (new weights from "
            "there on); TIME as 2026-01-31T12:00 or ts=MILLISECONDS. All but latest discard newer checkpoints."
        ),
    ] = "latest",
    skip_to: Annotated[
        str | None, typer.Option(help="TIME: leave out label records published before; past a stretch of bad ones.")
    ] = None,
    ranks: Annotated[
        int, typer.Option(min=1, help="Processes that train as one; the partitions of the labels are divided.")
    ] = 1,
    config: ConfigOption = None,
) -> None:
    """Run the incremental trainer until SIGTERM. Under torchrun each process is a rank."""
    from streams.trainer import group, loop, start
    from streams.trainer import ranks as processes

    try:
        start.StartFrom.parse(start_from, skip_to)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--start-from, --skip-to") from error
    settings, stop = load(config), threading.Event()
    with _clear_errors():
        try:
            if ranks > 1:
                processes.run(settings, ranks, start_from, skip_to)
                return
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, lambda *_: stop.set())
            if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")):  # not back to where it started at first
                start_from, skip_to = "latest", None
            with group.Processes.from_environment() or group.Alone() as own:
                loop.serve(settings, stop, start_from, skip_to, own)
        except (*loop.CLEAR, processes.RankFailedError) as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(1) from error


@app.command()
def serve(config: ConfigOption = None) -> None:
    """Serve scores over HTTP."""
    from streams.scoring import processes

    settings = load(config)
    with _clear_errors():
        # Before there are processes that would be started again and again.
        LogView(settings.kafka, dict.fromkeys(("item-vectors", "user-anchors", "model-updates"), print)).close()
        processes.run(settings)


@app.command()
def schemas(
    directory: Annotated[Path | None, typer.Option("--out", help="Write one file a topic there.")] = None,
) -> None:
    """Print, or write, the JSON Schema of every topic's record. Dead letters have none: any bytes."""
    from streams.profiles.state import Profile

    every = {topic: contracts.json_schema(topic) for topic in contracts.TOPIC_RECORDS}
    every["profiles"] = contracts.json_schema("profiles", Profile)  # the role's own state
    if directory is None:
        typer.echo(json.dumps(every, indent=2))
        return
    directory.mkdir(parents=True, exist_ok=True)
    for topic, schema in every.items():
        path = directory / f"{topic}.v{contracts.SCHEMA_VERSION}.json"
        path.write_text(json.dumps(schema, indent=2) + "\n")
        typer.echo(path)


@config_app.command("show")
def config_show(config: ConfigOption = None) -> None:
    """Print every setting in force as JSON, secrets redacted."""
    # mode="json" renders SecretStr as asterisks.
    typer.echo(json.dumps(load(config).model_dump(mode="json"), indent=2))


@contextlib.contextmanager
def _clear_errors() -> Iterator[None]:
    """What an operator can put right is one message and exit code 1; anything else keeps its traceback."""
    from kafka.errors import KafkaError

    from gpl.artefacts import ArtefactsError
    from gpl.index.base import IndexUnavailable
    from streams.metrics import AddressError

    try:
        yield
    except (FileNotFoundError, ArtefactsError, IndexUnavailable, TopicMissingError, AddressError, KafkaError) as error:
        name = "" if str(error) else f"{type(error).__name__} "
        typer.echo(f"error: {name}{error}", err=True)
        raise typer.Exit(1) from error


def _setting_errors(error: pydantic.ValidationError) -> str:
    def line(detail: Any) -> str:
        # Secrets are among all settings together, and may stand under a key that is not known.
        hidden = detail["type"] in ("missing", "extra_forbidden") or not detail["loc"] or SECRETS & {*detail["loc"]}
        given = "" if hidden else f" (given: {detail['input']!r})"
        at = "".join(f"{part}." for part in detail["loc"])[:-1]
        return f"  {at}{': ' if at else ''}{detail['msg'].removeprefix('Value error, ')}{given}"

    return "\n".join(line(detail) for detail in error.errors())


def main() -> None:
    """Entry point of the ``gpl`` script: errors of use are one clear message and exit code 2."""
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso"),
            structlog.processors.format_exc_info,
            structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty()),
        ],
        logger_factory=structlog.PrintLoggerFactory(file=sys.stderr),
    )
    try:
        app()
    except (ConfigError, FileNotFoundError) as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)
    except pydantic.ValidationError as error:
        if error.title != Settings.__name__:
            raise
        Console(stderr=True).print(f"configuration:\n{_setting_errors(error)}", style="red", markup=False)
        sys.exit(2)


if __name__ == "__main__":
    main()
