"""A replay and its comparison for people and for programs: terminal tables, JSON, one self-contained HTML file."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.console import Group as Lines
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from streams.replay.answers import METRICS, interval_text, refreshes_table, training_table
from streams.replay.compare import Comparison, Ranked, Sided
from streams.replay.page import page
from streams.replay.preview import Preview
from streams.replay.select import Selection, time_text
from streams.replay.values import Value

if TYPE_CHECKING:
    from streams.replay.execute import Run

MEANINGS = {
    "feedback": "Impressions or clicks that joined the request differ: late ones, or ones the log no longer has.",
    "anchors": "Other anchors of the user are in force as of the request: late ones, or a refresh made anew.",
    "catalogue": "Item vectors changed, came or went since the label was made.",
    "calibration": "Another calibration is in force as of the request, or the same one says something else.",
    "configuration": "The settings that labels depend on are others.",
    "code version": "The source that labels is another, and every other input is the same.",
    "numerics": "The same inputs rounded otherwise: another machine or numeric library; at most 2.5e-6.",
    "unexplained": "Every input that provenance names is the same, and the label is not. Please report it.",
}
"""What each cause means, in a sentence."""


def selection_document(selection: Selection) -> dict[str, Any]:
    """The selection, JSON-ready."""
    return {
        "from_ms": selection.from_ms,
        "to_ms": selection.to_ms,
        "from": time_text(selection.from_ms),
        "to": time_text(selection.to_ms),
        "user": selection.user,
        "recall_offsets": _ranges(selection.recalls),
        "feedback_offsets": _ranges(selection.feedback),
    }


def _ranges(ranges: Any) -> dict[str, list[list[int]]] | None:
    return None if ranges is None else {str(p): [list(pair) for pair in some] for p, some in ranges.items()}


def comparison_document(found: Comparison) -> dict[str, Any]:
    """Everything that a comparison found, JSON-ready; ``docs/replay.md`` documents the keys."""
    return {
        "requests": found.requests,
        "identical": found.identical,
        "changed": found.changed,
        "reproduced": found.reproduced,
        "item_labels": found.item_labels,
        "item_labels_changed": found.moved,
        "recorded_labels_read": found.recorded_read,
        "recorded_labels_unreadable": found.recorded_unreadable,
        "causes": [
            {
                "cause": cause,
                "meaning": MEANINGS[cause],
                "requests": group.requests,
                "item_labels": group.labels,
                "mean_move": round(group.mean, 6),
                "largest_move": round(group.largest, 6),
                "kinds": dict(group.kinds.most_common()),
                "details": [{"detail": text, "requests": n} for text, n in group.details.most_common(20)],
                "biggest": [_ranked(ranked) for ranked in group.biggest()],
            }
            for cause, group in found.by_size()
        ],
        "only_recorded": _sided(found.only_recorded),
        "only_replayed": _sided(found.only_replayed),
        "not_replayable": _sided(found.not_replayable),
    }


def _ranked(ranked: Ranked) -> dict[str, Any]:
    move = ranked.move
    return {
        "request_id": ranked.request_id,
        "item_id": move.item,
        "user_id": ranked.user_id,
        "ts": ranked.ts,
        "kind": move.kind,
        "move": round(move.size, 6),
        "recorded": None if move.recorded is None else move.recorded._asdict(),
        "replayed": None if move.replayed is None else move.replayed._asdict(),
        "detail": ranked.detail,
    }


def _sided(sided: Sided) -> dict[str, Any]:
    listed = [{"request_id": r.request_id, "user_id": r.user_id, "ts": r.ts, "why": r.why} for r in sided.listed]
    return {"requests": sum(sided.reasons.values()), "reasons": dict(sided.reasons.most_common()), "listed": listed}


def value_text(value: Value | dict[str, Any] | None) -> str:
    """ "0.412 (score 0.310, confidence 0.052)"."""
    if value is None:
        return "-"
    said = value._asdict() if isinstance(value, Value) else value
    score = "no score" if said["score"] is None else f"score {said['score']:.3f}"
    if said["exposed"]:
        return f"{'clicked' if said['label'] else 'shown, not clicked'} ({score})"
    return f"{said['label']:.4f} ({score}, confidence {said['confidence']:.4f})"


def selection_text(selection: Selection) -> str:
    """The selection in words."""
    parts = [f"recalls from {time_text(selection.from_ms)} to {time_text(selection.to_ms)}"]
    if selection.user is not None:
        parts.append(f"of user {selection.user}")
    for name, ranges in (("recall", selection.recalls), ("feedback", selection.feedback)):
        if ranges is not None:
            count = sum(last - first + 1 for some in ranges.values() for first, last in some)
            parts.append(f"chosen by {count:,} {name} offsets")
    return ", ".join(parts)


def preview_document(preview: Preview, selection: Selection) -> dict[str, Any]:
    """The preview, JSON-ready."""
    return {
        "selection": selection_document(selection),
        "read": [{**asdict(part), "records": part.records} for part in preview.parts],
        "records": sum(part.records for part in preview.parts),
        "bytes": sum(part.bytes for part in preview.parts),
        "estimated_seconds": round(preview.seconds, 3),
        "candidates_per_recall": round(preview.candidates, 1),
    }


def run_table(run: Run, top: int) -> RenderableType:
    """A run for the terminal."""
    said = run.document
    lines = Table(box=None, show_header=False, pad_edge=False)
    requests, rate = said["requests"], said["rate"]
    lines.add_row("replayed", ", ".join(f"{n:,} {name.replace('_', ' ')}" for name, n in requests.items()))
    lines.add_row("item labels", ", ".join(f"{n:,} {name}" for name, n in said["item_labels"].items()))
    lines.add_row("written to", Text(", ".join(said["written_to"]) or "nowhere"))
    lines.add_row(
        "speed",
        f"{rate['events']:,} events in {duration_text(rate['seconds'])}: {rate['events_per_second']:,.0f} events/s, "
        f"{rate['requests_per_second']:,.0f} requests/s, {rate['times_real_time']:,.0f} times real time",
    )
    for warning in said["warnings"]:
        lines.add_row("note", Text(warning))
    parts: list[RenderableType] = [lines]
    if said["training"] is not None:
        parts += [Text(), training_table(said["training"])]
    if said["refreshes"] is not None:
        parts += [Text(), refreshes_table(said["refreshes"])]
    if run.comparison is not None:
        parts += [Text(), comparison_table(run.comparison, top)]
    return Lines(*parts)


def preview_table(preview: Preview) -> RenderableType:
    """What would be read."""
    table = Table(box=None, pad_edge=False)
    for name in ("topic", "partition", "offsets", "records", "size", "event time"):
        table.add_column(name, justify="left" if name in ("topic", "event time") else "right", header_style="dim")
    for part in preview.parts:
        span = "" if part.event_ms is None else f"{time_text(part.event_ms[0])} to {time_text(part.event_ms[1])}"
        offsets = f"{part.first:,}-{part.end - 1:,}" if part.records else "none"
        table.add_row(part.topic, str(part.partition), offsets, f"{part.records:,}", size_text(part.bytes), span)
    records, size = sum(p.records for p in preview.parts), sum(p.bytes for p in preview.parts)
    note = (
        f"at most {records:,} records, about {size_text(size)}, about {duration_text(preview.seconds)} on this machine"
    )
    return Lines(table, Text(), Text(note))


def size_text(size: float) -> str:
    """ "12.3 MiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            return f"{size:,.0f} {unit}" if unit == "B" else f"{size:,.1f} {unit}"
        size /= 1024
    raise AssertionError


