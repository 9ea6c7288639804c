"""A run's report: ``report.json``, ``report.html`` (one file, nothing loaded from elsewhere) and a table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from streams.demo import figures, summary
from streams.demo.figures import Evaluation
from streams.demo.follow import Outcome
from streams.demo.summary import Run


def write(directory: Path, run: Run, outcome: Outcome, evaluation: Evaluation) -> dict[str, Any]:
    """Write both files; the document of ``report.json``."""
    document = summary.build(run, outcome, evaluation)
    (directory / "report.json").write_text(json.dumps(document, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    (directory / "report.html").write_text(_html(document, run, outcome, evaluation), encoding="utf-8")
    return document


def _html(document: dict[str, Any], run: Run, outcome: Outcome, evaluation: Evaluation) -> str:
    # Seconds to import, and of use at the end only.
    from jinja2 import Environment, PackageLoader, StrictUndefined

    from streams.demo import plots

    environment = Environment(
        loader=PackageLoader("streams.demo", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters |= {"count": _count, "decimal": _decimal, "seconds": _seconds, "interval": _interval}
    curves = figures.curves(evaluation)
    images = [
        ("Events and labels", plots.flow(run.series), "On a logarithmic scale: a request leaves hundreds of labels."),
        ("Lag", plots.lag(run.series), "Records that all worker roles together were behind the ends of their topics."),
        ("Label delay", plots.delays(outcome.delays), "From the record that closed a request to its label on the log."),
        (
            "AUC over the stream",
            plots.progress(curves, "auc"),
            "On exposed items, scored before they were trained on.",
        ),
        (
            "HR@10 over the stream",
            plots.progress(curves, "hr10"),
            "Clicked items among all candidates of the request.",
        ),
        ("Anchors refreshed", plots.reasons(document["anchors_refreshed"]), "By what asked for the refresh."),
        ("Anchor scores", plots.scores(outcome.scores), "Cosine of an item with the user's nearest anchor."),
        (
            "Calibration",
            plots.calibration(outcome.scores, outcome.calibrations),
            "A pseudo-label should be the click rate at its score. Larger points: more items.",
        ),
    ]
    return environment.get_template("report.html.j2").render(report=document, images=images)


def table(document: dict[str, Any]) -> RenderableType:
    """The report's main figures for the terminal."""
    facts = Table(box=None, show_header=False, pad_edge=False)
    facts.add_column(style="dim")
    facts.add_column()
    delay, age = document["label_delay_seconds"], document["model_age_seconds"]
    anchors = ", ".join(f"{_count(n)} {reason}" for reason, n in document["anchors_refreshed"].items())
    outcomes = ", ".join(f"{_count(n)} {name}" for name, n in document["requests_by_outcome"].items())
    corrections = ", ".join(f"{_count(n)} {cause}" for cause, n in document["corrections"].items())
    dead = ", ".join(f"{_count(n)} {reason}" for reason, n in document["dead_letters_by_reason"].items())
    for name, value in (
        ("events in", f"{_count(document['events'])} on {document['broker']}"),
        ("requests closed", f"{_count(document['requests_closed'])} of {_count(document['requests'])} ({outcomes})"),
        ("unexposed items labelled", _count(document["unexposed_labelled"])),
        ("corrections", corrections or "0"),
        ("anchors refreshed", anchors or "0"),
        ("dead letters", f"{_count(document['dead_letters'])}" + (f" ({dead})" if dead else "")),
        ("label delay p50 / p95 / p99", " / ".join(_seconds(delay[name]) for name in ("p50", "p95", "p99"))),
        ("models published", f"{document['models_published']}, newest event to model {_seconds(age['p50'])} (p50)"),
        ("memory at most, all processes", _megabytes(document["peak_memory_mib"])),
        ("whole run", _seconds(document["seconds"]["total"])),
    ):
        facts.add_row(name, Text(value))
    return Group(facts, Text(), _models(document))


def _models(document: dict[str, Any]) -> Table:
    models = Table(box=None, pad_edge=False)
    models.add_column("progressive", style="dim")
    for name in ("GPL", "exposed only", "difference (95%)"):
        models.add_column(name, justify="right")
    for metric in ("auc", "gauc"):
        pair = [document["progressive"].get(name, {}).get(metric) for name in ("gpl", "exposed_only")]
        models.add_row(metric.upper(), *(_decimal(value) for value in pair), "")
    for part, name in (("all", "HR@10"), ("tail", "HR@10, tail")):
        values = document["hr10"][part]
        row = [_decimal(values[model] and values[model][0]) for model in ("gpl", "exposed_only")]
        models.add_row(name, *row, _interval(values["difference"], signed=True))
    return models


def _count(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"


def _decimal(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _megabytes(value: float | None) -> str:
    return "not known here" if value is None else f"{value:,.0f} MiB"


def _seconds(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value * 1000:.0f} ms" if value < 1 else f"{value:.1f} s"


def _interval(value: list[float | None] | None, signed: bool = False) -> str:
    """ "0.123 (0.101 to 0.145)"; the ends are left out where they could not be computed."""
    if value is None or value[0] is None:
        return "-"
    form = "+.3f" if signed else ".3f"
    estimate, low, high = value
    ends = f" ({low:{form}} to {high:{form}})" if low is not None and high is not None else ""
    return f"{estimate:{form}}{ends}"
