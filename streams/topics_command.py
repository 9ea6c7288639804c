"""``gpl topics create|check``."""

from __future__ import annotations

import typer
from kafka.errors import KafkaError
from rich.console import Console

from streams import settings, topics
from streams.cli_options import ConfigOption

app = typer.Typer(no_args_is_help=True, help="Create the Kafka topics, or check those that are there.")
_out = Console(highlight=False, soft_wrap=True)
_err = Console(stderr=True, highlight=False, soft_wrap=True)


def _fail(error: Exception) -> typer.Exit:
    _err.print(f"error: {error}", markup=False, style="red")
    return typer.Exit(1)


@app.command()
def create(config: ConfigOption = None) -> None:
    """Create the topics that are missing; those that exist are left alone and checked."""
    kafka = settings.load(config).kafka
    try:
        created = topics.create(kafka)
    except (ConnectionError, KafkaError) as error:
        raise _fail(error) from None
    for name in created:
        _out.print(f"created {name}", markup=False)
    _out.print(f"{len(created)} created, {len(topics.TOPICS) - len(created)} there before")
    check(config)


@app.command()
def check(config: ConfigOption = None) -> None:
    """Compare the topics with the settings; exit code 1 with a sentence for each difference."""
    kafka = settings.load(config).kafka
    try:
        problems = topics.check(kafka)
    except (ConnectionError, KafkaError) as error:
        raise _fail(error) from None
    for problem in problems:
        _err.print(problem, markup=False, style="red")
    if problems:
        raise typer.Exit(1)
    _out.print(f"[green]{len(topics.TOPICS)} topics are as configured[/] at {kafka.bootstrap_servers}")
