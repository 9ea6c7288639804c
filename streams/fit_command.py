"""``gpl fit``: space, quantiser, generator and calibration from a data directory's past."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

import typer

from streams.cli_options import ConfigOption
from streams.settings import load


def fit(
    data: Annotated[Path, typer.Argument(help="Directory with items.jsonl and the past's feedback.jsonl.")],
    out: Annotated[Path | None, typer.Option("--out", help="A new directory; default: the setting artefacts.")] = None,
    seed: Annotated[int, typer.Option(help="Of the quantiser and the generator.")] = 0,
    config: ConfigOption = None,
) -> None:
    """Fit what labelling needs from past items and feedback: space, semantic ids, anchor generator, calibration."""
    # torch and what is built on it are loaded only where something is fitted.
    from streams.fitting import fit_directory

    settings = load(config)
    target = out or settings.artefacts
    # Where a killed run left the language model's training; the next one goes on there.
    training = target.with_name(f"{target.name}.training")
    try:
        if target.exists():
            raise FileExistsError(f"{target} exists; artefacts are written to a new directory")
        artefacts = fit_directory(data, settings, seed, typer.echo, training)
        artefacts.save(target)
        shutil.rmtree(training, ignore_errors=True)
    except (FileNotFoundError, NotADirectoryError, FileExistsError, ValueError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error
    typer.echo(f"artefacts written to {target}")
