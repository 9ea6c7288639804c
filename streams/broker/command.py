"""``gpl broker start|stop|status``: a local Kafka without Docker."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from streams import settings
from streams.broker import daemon
from streams.broker.process import BrokerError
from streams.broker.select import choose
from streams.cli_options import ConfigOption

app = typer.Typer(no_args_is_help=True, help="A local Kafka without Docker.")
_out = Console(highlight=False, soft_wrap=True)
_err = Console(stderr=True, highlight=False, soft_wrap=True)

Directory = Annotated[Path, typer.Option("--directory", "-d", help="Where the broker keeps everything.")]


def configured_port(bootstrap_servers: str) -> int:
    """The port at which these settings look for a broker. Raises BrokerError when that is on another machine."""
    found = re.fullmatch(r"(?:127\.0\.0\.1|localhost):(\d{1,5})", bootstrap_servers)
    if found is None:
        raise BrokerError(
            f"kafka.bootstrap_servers = {bootstrap_servers!r} is not an address of this machine; a local broker "
            "listens on 127.0.0.1, say --port for one beside it"
        )
    return int(found[1])


def _fail(error: Exception) -> typer.Exit:
    _err.print(f"error: {error}", markup=False, style="red")
    return typer.Exit(1)


@app.command()
def start(
    kind: Annotated[Literal["auto", "apache", "noida"], typer.Option(help="noida is for the demo only.")] = "auto",
    directory: Directory = daemon.DEFAULT_DIRECTORY,
    port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="0: a free one. Default: that of kafka.bootstrap_servers.")
    ] = None,
    config: ConfigOption = None,
) -> None:
    """Start it in the background and wait until it serves. Running already is fine."""
    kafka = settings.load(config).kafka
    try:
        present = daemon.running(directory)
        choice = choose(present.kind if present is not None and kind == "auto" else kind)
        wanted = configured_port(kafka.bootstrap_servers) if port is None else port
        if present is None:
            _out.print(f"starting {choice.description}: {choice.reason}", markup=False)
        state, started = daemon.start(choice, kafka, directory, wanted)
    except BrokerError as error:
        raise _fail(error) from None
    _out.print(f"[green]{'serving' if started else 'already running'}[/] at {state.bootstrap}")
    _out.print(f"pid {state.pid}, log {state.log}", markup=False)
    if state.bootstrap.replace("127.0.0.1", "localhost") != kafka.bootstrap_servers.replace("127.0.0.1", "localhost"):
        _out.print(f"to use it: export GPL_KAFKA__BOOTSTRAP_SERVERS={state.bootstrap}", markup=False)


@app.command()
def stop(directory: Directory = daemon.DEFAULT_DIRECTORY) -> None:
    """End it; its data stay. Not running is fine."""
    try:
        state = daemon.stop(directory)
    except BrokerError as error:
        raise _fail(error) from None
    _out.print(f"not running in {directory}" if state is None else f"stopped (pid {state.pid})", markup=False)


@app.command()
def status(directory: Directory = daemon.DEFAULT_DIRECTORY) -> None:
    """Tell whether it runs and answers; exit code 0 if so, else 1."""
    state = daemon.running(directory)
    if state is None:
        _out.print(f"not running in {directory}", markup=False)
        raise typer.Exit(1)
    answers = daemon.serving(state)
    _out.print(
        f"[green]serving[/] at {state.bootstrap}" if answers else f"[red]does not answer[/] at {state.bootstrap}"
    )
    _out.print(f"{state.description}, pid {state.pid}, log {state.log}", markup=False)
    if not answers:
        raise typer.Exit(1)
