"""One label's story: what was recalled and shown, which anchors were in force, and how its number comes about.

Everything is recomputed from the log by the code that labels, and set beside what was recorded.
"""

from __future__ import annotations

from typing import Any

import msgspec

from streams.contracts import Item, Recall, decode
from streams.replay.anatomy import Told, anchors_story, calculation_story, tell
from streams.replay.find import Found
from streams.replay.log import Log, LogError
from streams.replay.select import time_text
from streams.replay.values import Value, values
from streams.settings import Settings

_TEXT = 90


def explain(log: Log, settings: Settings, found: Found, item_id: str) -> dict[str, Any]:
    """The story of one item of a found request, JSON-ready (``docs/replay.md`` documents the keys).

    Raises LogError when the log has neither the recall nor a label that names the item.
    """
    told = tell(log, settings, found)
    recorded = None if found.recorded is None else found.recorded.label
    recall = found.decoded()
    said = values(recorded) if recorded is not None else {}
    again = values(told.result.label) if told.result is not None and told.result.label is not None else {}
    if recall is None and item_id not in said:
        raise LogError(f"the recall has expired from the log, and its label does not name the item {item_id!r}")
    story: dict[str, Any] = {
        "request_id": recorded.request_id if recorded else recall.request_id if recall else "",
        "item_id": item_id,
        "recall": _recall(found, recall, item_id, settings),
        "exposures": _exposures(told),
        "anchors": None,
        "calculation": None,
        "recorded": _side(said.get(item_id), recorded),
        "recomputed": _side(again.get(item_id), told.result.label if told.result else None),
        "provenance": None if recorded is None else msgspec.to_builtins(recorded.provenance),
        "label_record": None if found.recorded is None else _place(found),
    }
    if told.replay is not None and told.result is not None and told.anchors is not None:
        story["anchors"] = anchors_story(told, item_id)
        story["calculation"] = calculation_story(told, item_id, again.get(item_id))
    story["verdict"] = _verdict(story, told, said.get(item_id), again.get(item_id))
    story["state"] = _state(story, told, recall, item_id, again.get(item_id) or said.get(item_id))
    _put_texts(log, story)
    return story


def _recall(found: Found, recall: Recall | None, item_id: str, settings: Settings) -> dict[str, Any] | None:
    entry = found.recall
    if entry is None or recall is None:
        return None
    place = recall.candidates.index(item_id) if item_id in recall.candidates else None
    return {
        "user_id": recall.user_id,
        "ts": recall.ts,
        "time": time_text(recall.ts),
        "partition": entry.partition,
        "offset": entry.offset,
        "logged": time_text(entry.kafka_ms),
        "candidates": len(recall.candidates),
        "place": None if place is None else place + 1,
        "source": recall.sources[place] if recall.sources and place is not None else None,
        "window_seconds": settings.labels.window_seconds,
        "window_ends": time_text(recall.ts + int(settings.labels.window_seconds * 1000)),
    }


def _exposures(told: Told) -> list[dict[str, Any]]:
    if told.result is None:
        recorded = told.found.recorded
        shown = (
            {}
            if recorded is None
            else dict(zip(recorded.label.exposed.item, recorded.label.exposed.clicked, strict=True))
        )
        return [{"item_id": item, "clicked": bool(clicked), "events": []} for item, clicked in shown.items()]
    joined = told.result.request.joined[0]
    events = [(offset, told.events[offset]) for offset in joined.feedback_offsets if offset in told.events]
    return [
        {
            "item_id": item,
            "clicked": clicked,
            "events": [
                {"event_id": e.event_id, "kind": e.kind, "ts": e.ts, "time": time_text(e.ts), "offset": offset}
                for offset, e in events
                if e.item_id == item
            ],
        }
        for item, clicked in joined.exposed.items()
    ]


def _side(value: Value | None, label: Any) -> dict[str, Any] | None:
    """What one side says of the item; None where there is no label at all."""
    if label is None:
        return None
    return {
        "revision": label.revision,
        "correction": label.provenance.correction,
        "outcome": label.outcome,
        "item": None if value is None else value._asdict(),
    }


