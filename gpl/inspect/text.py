"""Views in the terminal, by rich."""

from __future__ import annotations

import re
from collections.abc import Iterable

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from gpl.inspect.views import Histogram, ItemView, Neighbour, SidView, UserView

_BLOCKS = " ▁▂▃▄▅▆▇█"
_WIDE = 60
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""All but tab and line feed."""


def text(view: UserView | ItemView | SidView) -> RenderableType:
    """What ``rich.print`` shows of a view."""
    if isinstance(view, UserView):
        return _user(view)
    return _item(view) if isinstance(view, ItemView) else _sid(view)


def spelled(sid: Iterable[int]) -> str:
    """``12-7-40``."""
    return "-".join(map(str, sid))


def _user(view: UserView) -> Group:
    unknown = f", {view.unknown_items} more of items that are not in the data" if view.unknown_items else ""
    parts: list[RenderableType] = [
        Panel(_plain(f"user {view.user_id}: {len(view.history)} positives{unknown}\n{view.generator}\n{view.settings}"))
    ]
    recent = Table("time", "item", "", title="History, newest first", title_justify="left")
    for met in view.history[:-13:-1]:
        recent.add_row(str(met.ts), _plain(met.item_id), _plain(_short(met.text)))
    parts.append(recent)
    if not view.anchors:
        return Group(*parts, Text("No anchors: such a user gets no pseudo-labels.", style="yellow"))
    if view.notice:
        parts.append(Text(view.notice, style="yellow"))
    anchors = Table(
        "", "SID", "p", "generation", "history", "confidence", "nearest not met", title="Anchors", title_justify="left"
    )
    for at, anchor in enumerate(view.anchors):
        near = "\n".join(f"{n.cosine:.2f} {_short(n.text or n.item_id)}" for n in anchor.nearest[:3])
        factors = (anchor.generation_factor, anchor.history_factor, anchor.confidence)
        columns = [f"{value:.3f}" for value in (anchor.probability, *factors)]
        anchors.add_row(str(at + 1), spelled(anchor.sid), *columns, _plain(near))
    parts.append(anchors)
    parts.append(Text(f"dispersion factor {view.dispersion_factor:.3f}, the same for all of the user's labels"))
    for name, histogram in (("labels", view.labels), ("confidences", view.confidences)):
        if histogram is not None:
            parts.append(_bars(name, histogram))
    best = Table("score", "label", "confidence", "anchor", "item", "", title="Highest labels", title_justify="left")
    for row in view.top:
        best.add_row(
            f"{row.score:.3f}",
            f"{row.label:.3f}",
            f"{row.confidence:.3f}",
            str(row.anchor + 1),
            _plain(row.item_id),
            _plain(_short(row.text)),
        )
    return Group(*parts, best)


def _item(view: ItemView) -> Group:
    head = f"item {view.item_id}: {view.text}\nSID {spelled(view.sid)}, taken {view.positives:,} times"
    parts: list[RenderableType] = [Panel(_plain(head))]
    if view.same_sid:
        parts.append(_neighbours("Same SID", view.same_sid[:20]))
    parts.append(_neighbours("Nearest", view.nearest))
    if view.labels is not None:
        parts.append(_bars(f"labels for {view.asked} users with anchors who have not taken it", view.labels, "users"))
        users = Table("user", "label", title="Highest labels", title_justify="left")
        for user, label in view.interested:
            users.add_row(_plain(user), f"{label:.3f}")
        parts.append(users)
    return Group(*parts)


def _sid(view: SidView) -> Group:
    whole = "SID" if len(view.sid) == view.levels else f"first {len(view.sid)} of {view.levels} codes"
    head = f"{whole} {spelled(view.sid)}: {view.count} items, mean cosine with their mean {view.tightness:.3f}"
    parts: list[RenderableType] = [Panel(Text(head)), _neighbours("Items, the most typical first", view.items)]
    if view.children:
        table = Table("next code", "items", "most typical", title="Below", title_justify="left")
        for code, count, typical in view.children[:20]:
            table.add_row(str(code), str(count), _plain(_short(typical)))
        parts.append(table)
    if view.siblings:
        table = Table("beside", "items", "cosine of means", title="Nearest beside it", title_justify="left")
        for sid, count, cosine in view.siblings:
            table.add_row(spelled(sid), str(count), f"{cosine:.3f}")
        parts.append(table)
    return Group(*parts)


def _neighbours(title: str, rows: list[Neighbour]) -> Table:
    table = Table("cosine", "item", "", title=title, title_justify="left")
    for row in rows:
        table.add_row(f"{row.cosine:.3f}", _plain(row.item_id), _plain(_short(row.text)))
    return table


def _bars(name: str, histogram: Histogram, counted: str = "items") -> Text:
    most = max(histogram.counts)
    drawn = "".join(_BLOCKS[-(-count * (len(_BLOCKS) - 1) // most)] for count in histogram.counts)
    low, high = histogram.edges[0], histogram.edges[-1]
    return Text(f"{name}: {low:.3f} {drawn} {high:.3f}, mean {histogram.mean:.3f}, {sum(histogram.counts):,} {counted}")


def _plain(words: str) -> Text:
    """Words of the data without control characters, which a terminal would obey."""
    return Text(_CONTROL.sub("", words))


def _short(words: str) -> str:
    return words if len(words) <= _WIDE else words[: _WIDE - 1] + "…"
