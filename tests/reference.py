"""docs/settings.md and docs/metrics.md, from what the code says: ``python -m tests.reference`` writes them."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin

import yaml
from prometheus_client.metrics import MetricWrapperBase
from pydantic import BaseModel, SecretStr
from pydantic.fields import FieldInfo

from streams import metrics
from streams.settings import Settings

ROOT = Path(__file__).parents[1]
MADE = "<!-- Made by `python -m tests.reference`. -->"
UNITS = {"_seconds": "seconds", "_bytes": "bytes", "_mb": "MiB", "_days": "days"}
TYPES = {SecretStr: "secret", Path: "path", bool: "true or false", int: "integer", float: "number", str: "text"}
BOUNDS = {"ge": "≥ {}", "gt": "> {}", "le": "≤ {}", "lt": "< {}", "pattern": "`{}`"}


def settings_page() -> str:
    """Every setting, a table a section."""
    lines = [
        "# Settings",
        "",
        MADE,
        "",
        "One TOML file, `gpl.toml` or the one that `--config` or `GPL_CONFIG` names, and over it the environment:",
        "`GPL_KAFKA__BOOTSTRAP_SERVERS` is `kafka.bootstrap_servers`. Unknown keys and variables are errors.",
        "`None`, as a default, is no value. Secrets belong in the environment; `gpl config show` does not print them.",
        "",
    ]
    own = {name: field for name, field in Settings.model_fields.items() if not _section(field)}
    lines += _table(("Setting", "Type", "Default", "Bounds", ""), (_setting("", *one) for one in own.items()))
    for section, field in Settings.model_fields.items():
        if kind := _section(field):
            lines += ["", f"## {section}", ""]
            rows = (_setting(f"{section}.", *one) for one in kind.model_fields.items())
            lines += _table(("Setting", "Type", "Default", "Bounds", ""), rows)
    return "\n".join(lines) + "\n"


def metrics_page() -> str:
    """Every metric, a table a section of streams/metrics.py, and every alert."""
    lines = [
        "# Metrics and alerts",
        "",
        MADE,
        "",
        "Every process answers `/metrics`. Most metrics are there, as 0, in processes that never set them too: choose",
        "by `role`, which the scrape adds (`deploy/prometheus/prometheus.yml`). Topics are named without the prefix.",
    ]
    for section, names in _declared():
        lines += ["", f"## {section}", ""]
        lines += _table(("Metric", "Type", "Labels", ""), (_metric(getattr(metrics, name)) for name in names))
    lines += ["", "## Alerts", "", "Of `deploy/prometheus/rules.yml`; *for*: how long the expression must hold.", ""]
    groups = yaml.safe_load((ROOT / "deploy/prometheus/rules.yml").read_text())["groups"]
    alerts = (_alert(rule) for group in groups for rule in group["rules"] if "alert" in rule)
    lines += _table(("Alert", "Severity", "For", "", "Expression"), alerts)
    return "\n".join(lines) + "\n"


PAGES = {"docs/settings.md": settings_page, "docs/metrics.md": metrics_page}


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> Iterator[str]:
    for row in (head, ("---",) * len(head), *rows):
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |"


def _section(field: FieldInfo) -> type[BaseModel] | None:
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def _setting(section: str, name: str, field: FieldInfo) -> tuple[str, ...]:
    default = str(field.default).lower() if isinstance(field.default, bool) else field.default
    bounds = [
        text.format(value)
        for limit in field.metadata
        for key, text in BOUNDS.items()
        if (value := getattr(limit, key, None)) is not None
    ]
    assert field.description, f"{section}{name} has no description"
    return (
        f"`{section}{name}`",
        _type(section, name, field.annotation),
        f"`{default}`",
        ", ".join(bounds),
        field.description,
    )


def _type(section: str, name: str, annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return ", ".join(f"`{value}`" for value in get_args(annotation))
    unit = next((unit for suffix, unit in UNITS.items() if name.endswith(suffix)), None)
    if unit is not None:
        event_time = section in ("labels.", "profiles.") and unit == "seconds" and "_wall_" not in name
        return f"{unit} of event time" if event_time else unit
    if parts := [part for part in get_args(annotation) if part is not NoneType]:
        return " or ".join("URL" if part is str and len(parts) > 1 else _type(section, name, part) for part in parts)
    return TYPES[annotation]


def _declared() -> Iterator[tuple[str, list[str]]]:
    """Sections of streams/metrics.py, as its comments head them, each with the names of its metrics."""
    for part in re.split(r"^# ", inspect.getsource(metrics), flags=re.MULTILINE)[1:]:
        found = [name for name in re.findall(r"^([A-Z_]+) = ", part, re.MULTILINE) if hasattr(metrics, name)]
        names = [name for name in found if isinstance(getattr(metrics, name), MetricWrapperBase)]
        if names:
            yield part.partition(".")[0], names


def _metric(metric: MetricWrapperBase) -> tuple[str, ...]:
    (family,) = metric.describe()
    name = family.name + ("_total" if family.type == "counter" else "")
    return f"`{name}`", family.type, ", ".join(f"`{label}`" for label in metric._labelnames), family.documentation


def _alert(rule: dict[str, Any]) -> tuple[str, ...]:
    notes = rule["annotations"]
    said = ". ".join(notes[key] for key in ("summary", "description") if key in notes).rstrip(".")
    said = re.sub(r"\{\{ \$labels\.(\w+) \}\}", r"*\1*", said)
    said = re.sub(r"\{\{ \$value[^}]*\}\}", "*value*", said)
    return f"`{rule['alert']}`", rule["labels"]["severity"], rule.get("for", ""), said, f"`{rule['expr']}`"


if __name__ == "__main__":
    for path, page in PAGES.items():
        (ROOT / path).write_text(page(), encoding="utf-8")
