"""What ``gpl models`` does with published versions: find, compare, put into service."""

from __future__ import annotations

from contextlib import closing
from typing import Any

import numpy as np

from gpl.preranker.model import ROWS_OF
from streams import models
from streams.contracts import ModelUpdate
from streams.kafka import producer
from streams.settings import Settings
from streams.trainer.publish import Announced, announce, update_of


def resolve(store: models.ModelStore, text: str) -> str:
    """The version that is meant by its name, or by its number (``v000012``, ``v12``, ``12``). Raises ModelError."""
    versions = store.versions()
    if text in versions:
        return text
    number = text.removeprefix("v")
    found = [version for version in versions if number.isdigit() and models.number_of(version) == int(number)]
    if not found:
        raise models.ModelError(f"{text!r}: no such version in {store.uri('')}; `gpl models list` shows them")
    return found[0]


def in_service(settings: Settings) -> ModelUpdate | None:
    """The last announcement. Raises what the broker raises."""
    with closing(Announced(settings.kafka, settings.trainer.model_name)) as announced:
        return announced.last


def put_into_service(settings: Settings, store: models.ModelStore, version: str, pin: bool) -> ModelUpdate:
    """Announce a version, pinned first where wanted, so that the trainer does not replace it in between.

    Raises ModelError when the version is damaged, another model's or just being removed, and what the broker raises;
    nothing is changed then, but that a pin that could not be read is gone.
    """
    store.read(version)  # a damaged one must not be announced
    update = update_of(store, version)
    if update.model != settings.trainer.model_name:
        raise models.ModelError(f"{version} is a model of {update.model!r}, not {settings.trainer.model_name!r}")
    with closing(producer(settings.kafka)) as sending:
        try:
            before = store.pinned()
        except models.ModelError:
            before = None
        if pin:
            store.pin(version)
        try:
            _check_kept(store, version)
            announce(settings.kafka, sending, update)
        except BaseException:
            if pin:  # or the trainer would announce nothing beside a version that was not put into service
                store.pin(before.version) if before is not None else store.unpin()
            raise
    return update


def hold(settings: Settings, store: models.ModelStore, version: str) -> None:
    """Pin a version, and announce it unless it serves. Raises as ``put_into_service``."""
    serving = in_service(settings)
    if serving is not None and serving.version == version:
        store.pin(version)
        serving = in_service(settings)  # the trainer may have announced its next in between, seeing no pin
    if serving is None or serving.version != version:
        put_into_service(settings, store, version, pin=True)


def _check_kept(store: models.ModelStore, version: str) -> None:
    """The trainer removes old versions, and may have been at this one before it could see that it is wanted."""
    try:
        store.read(version)
    except models.UnreadableError:
        raise
    except models.ModelError as error:
        raise models.ModelError(f"{version} has just been removed by the trainer; choose a newer one") from error


def difference(store: models.ModelStore, first: str, second: str) -> dict[str, Any]:
    """What changed from one version to another: figures, positions, ids, and weights by tensor.

    Of tables by id the rows of ids that both have are compared. ``relative`` is the norm of the change over that of the
    first.
    """
    a, b = store.read(first), store.read(second)
    figures = {
        name: {"first": a.manifest.metrics.get(name), "second": b.manifest.metrics.get(name)}
        for name in sorted(a.manifest.metrics.keys() | b.manifest.metrics.keys())
    }
    ids = {}
    rows: dict[str, tuple[list[int], list[int]]] = {}
    for table, old, new in (("users", a.ids.users, b.ids.users), ("items", a.ids.items, b.ids.items)):
        row_of = {id_: row for row, id_ in enumerate(new, 1)}
        both = [(row, row_of[id_]) for row, id_ in enumerate(old, 1) if id_ in row_of]
        rows[table] = [x for x, _ in both], [y for _, y in both]
        ids[table] = {"added": len(new) - len(both), "removed": len(old) - len(both), "kept": len(both)}
    weights: dict[str, dict[str, Any]] = {}
    for name in sorted(a.weights.keys() & b.weights.keys()):
        x, y = a.weights[name].double().numpy(), b.weights[name].double().numpy()
        if name in ROWS_OF:
            mine, theirs = rows[ROWS_OF[name]]
            x, y = x[mine], y[theirs]
        if x.shape != y.shape:
            weights[name] = {"shapes": [list(x.shape), list(y.shape)]}
            continue
        norm, change = float(np.linalg.norm(x)), float(np.linalg.norm(y - x))
        largest = float(np.abs(y - x).max(initial=0.0))
        weights[name] = {"change": change, "relative": change / norm if norm else None, "largest": largest}
    return {
        "first": first,
        "second": second,
        "records": b.manifest.records - a.manifest.records,
        "newest_event_ts": {"first": a.manifest.newest_event_ts, "second": b.manifest.newest_event_ts},
        "metrics": figures,
        "ids": ids,
        "weights": weights,
    }
