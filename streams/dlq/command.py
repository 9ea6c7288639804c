"""``gpl dlq list|show|redrive``."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Annotated

import typer
from kafka.errors import KafkaError
from rich.console import Console
from rich.table import Table

from streams import dead_letters, settings
from streams.cli_options import ConfigOption
from streams.dlq.letters import Filter, Letter, index, whole
from streams.dlq.redrive import NowhereError, Plan, execute, plan
from streams.dlq.render import body, count_table, counts, row, text, time
from streams.log_view import TopicMissingError
from streams.settings import KafkaSettings
from streams.topics import TOPICS, full_name

app = typer.Typer(no_args_is_help=True, help="Look at the dead letters, and send them back where they came from.")
# Words of the data are never markup.
_out = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)
_err = Console(stderr=True, highlight=False, soft_wrap=True, markup=False, emoji=False)

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}

Topic = Annotated[str | None, typer.Option(help="Only letters from this topic, with or without the prefix.")]
Reason = Annotated[dead_letters.Reason | None, typer.Option(help="Only letters with this reason.")]
Since = Annotated[str | None, typer.Option(help="Only letters written since: ISO 8601 (UTC), or 30m, 12h, 7d ago.")]
Until = Annotated[str | None, typer.Option(help="Only letters written before; as --since.")]
AsJson = Annotated[bool, typer.Option("--json", help="JSON on standard output.")]


@app.command("list")
def list_letters(
    topic: Topic = None,
    reason: Reason = None,
    since: Since = None,
    until: Until = None,
    limit: Annotated[int, typer.Option(min=0, help="Show the newest so many; 0 shows all.")] = 50,
    as_json: AsJson = False,
    config: ConfigOption = None,
) -> None:
    """How many dead letters there are, by topic and reason, and the newest of them."""
    kafka = settings.load(config).kafka
    with _clear_errors():
        letters = _chosen(kafka, topic, reason, since, until, ())
    shown = letters[-limit:] if limit else letters
    if as_json:
        totals = [
            {"topic": name, "reason": why, "letters": n, "redriven": done}
            for (name, why), (n, done) in counts(letters).items()
        ]
        typer.echo(json.dumps({"counts": totals, "letters": [row(letter) for letter in shown]}, indent=2))
        return
    _out.print(count_table(letters))
    if not shown:
        return
    table = Table("id", "written", "origin", "reason", "redrives", "message")
    for letter in shown:
        origin = letter.original
        state = f"{letter.redrives}" + (", sent back" if letter.redriven else "")
        where = f"{origin.topic}[{origin.partition}]@{origin.offset}"
        table.add_row(letter.id, time(letter.written_ms), where, letter.reason, state, letter.message[:120])
    _out.print(table)
    if len(shown) < len(letters):
        _out.print(f"the newest {len(shown)} of {len(letters)}; --limit 0 shows all")


@app.command()
def show(
    ids: Annotated[list[str], typer.Argument(metavar="ID...", help="Ids as `gpl dlq list` prints them.")],
    hexadecimal: Annotated[bool, typer.Option("--hex", help="The value as a hex dump, also where it is JSON.")] = False,
    raw: Annotated[bool, typer.Option("--raw", help="Only the value's bytes, for a pipe; takes one id.")] = False,
    config: ConfigOption = None,
) -> None:
    """Headers and bytes of dead letters."""
    kafka = settings.load(config).kafka
    if raw and len(ids) != 1:
        raise typer.BadParameter("--raw prints one letter's bytes", param_hint="ID")
    with _clear_errors():
        known = {letter.id: letter for letter in index(kafka)}
        _check_ids(ids, known)
        letters = list(whole(kafka, frozenset(ids)))
    if raw:
        sys.stdout.buffer.write(letters[0].original.value or b"")
        return
    for letter in letters:
        for name, value in row(letter, redriven=known[letter.id].redriven).items():
            _out.print(f"{name:>10}  {value}")
        for name, header in letter.original.headers:
            _out.print(f"{'header':>10}  {name}: {text(header)}")
        _out.print(body(letter.original.value, hexadecimal))


@app.command()
def redrive(
    ids: Annotated[list[str] | None, typer.Argument(metavar="[ID]...", help="Only these letters.")] = None,
    topic: Topic = None,
    reason: Reason = None,
    since: Since = None,
    until: Until = None,
    every: Annotated[bool, typer.Option("--all", help="Without ids or filters: all letters.")] = False,
    max_redrives: Annotated[
        int, typer.Option(min=1, help="Leave out what has come back so many times already: a loop.")
    ] = 3,
    go: Annotated[bool, typer.Option("--execute", help="Send; without it, only tell what would be sent.")] = False,
    config: ConfigOption = None,
) -> None:
    """Send the originals back to their topic, partition and key. A preview without --execute."""
    kafka = settings.load(config).kafka
    if not (ids or topic or reason or since or until or every):
        raise typer.BadParameter("name ids or filters, or --all", param_hint="ID")
    with _clear_errors():
        planned = plan(_chosen(kafka, topic, reason, since, until, ids or ()), max_redrives)
        _tell(planned, max_redrives)
        if not go:
            _out.print(f"a preview: {len(planned.send)} would be sent back; --execute sends them")
            return
        done = sum(1 for _ in execute(kafka, planned.send))
    _out.print(f"{done} sent back")


def _tell(planned: Plan, max_redrives: int) -> None:
    _out.print(count_table(planned.send))
    if planned.already:
        _out.print(f"left out: {len(planned.already)} sent back before")
    if planned.looping:
        named = ", ".join(letter.id for letter in planned.looping[:10])
        _out.print(f"left out: {len(planned.looping)} that came back {max_redrives} times or more ({named})")
    if planned.empty:
        _out.print(f"left out: {len(planned.empty)} with neither key nor value")


def _chosen(
    kafka: KafkaSettings,
    topic: str | None,
    reason: str | None,
    since: str | None,
    until: str | None,
    ids: Iterable[str],
) -> list[Letter]:
    now = datetime.now(UTC)
    wanted = Filter(
        topic=_topic(kafka, topic),
        reason=reason,
        since_ms=_millis("--since", since, now),
        until_ms=_millis("--until", until, now),
        ids=frozenset(ids),
    )
    letters = index(kafka)
    _check_ids(wanted.ids, {letter.id for letter in letters})
    return [letter for letter in letters if wanted.takes(letter)]


def _check_ids(ids: Iterable[str], known: Iterable[str]) -> None:
    if missing := sorted(set(ids) - set(known)):
        raise typer.BadParameter(f"no dead letter has the id {', '.join(missing)}", param_hint="ID")


def _topic(kafka: KafkaSettings, name: str | None) -> str | None:
    """A topic's full name, whether given with its prefix or without."""
    if name is None:
        return None
    full = {spec.name: full_name(kafka, spec.name) for spec in TOPICS}
    if name not in full and name not in full.values():
        raise typer.BadParameter(f"{name!r}: expected {', '.join(full)}", param_hint="--topic")
    return full.get(name, name)


def _millis(option: str, given: str | None, now: datetime) -> int | None:
    if given is None:
        return None
    if ago := re.fullmatch(r"(\d+)([smhd])", given):
        try:
            at = now - timedelta(seconds=int(ago[1]) * _UNITS[ago[2]])
        except (OverflowError, ValueError):  # ValueError: int() of thousands of digits
            raise typer.BadParameter(f"{given[:40]!r} is before the first year", param_hint=option) from None
    else:
        try:
            at = datetime.fromisoformat(given)
        except ValueError:
            raise typer.BadParameter(
                f"{given!r} is neither ISO 8601 nor a duration like 30m, 12h or 7d", param_hint=option
            ) from None
        at = at if at.tzinfo else at.replace(tzinfo=UTC)
    return int(at.timestamp() * 1000)


@contextmanager
def _clear_errors() -> Iterator[None]:
    try:
        yield
    except (TopicMissingError, NowhereError, KafkaError) as error:
        _err.print(f"error: {error or type(error).__name__}", style="red")
        raise typer.Exit(1) from None
