"""``gpl evaluate`` and ``gpl datasets``: studies of the method on logged and on fully known data. No Kafka."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

datasets_app = typer.Typer(help="Data sets for gpl evaluate.", no_args_is_help=True)
DEFAULT_OUT = Path("runs/evaluate")


@datasets_app.command("convert")
def convert(
    name: Annotated[str, typer.Argument(help="jester, kuairec, coat, mind, amazon-office, amazon or online-retail.")],
    source: Annotated[Path, typer.Argument(help="Directory with the files of the source.")],
    destination: Annotated[Path, typer.Argument(help="A new directory, in the neutral format.")],
) -> None:
    """Convert a public data set into the neutral format."""
    from gpl.evaluation import neutral
    from gpl.evaluation.dataset import DataError
    from gpl.evaluation.sources import CONVERTERS

    if name not in CONVERTERS:
        raise typer.BadParameter(f"{name!r}; there are {', '.join(CONVERTERS)}", param_hint="NAME")
    try:
        dataset = CONVERTERS[name](source)
        neutral.save(dataset, destination, name)
    except (FileNotFoundError, FileExistsError, NotADirectoryError, DataError) as error:
        raise _failed(error) from error
    typer.echo(f"{dataset.describe()}\nwritten to {destination}")


@datasets_app.command("list")
def list_sets() -> None:
    """Name the built-in sets and those that can be converted."""
    from gpl.evaluation.sources import BUILT_IN, CONVERTERS

    typer.echo(f"built in: {', '.join(BUILT_IN)}\nto convert: {', '.join(CONVERTERS)}")


def evaluate(
    sets: Annotated[list[str] | None, typer.Argument(help="Built-in sets or directories; default: built-in.")] = None,
    data: Annotated[Path | None, typer.Option(help="A directory in the neutral format.")] = None,
    truth: Annotated[Path | None, typer.Option(help="CSV or JSONL: user, item, relevance of unexposed pairs.")] = None,
    methods: Annotated[str | None, typer.Option(help="Comma-separated; default: all.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds, from 0.")] = 5,
    tuning: Annotated[int, typer.Option(min=1, help="How many of the seeds settings are chosen with.")] = 3,
    jobs: Annotated[int, typer.Option(min=1, help="Processes; each takes one core.")] = 1,
    out: Annotated[Path, typer.Option(help="Directory of results.json, plots and the cache.")] = DEFAULT_OUT,
    write: Annotated[Path | None, typer.Option(help="Also write the page of results there, plots beside it.")] = None,
    encoder: Annotated[str, typer.Option(help="Any sentence-transformers model.")] = "all-MiniLM-L6-v2",
    dim: Annotated[int | None, typer.Option(min=1, help="Dimensions of the vectors to keep; default: all.")] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Most epochs of a pre-ranker.")] = None,
) -> None:
    """Train every method on one biased log and judge it on everything; computed results are kept and reused."""
    # One thread an operation, before torch and numpy are loaded: seeds run beside each other.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from dataclasses import replace

    from gpl.evaluation import plots, report
    from gpl.evaluation.dataset import DataError
    from gpl.evaluation.methods import METHODS
    from gpl.evaluation.sources import BUILT_IN
    from gpl.evaluation.sources.movielens import DatasetMissingError
    from gpl.evaluation.study import StudyConfig, run
    from gpl.evaluation.summary import summarise

    chosen: list[str | Path] = [*(sets or []), *([data] if data is not None else [])]
    config = StudyConfig(
        datasets=tuple(chosen) or tuple(BUILT_IN),
        methods=tuple(map(str.strip, methods.split(","))) if methods else tuple(method.name for method in METHODS),
        cache=out / "cache",
        seeds=tuple(range(seeds)),
        tuning=tuning,
        truth=truth,
        encoder=encoder,
        dim=dim,
        jobs=jobs,
    )
    if epochs is not None:
        config = replace(config, train=replace(config.train, epochs=epochs))
    console = Console()
    _writable("--out", out / "results.json")
    if write is not None:
        beside = write.parent / (write.stem if write.suffix else f"{write.name}-plots")
        _writable("--write", write, beside)
    try:
        results = run(config, lambda line: console.print(Text(line, style="dim")))
    except (FileNotFoundError, DatasetMissingError, DataError, ValueError) as error:
        raise _failed(error) from error
    summary = summarise(config, results)
    report.show(summary, console)
    (out / "results.json").write_text(json.dumps(summary, indent=1) + "\n")
    console.print(Text(f"\n{out / 'results.json'}"))
    for plot in plots.draw(summary, out):
        console.print(Text(str(plot)))
    if write is not None:
        names = [f"{beside.name}/{plot.name}" for plot in plots.draw(summary, beside)]
        write.write_text(report.markdown(summary, names))
        console.print(Text(str(write)))


def _writable(option: str, file: Path, *directories: Path) -> None:
    """Before hours of study, not after them: raises typer.Exit where ``file`` or the directories cannot be written."""
    at = file
    try:
        for at in (file.parent, *directories):
            at.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=at).close()
        at = file
        if file.exists():
            file.open("a").close()
    except OSError as error:
        raise _failed(f"{option}: cannot write {at}: {error.strerror}") from error


def _failed(error: Exception | str) -> typer.Exit:
    typer.echo(f"error: {error}", err=True)
    return typer.Exit(1)
