"""The parts of an explanation: one request replayed, its anchors, and the steps from them to a label."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from gpl.labels.confidence import dispersion_factor, generation_factor
from gpl.labels.matching import cosines, softmax
from streams.contracts import Calibration, Feedback
from streams.replay.attribute import Attribution, Difference
from streams.replay.find import Found
from streams.replay.log import Log
from streams.replay.run import Replay, Result, Setup
from streams.replay.select import Selection, time_text
from streams.replay.state import AnchorHistory, Refresh
from streams.replay.values import Value, same
from streams.replay.walk import Step
from streams.settings import Settings

NEAREST = 3
"""Catalogue items that stand for an anchor."""
_MARGIN_MS = 60_000


@dataclass(frozen=True)
class Told:
    """A found request, replayed. ``events``: feedback by offset. Without a recall on the log nothing but ``found``."""

    found: Found
    result: Result | None
    replay: Replay | None
    anchors: AnchorHistory | None
    events: dict[int, Feedback]
    difference: Difference | None


def tell(log: Log, settings: Settings, found: Found) -> Told:
    """Replay the one request, reading only what it can depend on."""
    entry, recall = found.recall, found.decoded()
    if entry is None or recall is None:
        return Told(found, None, None, None, {}, None)
    chosen = {entry.partition: [(entry.offset, entry.offset)]}
    selection = Selection(recall.ts, recall.ts + 1, recall.user_id, chosen)
    replay = Replay(log, selection, Setup.of(settings, log.frame))
    anchors = AnchorHistory(log, entry.partition, recall.user_id)
    # Feedback is logged after its recall, but for what two topics and two clocks may be apart.
    margin = max(_MARGIN_MS, int(settings.labels.allowed_lateness_seconds * 1000))
    first = log.offset_at("feedback", entry.partition, entry.kafka_ms - margin)
    if found.recorded is not None:
        first = min([first, *found.recorded.label.provenance.feedback])
    events: dict[int, Feedback] = {}

    def keep(step: Step, needed: bool) -> None:
        if needed and isinstance(step.record, Feedback):
            events[step.entry.offset] = step.record

    starts = {"recalls": entry.offset, "feedback": first}
    with contextlib.closing(replay.partition(entry.partition, anchors, starts, keep)) as results:
        result = next(results, None)
    difference = None
    recorded = found.recorded
    if (
        result is not None
        and result.label is not None
        and recorded is not None
        and not same(recorded.label, result.label)
    ):
        difference = Attribution(replay, anchors).difference(result, recorded)
    return Told(found, result, replay, anchors, events, difference)


def anchors_story(told: Told, item_id: str) -> dict[str, Any]:
    """The anchors as of the request, each with the catalogue items nearest to it."""
    assert told.result is not None and told.replay is not None and told.anchors is not None
    recall, in_force = told.result.request.recall, told.result.in_force
    story: dict[str, Any] = {"lost": in_force.lost, "in_force": None, "following": _refresh(in_force.following, None)}
    refresh = in_force.refresh
    if refresh is None or in_force.lost is not None:
        return story
    story["in_force"] = _refresh(refresh, recall.ts)
    ready = told.anchors.ready(refresh, told.replay.setup.config).prepared
    story["anchors"] = []
    if ready is None:
        return story
    catalogue = told.replay.items.catalogue
    known, vector = catalogue.lookup([item_id])
    near = cosines(ready.vectors, np.ascontiguousarray(catalogue.vectors)) if len(catalogue) else np.zeros((0, 0))
    near[catalogue.sids[:, 0] < 0] = -np.inf
    probability = softmax(ready.logprobs)
    generation = generation_factor(ready.logprobs, told.replay.log.frame.levels)
    own = cosines(ready.vectors, vector)[0] if known else None
    for k in range(len(ready.vectors)):
        order = np.argsort(-near[:, k], kind="stable")[:NEAREST].tolist() if len(near) else []
        story["anchors"].append(
            {
                "sid": refresh.record.sid[k],
                "probability": float(probability[k]),
                "generation_factor": float(generation[k]),
                "history_factor": refresh.record.history_factor[k],
                "cosine": None if own is None else float(own[k]),
                "nearest": [{"item_id": catalogue.id_at(row), "cosine": float(near[row, k])} for row in order],
            }
        )
    return story


def _refresh(refresh: Refresh | None, as_of: int | None) -> dict[str, Any] | None:
    if refresh is None:
        return None
    record = refresh.record
    return {
        "version": record.version,
        "ts": record.ts,
        "time": time_text(record.ts),
        "age_seconds": None if as_of is None else (as_of - record.ts) / 1000,
        "offset": refresh.offset,
        "generator": record.generator,
        "history": len(record.history),
    }


def calculation_story(told: Told, item_id: str, value: Value | None) -> dict[str, Any] | None:
    """The steps from anchors to label. None where there is nothing to calculate."""
    assert told.result is not None and told.replay is not None and told.anchors is not None
    refresh, replay = told.result.in_force.refresh, told.replay
    known, vector = replay.items.catalogue.lookup([item_id])
    if value is None or value.score is None or refresh is None or not known:
        return None
    config = replay.setup.config
    ready = told.anchors.ready(refresh, config).prepared
    assert ready is not None
    cosine = cosines(ready.vectors, vector)[0]
    probability = softmax(ready.logprobs)
    terms = probability * np.exp((cosine - 1.0) / config.kernel_tau)
    best = int(terms.argmax()) if config.matching == "kernel" else int(cosine.argmax())
    factors = {
        "dispersion": (dispersion_factor(ready.vectors, ready.logprobs), config.dispersion),
        "history": (float(refresh.record.history_factor[best]), config.history),
        "generation": (float(generation_factor(ready.logprobs, replay.log.frame.levels)[best]), config.generation),
    }
    return {
        "matching": config.matching,
        "kernel_tau": config.kernel_tau if config.matching == "kernel" else None,
        "best_anchor": best + 1,
        "best_cosine": float(cosine[best]),
        "score": value.score,
        "exposed": value.exposed,
        "factors": {name: {"value": factor, "used": used} for name, (factor, used) in factors.items()},
        "confidence": value.confidence,
        "calibration": _calibration(told.result.calibration),
        "label": value.label,
    }


def _calibration(calibration: Calibration | None) -> dict[str, Any]:
    linear = "(1 + score) / 2"
    if calibration is None:
        return {"version": "none", "kind": "none", "formula": linear, "fitted_on": 0}
    formula = linear
    if calibration.kind == "platt":
        formula = f"sigmoid({calibration.slope:.4f} * score {calibration.intercept:+.4f})"
    elif calibration.kind == "isotonic":
        formula = f"linear between {len(calibration.scores)} knots"
    said = {name: getattr(calibration, name) for name in calibration.__struct_fields__}
    return {**said, "time": time_text(calibration.ts), "formula": formula}
