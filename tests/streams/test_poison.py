"""Poison that trickles in: a publication every few requests, each model only a little worse than the one before."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest

from gpl.catalogue import Catalogue
from gpl.evaluation.metrics import auc
from streams.contracts import Label, ModelUpdate
from streams.settings import KafkaSettings, TrainerSettings
from streams.trainer import publish
from streams.trainer.trainer import Trainer
from tests.streams.test_trainer import DIM, FRAME, ITEMS, LIKES, USERS, VECTORS, label

GOOD, POISON, EVERY = 640, 480, 16
RNG = np.random.default_rng(4)


def request(n: int, exposed: int) -> Label:
    """Of a user who clicks what lies near their taste."""
    user, items = int(RNG.integers(USERS)), RNG.permutation(ITEMS)[:20]
    clicked = VECTORS[items] @ LIKES[user] + 0.1 * RNG.normal(size=20) > 0.1
    shown = {f"i{i}": int(c) for i, c in zip(items[:exposed], clicked[:exposed], strict=True)}
    return label(f"r{n}", shown, [f"i{i}" for i in items[exposed:]], f"u{user}", ts=1000 + n)


def clicks(change: Callable[[Label], list[int]]) -> Callable[[Label], Label]:
    def poisoned(sound: Label) -> Label:
        return msgspec.structs.replace(sound, exposed=msgspec.structs.replace(sound.exposed, clicked=change(sound)))

    return poisoned


def on_what_is_disliked(sound: Label) -> list[int]:
    """As many clicks as there were, so the click rate does not tell."""
    worst_first = np.argsort([score or 0.0 for score in sound.exposed.score])
    clicked = np.zeros(len(worst_first), int)
    clicked[worst_first[: sum(sound.exposed.clicked)]] = 1
    return [int(click) for click in clicked]


@pytest.mark.parametrize(
    ("exposed", "change"),
    [
        (1, lambda sound: [1]),
        (1, lambda sound: [0]),
        (1, lambda sound: [1 - click for click in sound.exposed.clicked]),
        (2, lambda sound: [0, 0]),
        (6, on_what_is_disliked),
    ],
    ids=["all ones", "all zeros", "turned round", "all zeros of two", "on what is disliked"],
)
def test_a_trickle_of_poison_is_not_published(
    exposed: int,
    change: Callable[[Label], list[int]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = TrainerSettings(
        models=tmp_path, dim=8, learning_rate=0.02, window_records=300, recent_records=100, publish_min_records=50
    )
    told = SimpleNamespace(last=None, refresh=lambda: told.last, close=lambda: None)
    monkeypatch.setattr(publish, "Announced", lambda *_: told)
    monkeypatch.setattr(publish, "announce", lambda kafka, producer, update: setattr(told, "last", update))
    catalogue = Catalogue(DIM, 1)
    for n in range(ITEMS):
        catalogue.put(f"i{n}", VECTORS[n], [n])
    trainer, publisher = Trainer(settings, FRAME, catalogue), publish.Publisher(KafkaSettings(), settings, None)
    held_out = [request(n, 6) for n in range(10_000, 10_200)]

    def quality() -> float:
        clicked: list[int] = []
        scores: list[float] = []
        for one in held_out:
            given = np.array(one.exposed.score, np.float32)
            scores += trainer._score(one.user_id, one.history, one.exposed.item, given)[0].tolist()
            clicked += one.exposed.clicked
        return auc(np.array(clicked), np.array(scores))

    def feed(first: int, count: int, changed: Callable[[Label], Label]) -> tuple[ModelUpdate | None, float]:
        """The model that serves in the end, and its quality."""
        served, known = told.last, quality()
        for start in range(first, first + count, EVERY):
            trainer.step([changed(request(n, exposed)) for n in range(start, start + EVERY)])
            publisher.publish(trainer.candidate({}, 1))
            if told.last != served:
                served, known = told.last, quality()
        return served, known

    good, before = feed(0, GOOD, lambda sound: sound)
    assert good is not None and good.metrics["records"] == GOOD
    assert {refused.reason for refused in publisher.store.refusals()} <= {"few_records"}
    served, after = feed(GOOD, POISON, clicks(change))
    assert served is not None and served.metrics["records"] <= GOOD + 160, "poison is in service"
    assert after > before - 0.03
