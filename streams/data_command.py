"""``gpl validate DIR``."""

from __future__ import annotations

import sys
import time
from itertools import islice
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from streams.cli_options import ConfigOption
from streams.data.validate import Problem, problems
from streams.settings import load

_SHOWN = 200


def validate(
    directory: Annotated[Path, typer.Argument(help="directory with items.jsonl, recalls.jsonl and feedback.jsonl")],
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object a problem, all of them")] = False,
    window: Annotated[
        float | None, typer.Option(min=0.0, help="label window in seconds; default: labels.window_seconds")
    ] = None,
    config: ConfigOption = None,
) -> None:
    """Check a data directory: file, line, field and reason of each bad record. Exit status 1 when there are errors."""
    settings = load(config)
    window = settings.labels.window_seconds if window is None else window
    until = int((time.time() + settings.labels.max_ahead_seconds) * 1000)
    found = problems(directory, settings.kafka.max_record_bytes, window, until)
    errors = 0
    if as_json:
        for problem in found:
            errors += problem.severity == "error"
            sys.stdout.write(msgspec.json.encode(problem).decode() + "\n")
    else:
        shown = list(islice(found, _SHOWN))
        rest = [problem.severity for problem in found]
        errors = sum(severity == "error" for severity in [*(problem.severity for problem in shown), *rest])
        _print(directory, shown, len(rest), errors)
    if errors:
        raise typer.Exit(1)


def _print(directory: Path, shown: list[Problem], more: int, errors: int) -> None:
    console = Console()
    if not shown:
        console.print(Text(f"{directory}: no problems"))
        return
    console.print(table(shown))
    if more:
        console.print(f"... and {more} more; --json prints all")
    console.print(f"{errors} errors, {len(shown) + more - errors} warnings")


def table(shown: list[Problem]) -> Table:
    """Problems as a table for the terminal; text from the data is never read as markup."""
    result = Table(box=None, pad_edge=False)
    for name in ("", "file", "line", "field", "reason"):
        result.add_column(name, overflow="fold", justify="right" if name == "line" else "left")
    for problem in shown:
        mark = Text("error", style="red") if problem.severity == "error" else Text("warning", style="yellow")
        place = str(problem.line) if problem.line else ""
        result.add_row(mark, Text(problem.file), place, Text(problem.field), Text(problem.reason))
    return result
