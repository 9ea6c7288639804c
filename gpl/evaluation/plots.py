"""Plots of a study's summary, as PNG. Needs matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gpl.evaluation.summary import SUBJECT

_CURVES = ("popularity", "exposed-score", "negatives-score", "mean-labels", SUBJECT)
_COLOURS = {
    "untrained": "#9aa5b1",
    "no pseudo-labels": "#4c78a8",
    "pseudo-labels": "#72b7b2",
    "gpl": "#e45756",
    "ablation": "#f2a29b",
    "control": "#d0d0d0",
}


def draw(summary: dict[str, Any], directory: Path) -> list[Path]:
    """``bars.png``, ``popularity.png`` and ``reliability.png``; what there is nothing to draw of is left out, and
    removed where an earlier summary had it."""
    import matplotlib

    matplotlib.use("Agg")
    directory.mkdir(parents=True, exist_ok=True)
    drawn = [_bars(summary["sets"], directory)]
    having = [one for one in summary["sets"] if one["methods"].keys() & set(_CURVES)]
    drawn += [_popularity(having, directory)] if having else []
    having = [one for one in summary["sets"] if one["methods"].get(SUBJECT, {}).get("reliability")]
    drawn += [_reliability(having, directory)] if having else []
    for stale in {directory / "popularity.png", directory / "reliability.png"} - set(drawn):
        stale.unlink(missing_ok=True)
    return drawn


def _bars(sets: list[dict[str, Any]], directory: Path) -> Path:
    """HR@10 and tail HR@10 of every method, with intervals."""
    import matplotlib.pyplot as plt

    rows = max(len(one["methods"]) for one in sets)
    figure, axes = plt.subplots(
        len(sets), 2, figsize=(12, (0.24 * rows + 0.9) * len(sets)), squeeze=False, sharey="row"
    )
    for line, one in zip(axes, sets, strict=True):
        methods = list(one["methods"].values())
        for axis, metric, title in zip(line, ("hr@10", "tail_hr@10"), ("HR@10", "tail HR@10"), strict=True):
            for at, method in enumerate(methods):
                estimate, low, high = (x if x is not None else 0.0 for x in method["metrics"][metric])
                axis.barh(at, estimate, color=_COLOURS[method["group"]], height=0.75)
                axis.plot([low, high], [at, at], color="black", linewidth=1)
            axis.set_yticks(range(len(methods)), [method["title"] for method in methods], fontsize=7)
            axis.set_title(f"{one['name']}: {title}", fontsize=9)
            axis.invert_yaxis() if axis is line[0] else None
            axis.spines[["top", "right"]].set_visible(False)
    return _saved(figure, directory / "bars.png")


def _popularity(sets: list[dict[str, Any]], directory: Path) -> Path:
    """HR@10 of relevant items by how often they were exposed."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(sets), figsize=(4.2 * len(sets), 3.4), squeeze=False)
    for axis, one in zip(axes[0], sets, strict=True):
        for name in _CURVES:
            if name in one["methods"]:
                method = one["methods"][name]
                values = [float("nan") if v is None else v for v in method["hr@10_by_popularity"]]
                width = 2.2 if name == SUBJECT else 1.2
                axis.plot(range(1, 11), values, marker=".", linewidth=width, label=method["title"])
        axis.set_title(one["name"], fontsize=9)
        axis.set_xlabel("tenth of the items, most exposed first", fontsize=8)
        axis.set_ylabel("HR@10", fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].legend(fontsize=6, frameon=False)
    return _saved(figure, directory / "popularity.png")


def _reliability(sets: list[dict[str, Any]], directory: Path) -> Path:
    """Share of pseudo-positives that are relevant, and their labels, by confidence."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(sets), figsize=(4.2 * len(sets), 3.4), squeeze=False)
    for axis, one in zip(axes[0], sets, strict=True):
        bins = one["methods"][SUBJECT]["reliability"]
        x = [b["confidence"] for b in bins]
        axis.plot(x, [b["relevant"] for b in bins], marker="o", label="truly relevant")
        axis.plot(x, [b["label"] for b in bins], marker=".", linestyle="--", label="pseudo-label")
        axis.set_title(one["name"], fontsize=9)
        axis.set_xlabel("confidence", fontsize=8)
        axis.set_ylim(bottom=0)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].legend(fontsize=7, frameon=False)
    return _saved(figure, directory / "reliability.png")


def _saved(figure: Any, path: Path) -> Path:
    import matplotlib.pyplot as plt

    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path
