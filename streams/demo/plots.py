"""The plots of a report, as PNG data URIs."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from streams.contracts import Calibration
from streams.demo.figures import Curves
from streams.demo.follow import SCORE_EDGES, Scores
from streams.demo.summary import Series
from streams.views import calibration_of

_INK, _GREY, _LINE = "#1c2733", "#66727f", "#d8dee4"
_GPL, _EXPOSED = "#0b6e99", "#c2703d"
_COLOURS = {"gpl": _GPL, "exposed_only": _EXPOSED}
_NAMES = {"gpl": "GPL", "exposed_only": "exposed only"}


def flow(series: Series) -> str:
    """Events sent, requests closed and unexposed items labelled over the run."""

    def draw(axes: Axes) -> None:
        axes.plot(series.at, series.events, color=_GREY, label="events sent")
        axes.plot(series.at, series.requests, color=_EXPOSED, label="requests closed")
        axes.plot(series.at, series.unexposed, color=_GPL, label="unexposed items labelled")
        axes.set_yscale("symlog", linthresh=100)
        axes.set_xlabel("seconds since the first event")
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False, loc="lower right")

    return _image(draw)


def lag(series: Series) -> str:
    """How far the worker roles were behind over the run."""

    def draw(axes: Axes) -> None:
        axes.fill_between(series.at, series.lag, color=_GPL, alpha=0.25, linewidth=0)
        axes.plot(series.at, series.lag, color=_GPL, linewidth=1.2)
        axes.set_xlabel("seconds since the first event")
        axes.set_ylabel("records")
        axes.set_ylim(bottom=0)

    return _image(draw)


def delays(values: list[float]) -> str:
    """How long after its request had closed a label was on the log."""

    def draw(axes: Axes) -> None:
        if values:
            floor = 1e-3
            top = max(max(values), 2 * floor)
            edges = np.logspace(math.log10(floor), math.log10(top), 40)
            axes.hist(np.clip(values, floor, None), bins=edges.tolist(), color=_GPL)
            axes.set_xscale("log")
        axes.set_xlabel("seconds from closing to label")
        axes.set_ylabel("requests")

    return _image(draw)


def progress(curves: Curves, metric: str) -> str:
    """AUC ("auc") or HR@10 ("hr10") over the stream, both models."""
    lines = curves.auc if metric == "auc" else curves.hr10

    def draw(axes: Axes) -> None:
        for name, values in lines.items():
            axes.plot([100 * x for x in curves.at], values, color=_COLOURS[name], label=_NAMES[name])
        axes.set_xlabel("% of the stream evaluated")
        _legend(axes)

    return _image(draw)


def reasons(counts: dict[str, int]) -> str:
    """Anchor refreshes by reason."""

    def draw(axes: Axes) -> None:
        names = list(counts) or ["none"]
        bars = axes.barh(names, list(counts.values()) or [0], color=_GPL, height=0.55)
        axes.bar_label(bars, fmt="{:,.0f}", padding=4, color=_INK)
        axes.set_xlabel("anchor refreshes")
        axes.margins(x=0.15)
        axes.invert_yaxis()
        axes.grid(False, axis="y")

    return _image(draw)


def scores(counts: Scores) -> str:
    """Densities of the raw anchor score: clicked, shown and not clicked, unexposed."""

    def draw(axes: Axes) -> None:
        for values, name, colour in (
            (counts.unexposed, "unexposed", _GREY),
            (counts.skipped, "shown, not clicked", _EXPOSED),
            (counts.clicked, "clicked", _GPL),
        ):
            if values.sum():
                axes.stairs(_density(values), SCORE_EDGES, color=colour, label=name, linewidth=1.6)
        axes.set_xlabel("anchor score")
        axes.set_ylabel("density")
        _legend(axes)

    return _image(draw)


def calibration(counts: Scores, in_force: list[Calibration]) -> str:
    """Click rate of exposed items by anchor score, beside the calibrated label."""

    def draw(axes: Axes) -> None:
        shown = counts.clicked + counts.skipped
        enough = shown >= 30
        middle = (SCORE_EDGES[:-1] + SCORE_EDGES[1:]) / 2
        if enough.any():
            rate = counts.clicked[enough] / shown[enough]
            size = 8 + 60 * shown[enough] / shown.max()
            axes.scatter(middle[enough], rate, s=size, color=_EXPOSED, label="click rate of exposed items", zorder=3)
        if in_force:
            label = calibration_of(in_force[-1]).apply(middle.astype(np.float32))
            axes.plot(middle, label, color=_GPL, label="pseudo-label")
        axes.set_xlabel("anchor score")
        axes.set_ylim(0, 1)
        _legend(axes)

    return _image(draw)


def _density(values: NDArray[np.int64]) -> NDArray[np.float64]:
    density: NDArray[np.float64] = values / (values.sum() * np.diff(SCORE_EDGES))
    return density


def _legend(axes: Axes) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False)


def _image(draw: Callable[[Axes], Any]) -> str:
    figure = Figure(figsize=(6.0, 3.1), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_LINE)
    axes.tick_params(colors=_GREY, labelsize=9)
    axes.xaxis.label.set_color(_GREY)
    axes.yaxis.label.set_color(_GREY)
    axes.grid(True, color=_LINE, linewidth=0.6, alpha=0.7)
    axes.set_axisbelow(True)
    draw(axes)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