def _place(found: Found) -> dict[str, Any]:
    assert found.recorded is not None
    partition = found.recorded.label.provenance.recall[0]
    return {"partition": partition, "offset": found.recorded.offset, "logged": time_text(found.recorded.kafka_ms)}


def _verdict(story: dict[str, Any], told: Told, was: Value | None, again: Value | None) -> dict[str, Any]:
    """Whether the recomputed label is the recorded one, and if not, why."""
    result = told.result
    if story["recorded"] is None:
        why = "no label of this request is on the log"
        if result is not None and not result.request.over:
            why += ": its window is not over on the log yet"
        return {"equal": None, "why": why, "causes": {}}
    if result is None:
        return {"equal": None, "why": "the recall has expired from the log, nothing can be recomputed", "causes": {}}
    if result.label is None:
        return {"equal": None, "why": f"cannot be recomputed: {result.lost}", "causes": {}}
    if was == again:
        said = "the recomputed label is the recorded one" if was else "neither record has a label of it"
        rest = "" if told.difference is None else f"; of the request's other items {len(told.difference.moves)} differ"
        return {"equal": True, "why": f"{said}{rest}", "causes": _causes(told)}
    assert told.difference is not None
    move = next(move for move in told.difference.moves if move.item == story["item_id"])
    return {
        "equal": False,
        "why": f"{move.cause}: {told.difference.causes.get(move.cause, '')}",
        "causes": _causes(told),
    }


def _causes(told: Told) -> dict[str, str]:
    return {} if told.difference is None else {str(cause): text for cause, text in told.difference.causes.items()}


def _state(
    story: dict[str, Any], told: Told, recall: Recall | None, item_id: str, value: Value | None
) -> dict[str, str]:
    """What the item is in this request, in a word and a sentence."""
    known = told.replay is not None and item_id in told.replay.items.catalogue
    if value is not None and value.exposed:
        click = "clicked" if value.label else "not clicked"
        return {
            "name": "exposed",
            "text": f"It was shown and {click}: that is its label. It gets a raw anchor score and no pseudo-label.",
        }
    if value is not None:
        return {
            "name": "unexposed",
            "text": "It was recalled and not shown, so it is pseudo-labelled by the user's anchors.",
        }
    if recall is not None and item_id not in recall.candidates:
        there = "it is in the catalogue" if known else "the catalogue does not know it"
        return {
            "name": "not recalled",
            "text": f"It is none of the {len(recall.candidates)} candidates and was not shown: no label ({there}).",
        }
    result = told.result
    if result is not None and result.lost is not None:
        return {"name": "not replayable", "text": f"What was in force is no longer in the log: {result.lost}."}
    if result is not None and result.label is not None and result.label.outcome == "no_anchors":
        following = story["anchors"] and story["anchors"]["following"]
        after = f" The first ones came at {following['time']}." if following else " None came after it either."
        text = "The user had no anchors as of the request, so nothing was pseudo-labelled."
        return {"name": "no anchors", "text": text + after}
    return {
        "name": "unknown item",
        "text": "It was recalled, but the catalogue has no vector of it, so it was left out and counted as unknown.",
    }


def _put_texts(log: Log, story: dict[str, Any]) -> None:
    """Put the items' texts where items are named."""
    named: list[dict[str, Any]] = [story, *story["exposures"]]
    for anchor in (story["anchors"] or {}).get("anchors", ()):
        named += anchor["nearest"]
    wanted = {place["item_id"] for place in named}
    texts: dict[str, str] = {}
    for partition in log.partitions("items"):
        for entry in log.read("items", partition):
            item_id = (entry.key or b"").decode(errors="replace")
            if item_id in wanted and entry.value is not None:
                try:
                    texts[item_id] = decode(Item, entry.value).text.strip()
                except msgspec.DecodeError:
                    continue
    for place in named:
        text = texts.get(place["item_id"], "")
        place["text"] = text if len(text) <= _TEXT else text[: _TEXT - 1] + "\u2026"
