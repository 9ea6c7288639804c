"""``gpl backfill``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from streams.cli_options import ConfigOption
from streams.settings import load
from streams.storage import InUseError, open_storage

if TYPE_CHECKING:
    from streams.history.backfill import Outcome

_PUBLISH = "Put anchors and profiles on their topics too; where --out is complete already, do only this."


def backfill(
    data: Annotated[Path, typer.Argument(help="Directory with items.jsonl, recalls.jsonl and feedback.jsonl.")],
    out: Annotated[Path, typer.Option("--out", help="A new directory for labels, anchors and profiles.")] = Path(
        "runs/backfill"
    ),
    processes: Annotated[int, typer.Option(min=1, help="On this machine.")] = os.cpu_count() or 1,
    ray: Annotated[bool, typer.Option("--ray", help="Workers of Ray instead (extra `ray`).")] = False,
    publish: Annotated[bool, typer.Option("--publish", help=_PUBLISH)] = False,
    config: ConfigOption = None,
) -> None:
    """The first anchors, labels and checkpoint from history, by the same joiner, labeller and trainer as the stream.

    Needs what `gpl fit` wrote. A trainer started afterwards goes on from the checkpoint and publishes the first model.
    """
    from kafka.errors import KafkaError

    from streams.history import backfill as work

    settings = load(config)
    try:
        # Without a checkpoint it is that of other settings (a refit), and nothing was made under these.
        if work.is_complete(data, out, settings) and (publish or work.has_checkpoints(settings)):
            typer.echo(f"{out} is complete, " + ("it is only published" if publish else "nothing is left to do"))
        else:
            with open_storage(settings.trainer.checkpoints).held():  # a trainer that starts meanwhile begins without it
                _tell(work.backfill(data, out, settings, processes, ray, typer.echo))
        counts = work.publish(out, settings) if publish else {}
    except InUseError as error:
        typer.echo(f"error: trainer.checkpoints: {error}, by `gpl train` or another backfill", err=True)
        raise typer.Exit(1) from error
    except (ValueError, FileNotFoundError, ImportError, KafkaError) as error:
        typer.echo(f"error: {str(error) or type(error).__name__}", err=True)
        raise typer.Exit(1) from error
    for topic, count in counts.items():
        typer.echo(f"{count:,} records on {topic}")


def _tell(outcome: Outcome) -> None:
    reasons = ", ".join(f"{reason} {count:,}" for reason, count in sorted(outcome.refreshes.items()))
    typer.echo(f"anchor refreshes: {reasons or 'none'}")
    typer.echo(f"checkpoint {outcome.checkpoint}")
    typer.echo("  ".join(f"{name} {value:.4f}" for name, value in outcome.metrics.items()))
