"""Views as one self-contained page: no script, no request, drawings as inline SVG."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

from jinja2 import Environment, PackageLoader, StrictUndefined

from gpl.inspect.text import spelled
from gpl.inspect.views import Histogram, ItemView, Point, SidView, UserView

_MAP_WIDTH, _MAP_HEIGHT, _MARGIN = 620, 420, 14
_YEAR_1980_MS, _YEAR_2100_MS = 315_532_800_000, 4_102_444_800_000


def html(view: UserView | ItemView | SidView) -> str:
    """The page of a view."""
    environment = Environment(
        loader=PackageLoader("gpl.inspect", "pages"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"sid": spelled, "bars": _bars, "when": _when}
    if isinstance(view, UserView):
        return environment.get_template("user.html.j2").render(view=view, map=_place(view))
    name = "item.html.j2" if isinstance(view, ItemView) else "sid.html.j2"
    return environment.get_template(name).render(view=view)


def _place(view: UserView) -> dict[str, list[Point] | int]:
    """The map's points in pixels."""
    anchors, top = [a.point for a in view.anchors], [row.point for row in view.top]
    every = [*view.map.items, *view.map.history, *anchors, *top]
    low = [min(point[axis] for point in every) for axis in (0, 1)]
    span = [max(1e-6, max(point[axis] for point in every) - low[axis]) for axis in (0, 1)]

    def placed(points: Sequence[Point]) -> list[Point]:
        return [
            (
                round(_MARGIN + (x - low[0]) / span[0] * (_MAP_WIDTH - 2 * _MARGIN), 1),
                round(_MAP_HEIGHT - _MARGIN - (y - low[1]) / span[1] * (_MAP_HEIGHT - 2 * _MARGIN), 1),
            )
            for x, y in points
        ]

    return {
        "width": _MAP_WIDTH,
        "height": _MAP_HEIGHT,
        "items": placed(view.map.items),
        "history": placed(view.map.history),
        "anchors": placed(anchors),
        "top": placed(top),
    }


def _bars(histogram: Histogram, width: int = 420, height: int = 110) -> dict[str, object]:
    """A histogram in pixels: bars as (x, y, width, height, label), and the mean's x."""
    low, high = histogram.edges[0], histogram.edges[-1]
    most, step = max(histogram.counts), width / len(histogram.counts)
    bars = []
    for at, count in enumerate(histogram.counts):
        tall = count / most * (height - 4)
        said = f"{histogram.edges[at]:.3f} to {histogram.edges[at + 1]:.3f}: {count:,}"
        bars.append((round(at * step, 1), round(height - tall, 1), round(step - 1, 1), round(tall, 1), said))
    mean = (histogram.mean - low) / max(1e-12, high - low) * width
    return {"width": width, "height": height, "bars": bars, "mean": round(mean, 1), "low": low, "high": high}


def _when(ts: int) -> str:
    """Milliseconds since the epoch as a date, as our records have them; any other unit as it is."""
    if not _YEAR_1980_MS <= ts < _YEAR_2100_MS:
        return str(ts)
    return datetime.fromtimestamp(ts / 1000, UTC).strftime("%Y-%m-%d %H:%M")