def duration_text(seconds: float) -> str:
    """ "3.2 s", "4 min 10 s", "2 h 5 min"."""
    if seconds < 90:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def comparison_table(found: Comparison, top: int) -> RenderableType:
    """The comparison for the terminal: counts, causes, the biggest moves of each."""
    parts: list[RenderableType] = [_counts(found)]
    if found.groups:
        parts += [Text(), _causes(found)]
    for cause, group in found.by_size():
        moves = Table(box=None, pad_edge=False, title=f"biggest moves: {cause}", title_justify="left")
        for name in ("move", "request", "item", "recorded", "replayed"):
            moves.add_column(name, justify="right" if name == "move" else "left", header_style="dim", overflow="fold")
        for ranked in group.biggest()[:top]:
            move = ranked.move
            moves.add_row(
                f"{move.size:.4f}",
                Text(ranked.request_id),
                Text(move.item),
                value_text(move.recorded),
                value_text(move.replayed),
            )
        parts += [Text(), moves]
    for name, sided in (
        ("recorded, not replayed", found.only_recorded),
        ("replayed, not recorded", found.only_replayed),
        ("not replayable", found.not_replayable),
    ):
        if sided.listed:
            parts += [Text(), _one_sided(name, sided, top)]
    return Lines(*parts)


def _counts(found: Comparison) -> RenderableType:
    lines = Table(box=None, show_header=False, pad_edge=False)
    share = f" ({found.identical / found.requests:.2%})" if found.requests else ""
    lines.add_row("identical", f"{found.identical:,} of {found.requests:,} requests{share}")
    changed = f"{found.changed:,} requests, {found.moved:,} of {found.item_labels:,} item labels"
    if found.changed:
        changed += f"; put back, the recorded inputs gave {found.reproduced:,} of them again"
    lines.add_row("changed", changed)
    for name, sided in (
        ("recorded only", found.only_recorded),
        ("replayed only", found.only_replayed),
        ("not replayable", found.not_replayable),
    ):
        if sided.reasons:
            lines.add_row(name, f"{sum(sided.reasons.values()):,} requests")
    return lines


def _causes(found: Comparison) -> RenderableType:
    table = Table(box=None, pad_edge=False)
    for name in ("cause", "requests", "item labels", "mean move", "largest", "how it differs"):
        table.add_column(
            name,
            justify="left" if name in ("cause", "how it differs") else "right",
            header_style="dim",
            overflow="fold",
        )
    for cause, group in found.by_size():
        detail, requests = group.details.most_common(1)[0]
        more = "" if len(group.details) == 1 else f" ({requests} requests; {len(group.details) - 1} others)"
        table.add_row(
            cause,
            f"{group.requests:,}",
            f"{group.labels:,}",
            f"{group.mean:.4f}",
            f"{group.largest:.4f}",
            Text(detail + more),
        )
    return table


def _one_sided(name: str, sided: Sided, top: int) -> RenderableType:
    table = Table(box=None, pad_edge=False, title=name, title_justify="left")
    for column in ("request", "user", "why"):
        table.add_column(column, header_style="dim", overflow="fold")
    for request in sided.listed[:top]:
        table.add_row(Text(request.request_id), Text(request.user_id), Text(request.why))
    left = sum(sided.reasons.values()) - min(top, len(sided.listed))
    if left:
        table.add_row(f"and {left:,} more", "", "")
    return table


def html(document: dict[str, Any]) -> str:
    """A run as one HTML page that loads nothing."""
    return page("replay.html.j2", run=document, metrics=METRICS, interval=interval_text)
