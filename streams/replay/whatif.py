"""``--set key=value``: which settings a replay can answer for, and the settings with them changed."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pydantic

from streams.settings import Settings

ALIASES = {
    "lambda": "trainer.pseudo_weight",
    "window": "labels.window_seconds",
    "threshold": "profiles.drift_threshold",
}
LABELS = frozenset(
    {
        "window_seconds",
        "allowed_lateness_seconds",
        "retention_seconds",
        "matching",
        "kernel_tau",
        "dispersion",
        "history",
        "generation",
        "max_ahead_seconds",
    }
)
TRAINER = frozenset(
    {
        "pseudo_weight",
        "evidence",
        "temperature",
        "negatives_weight",
        "negatives",
        "personal",
        "loss",
        "learning_rate",
        "weight_decay",
        "dim",
        "seed",
    }
)
PROFILES = frozenset(
    {"drift_threshold", "drift_delta", "min_interval_seconds", "max_age_seconds", "min_positives", "max_positives"}
)

_WHY_NOT = {
    "labels.idle_timeout_wall_seconds": "it changes when a label is published, not what it says",
    "profiles.allowed_lateness_seconds": "clicks are folded by event time; it decides which are late",
    "profiles.idle_timeout_wall_seconds": "it changes when clicks are applied, not how",
    "trainer.batch_records": "both trainings take the same batches, so that they differ in one thing only",
    "generator": "anchors are read from the log; others need the language model, which replay does not run",
    "codes": "semantic ids are frozen in the artefacts; `gpl fit` makes others",
    "space": "the space is frozen in the artefacts; `gpl fit` makes another",
    "anchors": "it changes when anchors are generated, not what they say",
    "trainer": "it does not change what a step learns",
    "serve": "it does not change a label",
    "metrics": "it does not change a label",
    "index": "it does not change a label",
    "kafka": "it says where the log is; use --config for another broker",
    "artefacts": "it names the space of the vectors on the log; use --config",
}


class WhatIfError(ValueError):
    """A ``--set`` that cannot be answered; the message says why."""


@dataclass(frozen=True)
class WhatIf:
    """``settings``: with the changes in. ``labels``, ``trainer``, ``profiles``: the changes, by section."""

    settings: Settings
    labels: dict[str, Any]
    trainer: dict[str, Any]
    profiles: dict[str, Any]


def what_if(settings: Settings, changes: Iterable[str]) -> WhatIf:
    """The settings under ``changes``, each "section.key=value", the value as in TOML or a bare word.

    Raises WhatIfError for what replay cannot answer, and for a value that the setting refuses.
    """
    sections: dict[str, dict[str, Any]] = {"labels": {}, "trainer": {}, "profiles": {}}
    for change in changes:
        key, equals, text = change.partition("=")
        key = ALIASES.get(key.strip(), key.strip())
        if not equals:
            raise WhatIfError(f"--set {change!r}: KEY=VALUE is expected, such as labels.window_seconds=900")
        section, _, name = key.partition(".")
        allowed = {"labels": LABELS, "trainer": TRAINER, "profiles": PROFILES}.get(section, frozenset())
        if name not in allowed:
            raise WhatIfError(f"--set {key}: {_why_not(settings, key)}")
        sections[section][name] = _value(text.strip())
    update: dict[str, Any] = {}
    for section, values in sections.items():
        if values:
            present = getattr(settings, section)
            try:
                update[section] = type(present).model_validate({**present.model_dump(), **values})
            except pydantic.ValidationError as error:
                detail = error.errors()[0]
                name = ".".join(str(part) for part in detail["loc"])
                raise WhatIfError(f"--set {section}.{name}={detail['input']}: {detail['msg']}") from None
    return WhatIf(settings.model_copy(update=update), **sections)


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _why_not(settings: Settings, key: str) -> str:
    section, _, name = key.partition(".")
    known = section in type(settings).model_fields and (not name or hasattr(getattr(settings, section), name))
    if not known:
        return f"no such setting; replay can set {', '.join(_settable())}"
    why = _WHY_NOT.get(key) or _WHY_NOT.get(section) or "it does not change a label"
    return f"replay cannot answer this: {why}"


def _settable() -> list[str]:
    pairs = (("labels", LABELS), ("trainer", TRAINER), ("profiles", PROFILES))
    return [f"{section}.{name}" for section, names in pairs for name in sorted(names)]
