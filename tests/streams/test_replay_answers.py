"""What other settings would have done: the trainer's own steps and the profiles' own fold, run on the log again."""

from __future__ import annotations

from typing import Any

import numpy as np
from rich.console import Console

from streams.contracts import AnchorRequest, Feedback, encode
from streams.replay.execute import Run, execute
from streams.replay.output import Nowhere
from streams.replay.refreshes import _clicks, _fold
from streams.replay.report import html, run_table
from streams.replay.select import Selection
from streams.replay.state import AnchorHistory, Items
from streams.replay.whatif import what_if
from streams.settings import ProfileSettings, TrainerSettings
from tests.streams.replay_world import DIM, EVERYTHING, SETTINGS, START, World, unit

PROFILES = ProfileSettings(min_positives=3, min_interval_seconds=20, drift_threshold=0.3, max_age_seconds=600)
TRAINER = TrainerSettings(batch_records=8, evidence=False, dim=8, pseudo_weight=1.0)
OURS = SETTINGS.model_copy(update={"profiles": PROFILES, "trainer": TRAINER})


def asked(world: World, *changes: str, selection: Selection = EVERYTHING) -> Run:
    run = execute(world.log, selection, OURS, what_if(OURS, changes), [Nowhere()], False, None, 10)
    console = Console(width=140)
    with console.capture() as shown:
        console.print(run_table(run, 10))
    assert "speed" in shown.get()
    assert "<title>gpl replay</title>" in html(run.document)
    return run


def test_the_same_training_settings_give_the_same_figures_and_others_do_not():
    world = World(1)
    world.send(world.events(120))
    same = asked(world, "lambda=1.0").document["training"]
    assert same["records"] == 120 and same["steps"] == 15 and same["clicks"] > 50
    assert same["in_force"] == same["asked"]
    assert same["difference"]["hr10"] == [0.0, 0.0, 0.0]
    other = asked(world, "lambda=0").document["training"]
    assert other["in_force"] == same["in_force"]  # the same start, the same batches
    assert other["asked"]["log_loss"] != same["asked"]["log_loss"]
    loss = other["asked"]["log_loss"] - other["in_force"]["log_loss"]
    estimate, low, high = other["difference"]["log_loss"]
    assert abs(loss - estimate) < 1e-6 and low <= estimate <= high
    assert asked(world, "lambda=0").document["training"] == other
    flat = asked(world, "trainer.temperature=100").document["training"]
    assert flat["in_force"] == same["in_force"] and flat["asked"]["log_loss"] != same["asked"]["log_loss"]


def refreshing() -> World:
    """Two users who click within an interest and change it half-way; every refresh that is asked for is answered."""
    world = World(2, items=40, users=2)
    world.log.entries["user-anchors", 0].clear()
    world.log.entries["user-anchors", 1].clear()
    centres = unit(world.rng, 2)
    for n, item in enumerate(world.items):
        vector = centres[n % 2] + 0.1 * unit(world.rng, 1)[0]
        world.put_item(item, (vector / np.linalg.norm(vector)).astype(np.float32))
    for user in world.users:
        for n in range(80):
            item = world.items[int(world.rng.integers(20)) * 2 + (n >= 40)]
            world.send([Feedback(f"{user}-{n}", user, item, START + n * 5_000, "click")])
    items = Items(world.log).catalogue
    answered: set[tuple[str, int]] = set()
    while True:
        new = [(user, request) for user, request, _ in folded(world, items) if (user, request.ts) not in answered]
        if not new:
            return world
        user, request = min(new, key=lambda pair: pair[1].ts)
        answered.add((user, request.ts))
        vectors = items.lookup(request.positives[-3:])[1]
        world.put_anchors(user, request.ts, request.sequence, 3, vectors=np.asarray(vectors, "<f4").tobytes())
        world.log.put("anchor-requests", user, encode(request))


def folded(world: World, items: Any) -> list[tuple[str, AnchorRequest, bool]]:
    found = []
    for partition in (0, 1):
        anchors = AnchorHistory(world.log, partition)
        for user, clicks in _clicks(world.log, partition, EVERYTHING, 10**6).items():
            made = _fold(user, clicks, anchors, PROFILES, 50, lambda item: items.lookup([item])[1][0], DIM)
            found += [(user, *one) for one in made]
    return found


def test_the_settings_in_force_ask_for_what_is_on_the_log():
    said = asked(refreshing(), "threshold=0.3").document["refreshes"]
    assert said["recorded"] == said["in_force"] == said["asked"]
    assert said["reproduced"] == said["recorded_total"] > 2
    assert said["recorded"]["cold"] == 2 and said["recorded"]["drift"] >= 2
    assert (said["more"], said["fewer"], said["estimated"]) == (0, 0, 0)


def test_a_threshold_that_is_never_met_leaves_only_the_cold_starts():
    world = refreshing()
    said = asked(world, "threshold=1000").document["refreshes"]
    assert said["asked"] == {"cold": 2}
    assert said["fewer"] == said["recorded"]["drift"] and said["more"] == 0
    assert {one["change"] for one in said["examples"]} == {"fewer"}
    later = Selection(START + 100_000, EVERYTHING.to_ms)
    assert "cold" not in asked(world, "threshold=1000", selection=later).document["refreshes"]["asked"]


def test_refreshes_that_were_never_made_are_counted_as_estimates():
    said = asked(refreshing(), "profiles.max_age_seconds=60").document["refreshes"]
    assert said["asked"]["stale"] > 0
    assert said["more"] > 0 and said["estimated"] > 0
    assert said["users_changed"] == 2
