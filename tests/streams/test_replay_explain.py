"""An explanation holds together: its parts multiply to the recorded label, and what there is none of is said."""

from __future__ import annotations

import math
from typing import Any

import pytest
from rich.console import Console

from streams.contracts import Calibration, Item, Label, Recall, encode
from streams.replay.explain import explain
from streams.replay.find import Found, Hints, find
from streams.replay.log import LogError
from streams.replay.tell import html, table
from tests.streams.replay_world import LABELS, SETTINGS, START, World, unit

KERNEL = SETTINGS.model_copy(update={"labels": LABELS.model_copy(update={"matching": "kernel", "history": False})})


@pytest.fixture
def world() -> World:
    world = World(1)
    for item in world.items:
        world.log.put("items", item, encode(Item(item, f"Text of <{item}>")))
    world.send(world.events(20))
    return world


def story(world: World, label: Label | str, item: str, settings: Any = SETTINGS) -> dict[str, Any]:
    request = label if isinstance(label, str) else label.request_id
    found = find(world.log, request, Hints())
    assert found is not None
    told = explain(world.log, settings, found, item)
    # Both pages can be made of every story, and escape what items say.
    console = Console(width=140)
    with console.capture() as shown:
        console.print(table(told))
    assert told["state"]["text"][:20] in shown.get()
    page = html(told)
    assert "<item" not in page and "http" not in page
    return told


def test_names_that_look_like_markup_are_told_as_they_are(world: World):
    recall = Recall("r[/r]", "user[/u]", START + 90_000, ["item-1", "item-2"], sources=["[ann]", "shop:key:1"])
    world.send([recall])
    for item, source in (("item-1", "[ann]"), ("item-2", "shop:key:1")):
        found = find(world.log, recall.request_id, Hints())
        assert found is not None
        console = Console(width=140)
        with console.capture() as shown:
            console.print(table(explain(world.log, SETTINGS, found, item)))
        assert "user user[/u]" in shown.get() and f"from {source}" in shown.get()


@pytest.mark.parametrize("settings", [SETTINGS, KERNEL], ids=["max", "kernel"])
def test_the_steps_give_the_recorded_label(world: World, settings: Any):
    label = next(one for one in world.record(settings) if one.unexposed.item)
    for n, item in enumerate(label.unexposed.item):
        told = story(world, label, item, settings)
        steps = told["calculation"]
        factors = [part["value"] for part in steps["factors"].values() if part["used"]]
        assert math.prod(factors) ** (1 / len(factors)) == pytest.approx(label.unexposed.confidence[n], abs=2e-6)
        said = steps["calibration"]
        by_hand = 1 / (1 + math.exp(-(said["slope"] * steps["score"] + said["intercept"])))
        assert by_hand == pytest.approx(label.unexposed.label[n], abs=2e-6)
        anchors = told["anchors"]["anchors"]
        cosines = [anchor["cosine"] for anchor in anchors]
        assert steps["best_cosine"] == cosines[steps["best_anchor"] - 1]
        if settings is SETTINGS:
            assert steps["score"] == pytest.approx(max(cosines), abs=1e-6)
        else:
            total = sum(a["probability"] * math.exp((a["cosine"] - 1) / settings.labels.kernel_tau) for a in anchors)
            assert steps["score"] == pytest.approx(total, abs=1e-5)
        assert told["verdict"]["equal"] is True
        assert told["recorded"]["item"] == told["recomputed"]["item"]
    nearest = told["anchors"]["anchors"][0]["nearest"]
    assert [one["text"] for one in nearest] == [f"Text of <{one['item_id']}>" for one in nearest]
    assert nearest[0]["cosine"] >= nearest[1]["cosine"] >= nearest[2]["cosine"]


def test_an_exposed_item_shows_its_events(world: World):
    label = next(one for one in world.record() if 1 in one.exposed.clicked)
    item = label.exposed.item[label.exposed.clicked.index(1)]
    told = story(world, label, item)
    assert told["state"]["name"] == "exposed"
    (shown,) = [one for one in told["exposures"] if one["item_id"] == item]
    assert shown["clicked"] and {event["kind"] for event in shown["events"]} >= {"click"}
    assert sorted({e["offset"] for one in told["exposures"] for e in one["events"]}) == label.provenance.feedback


def test_what_has_no_label_is_said_to_have_none(world: World):
    world.send([Recall("nobody", "user-9", START + 30_000, world.items[:3])])
    labels = world.record()
    label = next(one for one in labels if one.unexposed.item)
    assert story(world, label, "ghost")["state"]["name"] == "unknown item"
    assert story(world, label, "never heard of")["state"]["name"] == "not recalled"
    told = story(world, "nobody", "item-1")
    assert told["state"]["name"] == "no anchors"
    world.put_anchors("user-9", START + 60_000, 1)
    assert "first ones came at" in story(world, "nobody", "item-1")["state"]["text"]


def test_a_request_without_a_label_is_explained_from_its_recall(world: World):
    told = story(world, "r19", "ghost")
    assert told["recorded"] is None and told["verdict"]["equal"] is None
    assert "window is not over" in told["verdict"]["why"]


def test_a_label_whose_recall_expired_still_tells_what_it_recorded(world: World):
    label = next(one for one in world.record() if one.unexposed.item)
    world.log.entries["recalls", label.provenance.recall[0]].clear()
    told = story(world, label, label.unexposed.item[0])
    assert told["recall"] is None and told["recomputed"] is None
    assert told["recorded"]["item"]["score"] == label.unexposed.score[0]
    with pytest.raises(LogError, match="expired"):
        story(world, label, "ghost")


def test_lost_anchors_are_said_to_be_lost(world: World):
    label = next(one for one in world.record() if one.unexposed.item and one.ts < START + 40_000)
    world.put_anchors(label.user_id, START + 50_000, 3)
    world.log.compact("user-anchors")
    told = story(world, label, label.unexposed.item[0])
    assert "compacted away" in told["verdict"]["why"]
    assert told["anchors"]["lost"]


def test_a_label_that_differs_says_why(world: World):
    label = next(one for one in world.record() if one.unexposed.item)
    item = label.unexposed.item[0]
    world.put_calibration(Calibration("cal-2", label.ts - 1, "platt", 4.0, -2.0, 10))
    told = story(world, label, item)
    assert told["verdict"]["equal"] is False
    assert told["verdict"]["why"] == "calibration: cal-1 then, cal-2 now"
    assert told["recorded"]["item"]["score"] == told["recomputed"]["item"]["score"]
    world.put_item(item, unit(world.rng, 1)[0])
    assert set(story(world, label, item)["verdict"]["causes"]) == {"calibration", "catalogue"}


def test_the_newest_revision_is_found_wherever_it_lies(world: World):
    world.record()
    world.put_anchors("user-1", START + 2_000, 2)
    second = {label.request_id: label for label in world.record()}
    for request_id, label in second.items():
        for hints in (Hints(), Hints(label.user_id), Hints("somebody else"), Hints(None, label.ts)):
            found = find(world.log, request_id, hints)
            assert isinstance(found, Found) and found.recorded is not None
            assert found.recorded.label == label
    assert find(world.log, "no such request", Hints()) is None
