"""Evidence by source of the scores: a change of the generator must not pass for a knowledge of tastes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from gpl.labels.evidence import Evidence
from gpl.preranker.batch import Batch
from streams.trainer.evidence import SOURCES, SourcedEvidence

ITEMS, CANDIDATES, SHOWN, REQUESTS = 300, 40, 8, 32
_POPULARITY = np.random.default_rng(0).pareto(1.2, ITEMS) + 0.1
_LOG = np.log(_POPULARITY)
TASTE = np.random.default_rng(1).normal(size=(1_000, ITEMS)) / 5


def batch(rng: np.random.Generator, kind: str) -> Batch:
    """Requests whose clicks follow popularity and taste. Scores: ``none`` knows neither, ``popular`` popularity alone,
    ``taste`` what its user likes."""
    users = rng.integers(len(TASTE), size=REQUESTS)
    rows, scores, shown, clicks = [], [], [], []
    for user in users:
        row = rng.choice(ITEMS, CANDIDATES, replace=False)
        weight = _POPULARITY[row] / _POPULARITY[row].sum()
        exposed = np.zeros(CANDIDATES, bool)
        exposed[rng.choice(CANDIDATES, SHOWN, replace=False, p=weight)] = True
        chance = 1 / (1 + np.exp(1.0 - _LOG[row] - 5 * TASTE[user, row]))
        noise = 0.1 * rng.normal(size=CANDIDATES)
        scores.append(noise + {"none": 0.0, "popular": 0.2 * _LOG[row], "taste": TASTE[user, row]}[kind])
        rows.append(row + 1)
        shown.append(exposed)
        clicks.append((rng.random(CANDIDATES) < chance) & exposed)
    item_row, exposed = np.concatenate(rows), np.concatenate(shown)
    hidden = int(np.count_nonzero(~exposed))
    return Batch.of(
        user_row=users + 1,
        history=np.zeros(0, np.int64),
        history_request=np.zeros(0, np.int64),
        item_row=item_row,
        content_row=np.full(len(item_row), -1),
        request=np.repeat(np.arange(REQUESTS), CANDIDATES),
        exposed=exposed,
        score=np.concatenate(scores).astype(np.float32),
        clicked=np.concatenate(clicks)[exposed].astype(np.float32),
        label=np.zeros(hidden, np.float32),
        confidence=np.ones(hidden, np.float32),
    )


def fed(evidence: SourcedEvidence, seed: int, *parts: tuple[str, str, int]) -> SourcedEvidence:
    """Observe parts of (source, kind of scores, batches)."""
    rng = np.random.default_rng(seed)
    for source, kind, count in parts:
        for _ in range(count):
            evidence.observe(batch(rng, kind), [source] * REQUESTS)
    return evidence


def test_a_change_to_a_generator_that_knows_only_popularity_lets_no_labels_through():
    change = [("a", "none", 80), ("b", "popular", 80)]
    assert fed(SourcedEvidence(), 0, *change).read(["b"]).weight == 0.0
    # What one evidence for both would have said: the test can fail.
    assert fed(SourcedEvidence(), 0, *[("a", kind, n) for _, kind, n in change]).read(["a"]).weight > 0.1


def test_a_batch_has_the_weight_of_its_weakest_source():
    evidence = fed(SourcedEvidence(), 1, ("good", "taste", 80), ("useless", "none", 80))
    assert evidence.read(["good", "", "good"]).weight > 0.1
    assert evidence.read(["good", "useless"]).weight == evidence.read(["good", "new"]).weight == 0.0
    assert evidence.read([""]) == evidence.read() == evidence.read(["useless"])
    assert SourcedEvidence().read([]).weight == 0.0


def test_a_mixed_batch_teaches_each_source_what_its_own_requests_would():
    rng = np.random.default_rng(2)
    mixed, first = SourcedEvidence(), Evidence()
    for _ in range(20):
        made = batch(rng, "taste")
        sources = [("a", "b", "")[n % 3] for n in range(REQUESTS)]
        mixed.observe(made, sources)
        own = np.array(sources) == "a"
        pairs = own[made.request]
        renumbered = np.searchsorted(np.flatnonzero(own), made.request[pairs])
        rows = made.item_row[made.item][pairs]
        first.observe(made.user_row[own], rows, renumbered, made.score[pairs], made.exposed[pairs], made.clicked[pairs])
    assert mixed.read(["a"]) == first.read()
    assert mixed.read(["b"]) != mixed.read(["a"])


@pytest.mark.parametrize("forgotten", [[], [3, 5]])
def test_state_goes_on_bit_for_bit(forgotten: Sequence[int]):
    parts = [("a", "taste", 10), ("b", "none", 10), ("a", "taste", 10)]
    whole = fed(SourcedEvidence(), 3, *parts)
    whole.forget(np.array(forgotten, np.int64))
    resumed = SourcedEvidence()
    resumed.restore(*whole.state())
    for each in (whole, resumed):
        fed(each, 4, *parts)
    names, tensors = whole.state()
    again, others = resumed.state()
    assert names == again == ["b", "a"]
    assert all(tensors[name].equal(others[name]) for name in tensors) and tensors.keys() == others.keys()


def test_a_checkpoint_without_names_goes_to_the_first_source_that_comes():
    plain = fed(SourcedEvidence(), 5, ("a", "taste", 80))
    _, tensors = plain.state()
    resumed = SourcedEvidence()
    resumed.restore(None, {name.removeprefix("0."): tensor for name, tensor in tensors.items()})
    assert resumed.read() == resumed.read(["a"]) == plain.read()
    for each in (plain, resumed):
        fed(each, 6, ("a", "taste", 5))
    assert resumed.read(["a"]) == plain.read(["a"]) and resumed.read(["b"]).weight == 0.0


def test_the_sources_used_last_are_kept():
    evidence = fed(SourcedEvidence(), 7, *[(f"s{n}", "taste", 1) for n in range(SOURCES)], ("s0", "taste", 1))
    fed(evidence, 8, ("new", "taste", 1))
    assert evidence.state()[0] == [*(f"s{n}" for n in range(2, SOURCES)), "s0", "new"]
