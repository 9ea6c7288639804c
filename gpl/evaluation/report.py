"""A study's summary for people: tables in the terminal, and ``docs/results.md``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from gpl.evaluation.summary import SUBJECT

Summary = dict[str, Any]
COLUMNS = {
    "hr@3": "HR@3",
    "hr@5": "HR@5",
    "hr@10": "HR@10",
    "tail_hr@10": "tail HR@10",
    "ndcg@10": "NDCG@10",
    "auc": "AUC all",
    "exposed_auc": "AUC exp.",
    "exposed_gauc": "GAUC exp.",
    "coverage": "coverage",
    "gini": "Gini",
    "diversity": "diversity",
}
_IN_TERMINAL = ("hr@10", "tail_hr@10", "ndcg@10", "auc", "exposed_auc", "coverage")
"""The rest is in the JSON and on the page."""
_WITH_INTERVAL = ("hr@10", "tail_hr@10")


def show(summary: Summary, console: Console) -> None:
    """One table a data set, and its targets."""
    for one in summary["sets"]:
        console.print(Text(f"\n{one['description']}", style="bold"))
        table = Table(box=None, pad_edge=False)
        table.add_column("method", no_wrap=True)
        for name in _IN_TERMINAL:
            table.add_column(COLUMNS[name], justify="right", no_wrap=True)
        table.add_column("GPL's HR@10 against it", justify="right")
        group = None
        for name, method in one["methods"].items():
            if group is not None and method["group"] != group:
                table.add_section()
            group = method["group"]
            against = one["gpl_against"].get(name)
            relative = _percent(against["hr@10"]["relative"]) if against else ""
            style = "bold" if name == SUBJECT else ""
            table.add_row(Text(method["title"], style=style), *_cells(method, _IN_TERMINAL), relative)
        console.print(table)
        for target in one["targets"]:
            mark = Text("met    ", style="green") if target["met"] else Text("not met", style="red")
            console.print(mark, Text(f" {target['what']} ({target['rival']}): {_percent(target['relative'])}"))


def markdown(summary: Summary, plots: Sequence[str] = ()) -> str:
    """The page of results. ``plots``: paths of images, relative to the page."""
    return "\n".join(_lines(summary, plots)) + "\n"


def _lines(summary: Summary, plots: Sequence[str]) -> Iterator[str]:
    seeds, tuning = summary["settings"]["seeds"], summary["settings"]["tuning"]
    chosen_with = "first seed" if tuning == 1 else f"first {tuning} seeds, by their mean"
    yield "# Results"
    yield ""
    yield (
        "Written by `gpl evaluate --write`, not by hand. How worlds are made, what each method does and how it is "
        "judged: [evaluation.md](evaluation.md). Figures are means over test users and seeds "
        f"({len(seeds)}: {', '.join(map(str, seeds))}); settings were chosen on the validation users of the "
        f"{chosen_with}; the test users were judged once in this form. Brackets are 95% intervals: for HR, NDCG, AUC "
        "over all candidates and diversity from a bootstrap over users and seeds at once, for the other columns "
        "Student's t over seeds; comparisons are paired. Best without pseudo-labels is the best on these test users, "
        "which favours the rival."
    )
    for one in summary["sets"]:
        yield from _set(one)
    for plot in plots:
        yield ""
        yield f"![{plot}]({plot})"
    yield ""
    yield "## Versions and settings"
    yield ""
    yield ", ".join(f"{name} {value}" for name, value in summary["versions"].items()) + "."
    for name in ("train", "upstream"):
        yield ""
        settings = ", ".join(f"`{key}` {value}" for key, value in summary["settings"][name].items())
        yield f"{name}: {settings}."


def _set(one: Summary) -> Iterator[str]:
    facts = one["facts"]
    clicked = "none" if facts["click_rate"] is None else f"{facts['click_rate']:.1%}"
    yield ""
    yield f"## {one['name']}"
    yield ""
    yield (
        f"{one['description']}. World of the first seed: {facts['requests']:,} requests, {facts['impressions']:,} "
        f"impressions ({clicked} clicked), {facts['recalled_unexposed']:,} recalled and not exposed; "
        f"{facts['validation_users']:,} validation and {facts['test_users']:,} test users with "
        f"{facts['relevant_per_user']:.1f} relevant items each, {facts['relevant_in_tail']:.1%} of them in the tail."
    )
    if one["targets"]:
        yield ""
        yield "| Target | Rival | Wanted | GPL relative to it | |"
        yield "| --- | --- | --- | --- | --- |"
        for target in one["targets"]:
            met = "met" if target["met"] else "**not met**"
            rival, relative = target["rival"], _percent(target["relative"])
            yield f"| {target['what']} | `{rival}` | {target['wanted']} | {relative} | {met} |"
    yield ""
    yield "| Method | " + " | ".join(COLUMNS.values()) + " |"
    yield "| --- |" + " --- |" * len(COLUMNS)
    for name, method in one["methods"].items():
        title = f"**{method['title']}**" if name == SUBJECT else method["title"]
        yield f"| {title} | " + " | ".join(_cells(method, COLUMNS)) + " |"
    if one["gpl_against"]:
        yield ""
        yield "GPL relative to each:"
        yield ""
        yield "| Against | HR@10 | tail HR@10 | NDCG@10 | AUC all | AUC exposed |"
        yield "| --- | --- | --- | --- | --- | --- |"
        for name, against in one["gpl_against"].items():
            cells = [_percent(against[m]["relative"]) for m in ("hr@10", "tail_hr@10", "ndcg@10", "auc", "exposed_auc")]
            yield f"| {one['methods'][name]['title']} | " + " | ".join(cells) + " |"
    yield ""
    yield "Chosen settings: " + "; ".join(
        f"{name} {', '.join(f'{key}={value}' for key, value in method['settings'].items())}"
        for name, method in one["methods"].items()
        if method["settings"] and method["group"] not in ("ablation", "control")
    )
    bins = one["methods"].get(SUBJECT, {}).get("reliability")
    if bins:
        yield ""
        yield "What the pseudo-labels call good (each test user's 20 candidates nearest to the anchors), by confidence:"
        yield ""
        yield "| confidence | " + " | ".join(f"{b['confidence']:.2f}" for b in bins) + " |"
        yield "| --- |" + " --- |" * len(bins)
        yield "| label | " + " | ".join(f"{b['label']:.3f}" for b in bins) + " |"
        yield "| truly relevant | " + " | ".join(f"{b['relevant']:.3f}" for b in bins) + " |"


def _cells(method: Summary, columns: Iterable[str]) -> list[str]:
    return [_figure(method["metrics"][name], name in _WITH_INTERVAL and columns is COLUMNS) for name in columns]


def _figure(interval: list[float | None], with_interval: bool) -> str:
    estimate, low, high = interval
    if estimate is None:
        return "n/a"
    if not with_interval or low is None or high is None:
        return f"{estimate:.3f}"
    return f"{estimate:.3f} [{low:.3f}, {high:.3f}]"


def _percent(interval: list[float | None]) -> str:
    estimate, low, high = interval
    if estimate is None:
        return "n/a"
    if low is None and high is None:
        return f"{estimate:+.1%}"
    ends = ("n/a" if end is None else f"{end:+.1%}" for end in (low, high))  # no upper end: the rival may have nothing
    return f"{estimate:+.1%} [{', '.join(ends)}]"
