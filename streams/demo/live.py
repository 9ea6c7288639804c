"""The live view: a table that stays in place on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from streams.contracts import Label

_PLAIN_EVERY = 5.0


@dataclass(frozen=True)
class Progress:
    """A moment of the run. ``figures``: model -> metric -> value, over the trainer's sliding window."""

    events: int
    events_total: int
    event_ts: int
    requests_closed: int
    requests: int
    unexposed: int
    lag: float | None
    anchors: dict[str, int]
    dead_letters: int
    model: str | None
    figures: dict[str, dict[str, float]] = field(default_factory=dict)


class LiveView:
    """Shows progress; ``say`` prints a line that stays. Use as a context manager."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = Live(console=console, auto_refresh=False, transient=True) if console.is_terminal else None
        self._started = time.monotonic()
        self._printed = -_PLAIN_EVERY

    def say(self, text: str) -> None:
        """Print a line; text from data is never read as markup."""
        self._console.print(Text(f"{time.monotonic() - self._started:6.1f} s  {text}"))

    def update(self, progress: Progress) -> None:
        """Show where the run is."""
        if self._live is not None:
            self._live.update(_table(progress), refresh=True)
        elif (now := time.monotonic()) - self._printed >= _PLAIN_EVERY:
            self._printed = now
            self.say(_line(progress))

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._live is not None:
            self._live.stop()


def _rows(progress: Progress) -> list[tuple[str, str]]:
    day = datetime.fromtimestamp(progress.event_ts / 1000, UTC).strftime("%Y-%m-%d %H:%M") if progress.event_ts else "-"
    anchors = ", ".join(f"{count:,} {reason}" for reason, count in progress.anchors.items()) or "0"
    rows = [
        ("event time", day),
        ("events", f"{progress.events:,} of {progress.events_total:,}"),
        ("requests closed", f"{progress.requests_closed:,} of {progress.requests:,}"),
        ("unexposed labelled", f"{progress.unexposed:,}"),
        ("lag", "-" if progress.lag is None else f"{progress.lag:,.0f}"),
        ("anchors", anchors),
        ("dead letters", f"{progress.dead_letters:,}"),
        ("model", progress.model or "none yet"),
    ]
    for metric, name in (("hr10", "HR@10"), ("auc", "AUC")):
        values = [
            f"{model.replace('exposed', 'exposed only')} {figures[metric]:.3f}"
            for model, figures in progress.figures.items()
            if metric in figures
        ]
        if values:
            rows.append((name, ", ".join(values)))
    return rows


def _table(progress: Progress) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="dim")
    table.add_column()
    for name, value in _rows(progress):
        table.add_row(name, Text(value))
    return table


def _line(progress: Progress) -> str:
    return "; ".join(f"{name} {value}" for name, value in _rows(progress))


def readable(label: Label, texts: dict[str, str]) -> str:
    """One label as a person reads it: what was shown, and the unexposed items with the highest and lowest label."""

    def title(item: str) -> str:
        text = texts.get(item, item)
        return text if len(text) <= 44 else text[:43] + "…"

    lines = [f"request {label.request_id} of user {label.user_id}"]
    for item, clicked in list(zip(label.exposed.item, label.exposed.clicked, strict=True))[:4]:
        lines.append(f"  {'clicked' if clicked else 'shown':>10}  {title(item)}")
    unexposed = label.unexposed
    order = sorted(range(len(unexposed.item)), key=lambda i: -unexposed.label[i])
    for i in [*order[:3], *order[3:][-2:]]:
        lines.append(
            f"  {unexposed.label[i]:>10.2f}  {title(unexposed.item[i])} "
            f"(never shown; score {unexposed.score[i]:.2f}, confidence {unexposed.confidence[i]:.2f})"
        )
    return "\n".join(lines)
