"""``gpl inspect user|item|sid``: what the method sees, from a data directory and fitted artefacts, without a broker."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
from rich.console import Console

from streams.cli_options import ConfigOption
from streams.settings import load

if TYPE_CHECKING:
    from gpl.inspect import Inspector, ItemView, SidView, UserView

app = typer.Typer(help="A look inside: a user's anchors and labels, an item, a semantic id.", no_args_is_help=True)

DataOption = Annotated[Path, typer.Option("--data", help="Directory with items.jsonl and feedback.jsonl.")]
ArtefactsOption = Annotated[Path | None, typer.Option("--artefacts", help="Default: the setting artefacts.")]
HtmlOption = Annotated[Path | None, typer.Option("--html", help="Draw it there too, as one page.")]


@app.command()
def user(
    user_id: str,
    data: DataOption,
    artefacts: ArtefactsOption = None,
    until: Annotated[int | None, typer.Option(help="Event time in ms: clicks after it are left out.")] = None,
    html: HtmlOption = None,
    config: ConfigOption = None,
) -> None:
    """A user: history, anchors with their nearest items, labels over the catalogue, each confidence factor."""
    inspector = _open(data, artefacts, config)
    try:
        view = inspector.user(user_id, until=until)
    except KeyError as error:
        _stop(f"{error.args[0]}; most clicks have {', '.join(map(repr, inspector.users[:5]))}")
    _show(view, html)


@app.command()
def item(
    item_id: str,
    data: DataOption,
    artefacts: ArtefactsOption = None,
    html: HtmlOption = None,
    config: ConfigOption = None,
) -> None:
    """An item: its semantic id, what is near, whom it is labelled for."""
    inspector = _open(data, artefacts, config)
    try:
        view = inspector.item(item_id)
    except KeyError as error:
        _stop(error.args[0])
    _show(view, html)


@app.command()
def sid(
    codes: Annotated[str, typer.Argument(help="Codes with dashes, such as 12-7-40; fewer name all that begin so.")],
    data: DataOption,
    artefacts: ArtefactsOption = None,
    html: HtmlOption = None,
    config: ConfigOption = None,
) -> None:
    """A semantic id, or the beginning of one: its items, what is below and beside it."""
    try:
        wanted = tuple(int(code) for code in codes.split("-"))
    except ValueError as error:
        raise typer.BadParameter(
            f"{codes!r}: expected numbers with dashes, such as 12-7-40", param_hint="CODES"
        ) from error
    inspector = _open(data, artefacts, config)
    try:
        view = inspector.sid(wanted)
    except (KeyError, ValueError) as error:
        _stop(str(error.args[0]))
    _show(view, html)


def _open(data: Path, artefacts: Path | None, config: Path | None) -> Inspector:
    # torch and what is built on it are loaded only where something is inspected.
    from gpl.artefacts import Artefacts
    from gpl.catalogue import ItemContent
    from gpl.inspect import Inspector
    from gpl.labels.labeller import Config
    from gpl.space import PRECOMPUTED, SentenceEncoder
    from streams.contracts import Feedback, Item
    from streams.data.reader import records
    from streams.fitting import exposures, usable

    settings = load(config)
    for name in ("items.jsonl", "feedback.jsonl"):
        if not (data / name).is_file():
            _stop(f"--data {data}: no {name} there, expected a directory with items.jsonl and feedback.jsonl")
    cap, labels = settings.kafka.max_record_bytes, settings.labels
    try:
        fitted = Artefacts.load(artefacts or settings.artefacts)
        taken = usable(records(data / "items.jsonl", Item, cap), lambda said: typer.echo(said, err=True))
        found = [ItemContent(r.item_id, r.text, r.embedding) for r in taken]
        if not found:
            raise ValueError(f"{data / 'items.jsonl'}: no valid record")
        events = exposures(records(data / "feedback.jsonl", Feedback, cap))
        encoder = None
        if fitted.space.encoder != PRECOMPUTED:
            encoder = SentenceEncoder(fitted.space.encoder, settings.space.cache, settings.space.batch_size)
        return Inspector(
            fitted,
            found,
            events,
            encoder,
            Config(labels.matching, labels.kernel_tau, labels.dispersion, labels.history, labels.generation),
            settings.generator.beams,
            settings.generator.history,
            settings.profiles.min_positives,
        )
    except (OSError, ValueError) as error:
        _stop(str(error))


def _show(view: UserView | ItemView | SidView, target: Path | None) -> None:
    from gpl.inspect import html, text

    Console().print(text(view))
    if target is not None:
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(html(view), encoding="utf-8")
        except OSError as error:
            _stop(f"--html: cannot write {target}: {error.strerror}")
        typer.echo(f"page written to {target}")


def _stop(message: str) -> NoReturn:
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(1)
