"""``gpl models list|show|diff|rollback|pin|unpin|accept|checkpoints|rebuild|export``."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer
from kafka.errors import KafkaError
from rich.console import Console
from rich.table import Column, Table

from streams.cli_options import ConfigOption
from streams.settings import Settings, load

if TYPE_CHECKING:
    from streams.models import ModelStore

# torch comes with the models: it is imported where it is needed, so that `gpl --help` is quick.

app = typer.Typer(no_args_is_help=True, help="Published models: what there is, what serves, and putting it right.")
# Piped into a file or a pager the tables keep their width. Words of the data are never markup.
_out = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 200, markup=False, emoji=False)
_err = Console(stderr=True, highlight=False, soft_wrap=True, markup=False, emoji=False)

AsJson = Annotated[bool, typer.Option("--json", help="JSON on standard output.")]
Version = Annotated[str, typer.Argument(metavar="VERSION", help="As `gpl models list` names it, or its number.")]

_FIGURES = ("auc", "gauc", "log_loss", "ece", "hr10")


@app.command("list")
def list_models(
    limit: Annotated[int, typer.Option(min=0, help="Show the newest so many; 0 shows all.")] = 20,
    as_json: AsJson = False,
    config: ConfigOption = None,
) -> None:
    """Versions, newest first, which of them serves or is pinned, and what the gate refused last."""
    from streams.models import ModelError

    settings, store = _opened(config)
    with _clear_errors():
        serving, pin, refusals = _serving(settings), store.pinned(), store.refusals()
        rows: list[dict[str, Any]] = []
        versions = store.versions()
        for version in versions[: limit or None]:
            row: dict[str, Any] = {"version": version}
            try:
                row |= msgspec.to_builtins(store.manifest(version)[0])
            except ModelError as error:
                row["damaged"] = str(error)
            row["serving"], row["pinned"] = version == serving, pin is not None and pin.version == version
            rows.append(row)
        accepted = store.accepted()
    if as_json:
        document = {"models": rows, "serving": serving, "pin": pin, "refusals": refusals, "accept_next": accepted}
        typer.echo(json.dumps(msgspec.to_builtins(document), indent=2))
        return
    table = Table(Column("version", no_wrap=True), "", "published", "records", "newest event", *_FIGURES)
    for row in rows:
        state = ", ".join(word for word in ("serving", "pinned") if row[word])
        if "damaged" in row:
            table.add_row(row["version"], f"damaged: {row['damaged']}")
            continue
        figures = [f"{row['metrics'][name]:.4f}" if name in row["metrics"] else "" for name in _FIGURES]
        times = _time(row["published_at"]), _time(row["newest_event_ts"])
        table.add_row(row["version"], state, times[0], f"{row['records']:,}", times[1], *figures)
    _out.print(table)
    if len(rows) < len(versions):
        _out.print(f"the newest {len(rows)} of {len(versions)}; --limit 0 shows all")
    if pin is not None:
        _out.print(
            f"pinned: {pin.version} since {_time(pin.at)}; the trainer announces nothing until `gpl models unpin`"
        )
    if accepted:
        _out.print("the next model is published without comparison with the last")
    for refused in refusals[-5:]:
        times_in_a_row = f", {refused.times} times since {_time(refused.first_at)}" if refused.times > 1 else ""
        _out.print(
            f"refused: {_time(refused.last_at)}, step {refused.step}, {refused.reason}: {refused.why}{times_in_a_row}"
        )


@app.command()
def show(version: Version, as_json: AsJson = False, config: ConfigOption = None) -> None:
    """All that is known of a version, and whether its files are sound."""
    from streams.trainer import versions

    settings, store = _opened(config)
    with _clear_errors():
        name = versions.resolve(store, version)
        published = store.read(name)
        pin, serving = store.pinned(), _serving(settings)
    document = {
        **msgspec.to_builtins(published.manifest),
        "uri": store.uri(name),
        "serving": name == serving,
        "pinned": pin is not None and pin.version == name,
        "users": len(published.ids.users),
        "items": len(published.ids.items),
        "probe_requests": len(published.probe.users),
        "parameters": sum(tensor.numel() for tensor in published.weights.values()),
    }
    if as_json:
        typer.echo(json.dumps(document, indent=2))
        return
    table = Table(show_header=False, box=None)
    for key, value in document.items():
        if key in ("published_at", "newest_event_ts"):
            value = f"{_time(value)} ({value})"
        table.add_row(key, json.dumps(value) if isinstance(value, dict) else str(value))
    _out.print(table)
    _out.print("sound: every file is what its manifest says")


@app.command()
def diff(first: Version, second: Version, as_json: AsJson = False, config: ConfigOption = None) -> None:
    """What changed from one version to another: figures, ids, weights."""
    from streams.trainer import versions

    _, store = _opened(config)
    with _clear_errors():
        names = versions.resolve(store, first), versions.resolve(store, second)
        document = versions.difference(store, *names)
    if as_json:
        typer.echo(json.dumps(document, indent=2))
        return
    _out.print(f"{names[0]} -> {names[1]}: {document['records']:+,} label records")
    table = Table("figure", *names, "change")
    for name, pair in document["metrics"].items():
        one, other = pair["first"], pair["second"]
        change = "" if one is None or other is None else f"{other - one:+.4f}"
        table.add_row(name, *("" if x is None else f"{x:.4f}" for x in (one, other)), change)
    _out.print(table)
    for name, of in document["ids"].items():
        _out.print(f"{name}: {of['added']} added, {of['removed']} forgotten, {of['kept']} in both")
    table = Table("weights", "change (norm)", "relative", "largest")
    for name, of in document["weights"].items():
        if "shapes" in of:
            table.add_row(name, f"shapes {of['shapes'][0]} and {of['shapes'][1]}")
        else:
            relative = "" if of["relative"] is None else f"{of['relative']:.4f}"
            table.add_row(name, f"{of['change']:.4g}", relative, f"{of['largest']:.4g}")
    _out.print(table)


@app.command()
def rollback(
    version: Version,
    pin: Annotated[bool, typer.Option(help="Hold it against what the trainer publishes next.")] = True,
    config: ConfigOption = None,
) -> None:
    """Put an older version into service by announcing it anew; scorers reload. It stays until `gpl models unpin`."""
    from streams.trainer import versions

    settings, store = _opened(config)
    with _clear_errors():
        name = versions.resolve(store, version)
        versions.put_into_service(settings, store, name, pin)
    held = (
        "pinned; `gpl models unpin` lets the trainer publish again" if pin else "until the trainer publishes the next"
    )
    _out.print(f"announced {name}, {held}")


@app.command()
def pin(
    version: Annotated[str | None, typer.Argument(metavar="[VERSION]", help="By default the one that serves.")] = None,
    config: ConfigOption = None,
) -> None:
    """Keep a version in service, whatever the trainer publishes."""
    from streams.trainer import versions

    settings, store = _opened(config)
    with _clear_errors():
        if version is None:
            serving = versions.in_service(settings)
            if serving is None:
                raise typer.BadParameter("no model has been announced yet", param_hint="VERSION")
            version = serving.version
        name = versions.resolve(store, version)
        versions.hold(settings, store, name)
    _out.print(f"pinned {name}")


@app.command()
def unpin(config: ConfigOption = None) -> None:
    """Let the trainer announce its models again, from the next one on."""
    from streams.models import ModelError

    _, store = _opened(config)
    with _clear_errors():
        try:
            held = store.pinned()
            said = "nothing was pinned" if held is None else f"unpinned {held.version}"
        except ModelError:  # it can be taken off all the same
            said = "unpinned what could not be read"
        store.unpin()
    _out.print(said)


@app.command()
def accept(config: ConfigOption = None) -> None:
    """Let the next model pass without comparison with the last one: it is the world that has changed, not the feed.

    It must still be finite, and trained on enough.
    """
    _, store = _opened(config)
    with _clear_errors():
        store.accept()
    _out.print("the next model is published without comparison with the last")


@app.command()
def checkpoints(as_json: AsJson = False, config: ConfigOption = None) -> None:
    """Places from which `gpl train --start-from step-N` can go on."""
    from streams.trainer.checkpoint import CheckpointError, CheckpointStore

    settings = load(config)
    rows: list[dict[str, Any]] = []
    with _clear_errors():
        store = CheckpointStore(settings.trainer.checkpoints, keep=1)
        for step in reversed(store.steps()):
            try:
                rows.append(msgspec.to_builtins(store.manifest(step), str_keys=True))
            except CheckpointError as error:
                rows.append({"step": step, "damaged": str(error)})
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    table = Table("step", "run", "written", "newest event", *_FIGURES)
    for row in rows:
        if "damaged" in row:
            table.add_row(f"step-{row['step']}", "", f"damaged: {row['damaged']}")
            continue
        figures = [f"{row['metrics'][name]:.4f}" if name in row["metrics"] else "" for name in _FIGURES]
        table.add_row(
            f"step-{row['step']}", str(row["run"]), _time(row["written_at"]), _time(row["newest_event_ts"]), *figures
        )
    _out.print(table)


@app.command()
def rebuild(
    version: Version,
    out: Annotated[Path | None, typer.Option(help="Write the rebuilt model there, as a version directory.")] = None,
    base: Annotated[int | None, typer.Option(help="Step of a checkpoint to begin with.")] = None,
    from_log: Annotated[bool, typer.Option("--from-log", help="From the log alone; no checkpoint is used.")] = False,
    as_json: AsJson = False,
    config: ConfigOption = None,
) -> None:
    """Make a version again from the log and the batch journal, and compare bit for bit; exit status 1 if it differs."""
    from streams.models import ModelStore
    from streams.trainer import rebuild as again
    from streams.trainer import versions

    settings, store = _opened(config)
    with _clear_errors():
        name = versions.resolve(store, version)
        with _err.status("reading the log") as status:

            def progress(done: int, of: int) -> None:
                status.update(f"{done:,} of {of:,} steps")

            made = again.rebuild(settings, name, base, from_log, progress=progress)
        if out is not None:
            manifest = store.manifest(name)[0]
            ModelStore(out).write(manifest, made.candidate.weights, made.candidate.ids)
    result = {
        "version": name,
        "identical": not made.differing,
        "steps": made.steps,
        "base": made.base,
        "differing": made.differing,
        "first_difference": made.first_difference,
        "software": made.software,
        "out": None if out is None else str(out / name),
    }
    if as_json:
        typer.echo(json.dumps(result, indent=2))
    else:
        begun = "the log alone" if made.base is None else f"checkpoint step-{made.base}"
        verdict = "identical, bit for bit" if not made.differing else f"differs in {', '.join(made.differing)}"
        _out.print(f"{name}: {made.steps:,} steps from {begun}: {verdict}")
        if made.first_difference is not None:
            _out.print(f"the loss first differs at step {made.first_difference}")
        for what, (then, now) in made.software.items():
            _out.print(f"trained with {what} {then}, here {now}: the last bits may differ")
    if made.differing:
        raise typer.Exit(1)


@app.command()
def export(
    version: Version,
    out: Annotated[Path, typer.Option("--out", help="File of the graph; the ids table is written beside it.")],
    config: ConfigOption = None,
) -> None:
    """Write a version as an ONNX graph, checked against the network under onnxruntime (extra `onnx`)."""
    from streams import onnx_export
    from streams.trainer import versions
    from streams.views import labeller_config

    settings, store = _opened(config)
    with _clear_errors():
        name = versions.resolve(store, version)
        ids = onnx_export.export(store.read(name), labeller_config(settings.labels), out)
    _out.print(f"{name} written to {out}, its ids to {ids}")


def _opened(config: Path | None) -> tuple[Settings, ModelStore]:
    from streams.models import ModelStore

    settings = load(config)
    with _clear_errors():
        return settings, ModelStore(settings.trainer.models)


def _serving(settings: Settings) -> str | None:
    """The version announced last; None, with a warning, when no broker says."""
    from streams.trainer import versions

    try:
        update = versions.in_service(settings)
    except (KafkaError, ValueError) as error:
        _err.print(f"warning: which version serves is not known: {error or type(error).__name__}", style="yellow")
        return None
    return None if update is None else update.version


def _time(millis: int) -> str:
    return datetime.fromtimestamp(millis / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S")


@contextmanager
def _clear_errors() -> Iterator[None]:
    """What an operator can put right is one message and exit code 1; anything else keeps its traceback."""
    from gpl.artefacts import ArtefactsError
    from streams.log_view import TopicMissingError
    from streams.models import ModelError
    from streams.trainer.batch_journal import JournalError
    from streams.trainer.checkpoint import CheckpointError
    from streams.trainer.rebuild import RebuildError

    try:
        yield
    except (
        ModelError,
        JournalError,
        CheckpointError,
        RebuildError,
        ArtefactsError,
        TopicMissingError,
        KafkaError,
        OSError,  # of the storage
        ImportError,
    ) as error:
        name = "" if str(error) else type(error).__name__
        _err.print(f"error: {name}{error}")
        raise typer.Exit(1) from error
