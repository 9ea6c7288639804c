"""``gpl replay`` and ``gpl capture``."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer
from rich.console import Console
from rich.text import Text

from streams.cli_options import ConfigOption
from streams.settings import Settings, load

if TYPE_CHECKING:  # what replay needs takes a second to import
    from streams.replay.log import Log
    from streams.replay.select import Selection, Wanted

FromOption = Annotated[
    str | None, typer.Option("--from", help="recalls from this event time on: ISO 8601 (UTC) or milliseconds")
]
ToOption = Annotated[str | None, typer.Option("--to", help="recalls before this event time")]
LastOption = Annotated[
    str | None, typer.Option("--last", help="the last 90s, 15m, 2h, 1d of event time, counted from the newest recall")
]
OffsetsOption = Annotated[
    str | None, typer.Option("--offsets", help="PARTITION:FIRST-LAST,... or FIRST-LAST for all, of --topic")
]
UserOption = Annotated[str | None, typer.Option("--user", help="requests of this user only")]
TopicOption = Annotated[
    str, typer.Option("--topic", help="what --offsets count in: recalls, labels, or feedback (what it joined)")
]
AheadOption = Annotated[
    str | None,
    typer.Option(
        "--ahead",
        help="how far an event may be ahead of its Kafka time, which says how far before the range is read; default: "
        "labels.max_ahead_seconds, beyond which events are refused. Less reads less.",
    ),
]
CaptureOption = Annotated[Path | None, typer.Option("--capture", help="read a capture instead of a broker")]
T = TypeVar("T")
# Words of the data are never markup.
_out = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)


def replay(
    from_: FromOption = None,
    to: ToOption = None,
    last: LastOption = None,
    offsets: OffsetsOption = None,
    user: UserOption = None,
    topic: TopicOption = "recalls",
    execute: Annotated[bool, typer.Option("--execute", help="run it; without, only a preview is shown")] = False,
    compare: Annotated[bool, typer.Option("--compare", help="with the recorded labels: what changed and why")] = False,
    changes: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="KEY=VALUE, repeatable: replay under another setting, e.g. labels.window_seconds=900"
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="new directory for the labels; default: runs/replay/TIME")
    ] = None,
    output_prefix: Annotated[
        str | None, typer.Option("--output-prefix", help="write to the topic PREFIXlabels of the broker instead")
    ] = None,
    no_output: Annotated[bool, typer.Option("--no-output", help="write no labels (only compare)")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print the result as JSON")] = False,
    html: Annotated[Path | None, typer.Option("--html", help="write the result as one HTML file")] = None,
    top: Annotated[int, typer.Option("--top", min=1, help="biggest moves that are kept of each cause")] = 20,
    capture: CaptureOption = None,
    ahead: AheadOption = None,
    config: ConfigOption = None,
) -> None:
    """Label a range of the log again, in a group of its own, and compare with what was recorded."""
    from streams.replay import execute as running
    from streams.replay import output, preview, report
    from streams.replay.capture import CaptureLog
    from streams.replay.log import LogError
    from streams.replay.run import Setup
    from streams.replay.select import resolve
    from streams.replay.whatif import what_if

    places = {"--out": out is not None, "--output-prefix": output_prefix is not None, "--no-output": no_output}
    if len(named := [option for option, given in places.items() if given]) > 1:
        raise typer.BadParameter(f"{named[0]} and {named[1]} exclude each other", param_hint=named[1])
    with clear_errors():
        wanted = wanted_range(from_, to, last, offsets, user, topic)
        with open_log(config, capture) as (log, settings, held):
            asked = what_if(settings, changes or ())
            if isinstance(log, CaptureLog):
                log.check(asked.settings.labels)
            ahead_ms = _ahead(ahead, asked.settings)
            selection = resolve(log, wanted, asked.settings.labels, held)
            if not execute:
                setup = Setup.of(asked.settings, log.frame)
                seen = preview.preview(log, selection, setup, compare, ahead_ms)
                if as_json:
                    typer.echo(json.dumps(report.preview_document(seen, selection), indent=2))
                    return
                _out.print(Text(report.selection_text(selection)), report.preview_table(seen))
                _out.print("\nNothing was run. --execute runs it.", style="bold")
                return
            _make_room(html)
            outputs: list[output.Output] = []
            if output_prefix is not None:
                outputs.append(output.Topic(settings.kafka, output_prefix, len(log.partitions("recalls"))))
            elif not no_output:
                default = Path("runs/replay") / f"{datetime.now(UTC):%Y%m%d-%H%M%S}"
                outputs.append(output.Files(out or default))
            run = running.execute(log, selection, settings, asked, outputs, compare, ahead_ms, top)
            if as_json:
                typer.echo(json.dumps(run.document, indent=2))
            else:
                _out.print(Text(report.selection_text(selection)))
                _out.print(report.run_table(run, top))
            if html is not None:  # last: a page that cannot be written must not cost the result
                html.write_text(report.html(run.document), encoding="utf-8")
            if run.empty:
                raise LogError("the selection holds no request")


def capture(
    directory: Annotated[Path, typer.Argument(help="new directory for the capture")],
    from_: FromOption = None,
    to: ToOption = None,
    last: LastOption = None,
    offsets: OffsetsOption = None,
    user: UserOption = None,
    topic: TopicOption = "recalls",
    ahead: AheadOption = None,
    config: ConfigOption = None,
) -> None:
    """Save what a range needs as files that `gpl replay --capture` and `gpl explain --capture` read anywhere."""
    from streams.replay import record, report
    from streams.replay.run import Replay, Setup
    from streams.replay.select import resolve

    wanted = wanted_range(from_, to, last, offsets, user, topic)
    with clear_errors(), open_log(config, None) as (log, settings, _):
        selection = resolve(log, wanted, settings.labels)
        replay = Replay(log, selection, Setup.of(settings, log.frame), ahead_ms=_ahead(ahead, settings))
        manifest = record.capture(log, selection, settings, directory, replay)
        size = sum(path.stat().st_size for path in directory.iterdir())
        entries = sum(file.entries for file in manifest.files.values())
        _out.print(Text(report.selection_text(selection)))
        said = f"{manifest.requests:,} requests, {entries:,} entries, {report.size_text(size)} in {directory}"
        _out.print(Text(said))


def wanted_range(
    from_: str | None,
    to: str | None,
    last: str | None,
    offsets: str | None = None,
    user: str | None = None,
    topic: str = "recalls",
) -> Wanted:
    """What these options ask for. Raises typer.BadParameter."""
    from streams.replay import select

    if topic not in select.TOPICS:
        raise typer.BadParameter(f"{topic!r} is none of {', '.join(select.TOPICS)}", param_hint="--topic")
    if last is not None and from_ is not None:
        raise typer.BadParameter("--from and --last exclude each other", param_hint="--last")
    return select.Wanted(
        from_ms=_read("--from", from_, select.moment_ms),
        to_ms=_read("--to", to, select.moment_ms),
        last_ms=_read("--last", last, select.duration_ms),
        offsets=_read("--offsets", offsets, select.offset_ranges) or {},
        user=user,
        topic=topic,
    )


def _read(option: str, text: str | None, read: Callable[[str], T]) -> T | None:
    try:
        return None if text is None else read(text)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=option) from None


def _make_room(page: Path | None) -> None:
    """Make the directory of a page before the work begins: what can fail late must not."""
    if page is not None:
        page.parent.mkdir(parents=True, exist_ok=True)


def _ahead(ahead: str | None, settings: Settings) -> int:
    from streams.replay.select import duration_ms

    given = _read("--ahead", ahead, duration_ms)
    return int(settings.labels.max_ahead_seconds * 1000) if given is None else given


@contextlib.contextmanager
def open_log(config: Path | None, capture: Path | None) -> Iterator[tuple[Log, Settings, Selection | None]]:
    """The log to read, the settings in force for it, and for a capture what it holds."""
    from threadpoolctl import threadpool_limits

    from streams.frame import Frame
    from streams.replay.capture import CaptureLog
    from streams.replay.log import BrokerLog

    # As in the labels role: with more, a product's last bits could be others.
    with threadpool_limits(1):
        if capture is not None:
            captured = CaptureLog(capture)
            # Its own settings, unless others are named: a capture replays anywhere.
            settings = captured.settings() if config is None else load(config)
            captured.check(settings.labels)
            yield captured, settings, captured.selection()
            return
        settings = load(config)
        with BrokerLog(settings.kafka, Frame.load(settings.artefacts)) as log:
            yield log, settings, None


@contextlib.contextmanager
def clear_errors() -> Iterator[None]:
    """What a user can put right is one message and exit code 1; anything else keeps its traceback."""
    from kafka.errors import KafkaError

    from gpl.artefacts import ArtefactsError
    from streams.log_view import TopicMissingError
    from streams.replay.log import LogError
    from streams.replay.whatif import WhatIfError

    try:
        yield
    except (LogError, WhatIfError, TopicMissingError, ArtefactsError, KafkaError, OSError) as error:
        name = "" if str(error) else f"{type(error).__name__} "
        typer.echo(f"error: {name}{error}", err=True)
        raise typer.Exit(1) from None


def explain(
    request_id: Annotated[str, typer.Argument(help="the request")],
    item_id: Annotated[str, typer.Argument(help="the item")],
    user: Annotated[
        str | None, typer.Option("--user", help="a hint: whose request it is; its partition is read first")
    ] = None,
    from_: Annotated[
        str | None, typer.Option("--from", help="a hint: the recall is not older than this event time")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print the story as JSON")] = False,
    html: Annotated[Path | None, typer.Option("--html", help="write the story as one HTML file")] = None,
    capture: CaptureOption = None,
    config: ConfigOption = None,
) -> None:
    """Tell one label's story: what was recalled and shown, the anchors, each factor, recorded and recomputed."""
    from streams.replay import tell
    from streams.replay.explain import explain as story_of
    from streams.replay.find import Hints, find
    from streams.replay.log import LogError
    from streams.replay.select import moment_ms

    with clear_errors(), open_log(config, capture) as (log, settings, _):
        since = _read("--from", from_, moment_ms)
        _make_room(html)
        found = find(log, request_id, Hints(user, since, int(settings.labels.max_ahead_seconds * 1000)))
        if found is None:
            raise LogError(f"request {request_id!r}: neither its recall nor a label of it is on the log")
        story = story_of(log, settings, found, item_id)
        if as_json:
            typer.echo(json.dumps(story, indent=2))
        else:
            _out.print(tell.table(story))
        if html is not None:
            html.write_text(tell.html(story), encoding="utf-8")
