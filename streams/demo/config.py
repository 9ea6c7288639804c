"""The configuration of a demo run: defaults for fast event time, the user's file over them, the run's places last."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streams.settings import Settings, load, read

# An event day passes in about a second of a demo, so windows are days and waits on the wall are short.
_DEMO: dict[str, Any] = {
    "kafka": {"partitions": 2, "compression": "none"},  # all on one machine: compressing costs more than it saves
    "labels": {
        "window_seconds": 86_400.0,
        "allowed_lateness_seconds": 600.0,
        "idle_timeout_wall_seconds": 5.0,
    },
    "profiles": {"allowed_lateness_seconds": 60.0, "idle_timeout_wall_seconds": 10.0},
    "trainer": {"shadow": True, "publish_every_wall_seconds": 10.0, "checkpoint_every_wall_seconds": 10.0},
}

_RETENTION_WALL_SECONDS = 60.0

WRITTEN = "# Written by `gpl demo`"
"""How a demo's ``gpl.toml`` begins: the directory that holds it is a demo's, and the next run may clear it."""

_BARE = re.compile(r"[A-Za-z0-9_-]+")


@dataclass(frozen=True)
class Place:
    """Where one run keeps everything, and the names that keep it apart from other runs on the same broker."""

    directory: Path
    name: str

    @property
    def config(self) -> Path:
        return self.directory / "gpl.toml"

    @property
    def journal(self) -> Path:
        return self.directory / "journal.jsonl"


def wanted(place: Place, own: Path | None, window: float | None, speed: float = 1.0) -> dict[str, Any]:
    """What the run shall be like: the demo's defaults, ``own`` (the user's file) over them, ``window`` over that.

    ``speed``: event seconds a second. Raises ConfigError for ``own``.
    """
    document = merged(_DEMO, {"space": {"cache": str(place.directory / "embeddings")}})
    # What comes late on the wall is late by far more in event time, and must still find its request.
    document = merged(document, {"labels": {"retention_seconds": max(_RETENTION_WALL_SECONDS * speed, 86_400.0)}})
    if own is not None:
        document = merged(document, read(own))
    return document if window is None else merged(document, {"labels": {"window_seconds": window}})


def install(place: Place, document: Mapping[str, Any], artefacts: Path, bootstrap: str) -> Settings:
    """Write the run's ``gpl.toml`` and load it. Raises pydantic.ValidationError for what cannot be set."""
    place.directory.mkdir(parents=True, exist_ok=True)
    document = merged(document, _of_run(place, artefacts, bootstrap))
    place.config.write_text(f"{WRITTEN}; changes here are lost.\n{toml(document)}", encoding="utf-8")
    return load(place.config)


def _of_run(place: Place, artefacts: Path, bootstrap: str) -> dict[str, Any]:
    state = place.directory / "state"
    return {
        "artefacts": str(artefacts),
        "kafka": {"bootstrap_servers": bootstrap, "prefix": f"{place.name}.", "group_prefix": f"{place.name}-"},
        "index": {"path": str(state / "index"), "collection": f"{place.name}-items"},
        "trainer": {
            "checkpoints": str(state / "checkpoints"),
            "models": str(place.directory / "models"),
            "journal": str(place.journal),
        },
        "metrics": {"host": "127.0.0.1", "port": 0},
    }


def merged(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """``over`` laid on ``under``, table by table."""
    result = dict(under)
    for name, value in over.items():
        below = result.get(name)
        nested = isinstance(value, Mapping) and isinstance(below, Mapping)
        result[name] = merged(below, value) if nested and isinstance(below, Mapping) else value
    return result


def toml(document: Mapping[str, Any], prefix: str = "") -> str:
    """TOML of nested tables of strings, numbers, booleans and lists of them."""
    plain = {name: value for name, value in document.items() if not isinstance(value, Mapping)}
    lines = [f"{_key(name)} = {_value(value)}" for name, value in plain.items()]
    text = "".join(line + "\n" for line in lines)
    for name, value in document.items():
        if isinstance(value, Mapping):
            table = f"{prefix}{_key(name)}"
            text += f"\n[{table}]\n{toml(value, table + '.')}"
    return text


def _key(name: str) -> str:
    return name if _BARE.fullmatch(name) else _value(name)


def _value(value: Any) -> str:
    # JSON's strings, numbers, booleans and arrays are TOML's too, but for surrogate pairs and a bare delete character.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
