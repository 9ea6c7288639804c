"""Tables of what other settings would have done to training and to refreshes."""

from __future__ import annotations

from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

METRICS = {
    "hr10": "HR@10",
    "hr10_tail": "HR@10, tail",
    "auc": "AUC",
    "gauc": "GAUC",
    "log_loss": "log loss",
    "evidence": "evidence at the end",
}


def training_table(said: dict[str, Any]) -> RenderableType:
    """Progressive figures under the settings in force and those asked for."""
    table = Table(box=None, pad_edge=False)
    for name in ("trained", "in force", "asked", "difference (95%)"):
        table.add_column(name, justify="left" if name == "trained" else "right", header_style="dim")
    for metric, name in METRICS.items():
        table.add_row(
            name,
            *(_decimal(said[side][metric]) for side in ("in_force", "asked")),
            interval_text(said["difference"].get(metric)),
        )
    counts = f"{said['records']:,} label records, {said['steps']:,} steps, {said['clicks']:,} ranked clicks"
    note = f"{counts}; from the same start, each request is scored before it is trained on"
    return Group(table, Text(note, style="dim"))


def refreshes_table(said: dict[str, Any]) -> RenderableType:
    """Refreshes by reason, on the log and under both settings."""
    table = Table(box=None, pad_edge=False)
    for name in ("refreshes", "on the log", "in force", "asked"):
        table.add_column(name, justify="left" if name == "refreshes" else "right", header_style="dim")
    sides = ("recorded", "in_force", "asked")
    for reason in sorted({reason for side in sides for reason in said[side]}):
        table.add_row(Text(reason), *(f"{said[side].get(reason, 0):,}" for side in sides))
    table.add_row("all", *(f"{sum(said[side].values()):,}" for side in sides))
    lines = [
        f"{said['more']:,} more and {said['fewer']:,} fewer, of {said['users_changed']:,} users; "
        f"{said['estimated']:,} of those asked for have no answer in the log",
        f"under the settings in force the fold asks for {said['reproduced']:,} of the {said['recorded_total']:,} "
        "refreshes on the log",
        *said["notes"],
    ]
    return Group(table, *(Text(line, style="dim") for line in lines))


def _decimal(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def interval_text(value: list[float | None] | None) -> str:
    """ "+0.0012 (-0.0003 to +0.0027)"."""
    if value is None or value[0] is None:
        return ""
    estimate, low, high = value
    ends = "" if low is None or high is None else f" ({low:+.4f} to {high:+.4f})"
    return f"{estimate:+.4f}{ends}"
