"""An explanation in the terminal, and as one HTML page."""

from __future__ import annotations

from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from streams.replay.page import page
from streams.replay.report import duration_text, value_text


def html(story: dict[str, Any]) -> str:
    """The explanation as a page that loads nothing."""
    return page("explain.html.j2", story=story, age=duration_text, value=value_text)


def table(story: dict[str, Any]) -> RenderableType:
    """The explanation for the terminal."""
    parts: list[RenderableType] = [_head(story), _facts(story)]
    for title, body in (
        ("shown", _exposures(story)),
        ("anchors as of the request", _anchors(story)),
        ("how the label comes about", _calculation(story)),
        ("recorded and recomputed", _sides(story)),
    ):
        if body is not None:
            parts += [Text(), Text(title, style="bold"), body]
    return Group(*parts)


def _head(story: dict[str, Any]) -> RenderableType:
    title = Text.assemble((f"item {story['item_id']}", "bold"), f" in request {story['request_id']}")
    if story["text"]:
        title.append(f"\n{story['text']}", "dim")
    title.append(f"\n{story['state']['name']}: ", "bold cyan")
    title.append(story["state"]["text"])
    equal = story["verdict"]["equal"]
    style = {True: "green", False: "yellow", None: "dim"}[equal]
    title.append(f"\n{ {True: 'equal', False: 'not equal', None: 'not compared'}[equal] }: ", f"bold {style}")
    title.append(story["verdict"]["why"])
    return Group(title, Text())


def _grid(*columns: str, header: bool = True) -> Table:
    grid = Table(box=None, pad_edge=False, show_header=header, header_style="dim")
    for column in columns:
        grid.add_column(column.strip("#"), justify="right" if column.startswith("#") else "left", overflow="fold")
    return grid


def _facts(story: dict[str, Any]) -> RenderableType:
    facts = _grid("", "", header=False)
    facts.columns[0].style = "dim"
    recall = story["recall"]
    if recall is None:
        facts.add_row("recall", "expired from the log")
    else:
        about = f"{recall['time']}, user {recall['user_id']}, {recall['candidates']:,} candidates"
        facts.add_row("recall", Text(about))
        place = "not among them" if recall["place"] is None else f"candidate {recall['place']:,}"
        facts.add_row("place", Text(place + (f", from {recall['source']}" if recall["source"] else "")))
        facts.add_row("window", f"{duration_text(recall['window_seconds'])}, until {recall['window_ends']}")
        facts.add_row("recall's origin", f"partition {recall['partition']}, offset {recall['offset']:,}")
    if story["label_record"] is not None:
        at = story["label_record"]
        facts.add_row("label's origin", f"partition {at['partition']}, offset {at['offset']:,}, logged {at['logged']}")
    if story["provenance"] is not None:
        said = story["provenance"]
        names = ("encoder", "quantiser", "generator", "calibration", "config", "code")
        facts.add_row("made with", Text(", ".join(f"{name} {said[name]}" for name in names if said[name])))
        offsets = ", ".join(str(offset) for offset in said["feedback"][:12]) or "none"
        facts.add_row("feedback offsets", offsets + (", ..." if len(said["feedback"]) > 12 else ""))
    return facts


def _exposures(story: dict[str, Any]) -> RenderableType | None:
    if not story["exposures"]:
        return Text("nothing", style="dim")
    shown = _grid("item", "text", "", "events")
    for one in story["exposures"]:
        events = ", ".join(f"{event['kind']} {event['time'][11:]}" for event in one["events"])
        mark = "bold" if one["item_id"] == story["item_id"] else ""
        shown.add_row(Text(one["item_id"]), Text(one["text"]), "clicked" if one["clicked"] else "", events, style=mark)
    return shown


def _anchors(story: dict[str, Any]) -> RenderableType | None:
    anchors = story["anchors"]
    if anchors is None:
        return None
    if anchors["lost"]:
        return Text(anchors["lost"], style="yellow")
    refresh = anchors["in_force"]
    if refresh is None:
        return Text("none", style="dim")
    about = f"version {refresh['version']} of {refresh['time']}, {duration_text(refresh['age_seconds'])} old"
    about += f", from {refresh['history']} positives, generator {refresh['generator']}"
    if not anchors["anchors"]:
        return Text(f"{about}: it holds none, for no positive was known", style="dim")
    listed = _grid("##", "#cosine", "#p", "#history", "#generation", "sid", "stands for")
    best = (story["calculation"] or {}).get("best_anchor")
    for k, anchor in enumerate(anchors["anchors"], start=1):
        near = "; ".join(f"{one['text'] or one['item_id']} ({one['cosine']:.2f})" for one in anchor["nearest"])
        listed.add_row(
            f"{k}",
            "-" if anchor["cosine"] is None else f"{anchor['cosine']:.3f}",
            f"{anchor['probability']:.3f}",
            f"{anchor['history_factor']:.3f}",
            f"{anchor['generation_factor']:.3f}",
            "-".join(map(str, anchor["sid"])),
            Text(near),
            style="bold" if k == best else "",
        )
    return Group(Text(about), listed)


def _calculation(story: dict[str, Any]) -> RenderableType | None:
    steps = story["calculation"]
    if steps is None:
        return None
    lines = _grid("", "#", "", header=False)
    lines.columns[0].style = "dim"
    how = "probability-weighted kernel over all anchors" if steps["matching"] == "kernel" else "largest cosine"
    lines.add_row("best cosine", f"{steps['best_cosine']:.6f}", f"with anchor {steps['best_anchor']}")
    lines.add_row("score", f"{steps['score']:.6f}", how)
    if steps["exposed"]:
        lines.add_row("label", f"{steps['label']:.0f}", "the click; the score is carried for calibration")
        return lines
    said = steps["calibration"]
    lines.add_row("label", f"{steps['label']:.6f}", Text(f"{said['formula']}, calibration {said['version']}"))
    for name, factor in steps["factors"].items():
        lines.add_row(name, f"{factor['value']:.6f}", "" if factor["used"] else "off: left out")
    lines.add_row("confidence", f"{steps['confidence']:.6f}", "the geometric mean of those in force")
    return lines


def _sides(story: dict[str, Any]) -> RenderableType:
    sides = _grid("", "revision", "outcome", "item", header=False)
    sides.columns[0].style = "dim"
    for name in ("recorded", "recomputed"):
        side = story[name]
        if side is None:
            sides.add_row(name, "-", "", "")
            continue
        revision = f"revision {side['revision']}" if name == "recorded" else ""
        if side["correction"]:
            revision += f" (corrected: {side['correction']})"
        sides.add_row(
            name, Text(revision), Text(side["outcome"]), value_text(side["item"]) if side["item"] else "no label"
        )
    lines: list[RenderableType] = [sides]
    for cause, text in story["verdict"]["causes"].items():
        lines.append(Text(f"{cause}: {text}", style="yellow"))
    return Group(*lines)
