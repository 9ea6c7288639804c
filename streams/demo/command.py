"""``gpl demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text


def demo(
    data: Annotated[
        Path | None,
        typer.Option(help="folder of items.jsonl, recalls.jsonl and feedback.jsonl; default: MovieLens-100K"),
    ] = None,
    out: Annotated[Path, typer.Option(help="where everything of the run is kept")] = Path("runs/demo"),
    prepare: Annotated[bool, typer.Option("--prepare", help="only what can be kept: convert, embed, fit")] = False,
    broker: Annotated[str, typer.Option(help="auto, apache, noida, or host:port of one that runs")] = "auto",
    speed: Annotated[float | None, typer.Option(min=0.001, help="event seconds a second; default: --duration")] = None,
    duration: Annotated[float, typer.Option(min=1.0, help="seconds that the stream takes")] = 100.0,
    window: Annotated[
        float | None, typer.Option(min=0.001, help="label window in event seconds; default: one day")
    ] = None,
    train_fraction: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="share of the feedback, the earliest, that is fitted on")
    ] = 0.5,
    config: Annotated[Path | None, typer.Option(help="TOML file laid over the demo's settings")] = None,
    seed: Annotated[int, typer.Option(min=0, help="of the simulated upstream and the fit")] = 0,
) -> None:
    """Stream events through the whole system, watch the labels and the pre-ranker, and get a report."""
    from streams.broker.process import BrokerError
    from streams.demo import ready, run
    from streams.demo.movielens import DatasetMissingError
    from streams.demo.processes import ProcessEndedError

    console = Console(highlight=False)
    options = ready.Options(out, data, broker, speed, duration, config, window, train_fraction, seed)
    try:
        if prepare:
            ready.fit(options, lambda text: console.print(Text(text)))
        else:
            run.run(options, console)
    except (ready.DemoError, BrokerError, DatasetMissingError, ProcessEndedError, OSError) as error:
        Console(stderr=True).print(Text(f"error: {error}", style="red"))
        raise typer.Exit(1) from None
