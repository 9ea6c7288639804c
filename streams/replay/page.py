"""HTML pages of replay: one file each, nothing loaded from elsewhere."""

from __future__ import annotations

from typing import Any

from streams.replay.select import time_text


def page(template: str, **about: Any) -> str:
    """A template of this package, filled in."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("streams.replay", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["time"] = time_text
    environment.filters["count"] = lambda value: f"{value:,.0f}"
    return environment.get_template(template).render(**about)
