"""Methods on planted worlds: labels help where content says what users like, and shuffled ones have no say."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from gpl.evaluation import generative
from gpl.evaluation.anchors import AnchorSpec, Cases, make_anchors, refreshed
from gpl.evaluation.baselines import sampling, with_negatives
from gpl.evaluation.bench import Bench
from gpl.evaluation.dataset import Ragged, Requests
from gpl.evaluation.generative import Parts, Pseudo, evidence, gpl, mixed_labels
from gpl.evaluation.methods import BY_NAME, METHODS, Method
from gpl.evaluation.pairs import Columns, Pairs
from gpl.evaluation.reliability import reliability
from gpl.evaluation.training import TrainConfig, histories, one_thread
from gpl.labels.labeller import Config
from tests.gpl.evaluation import planted
from tests.gpl.evaluation.test_world import world

one_thread()
TRAIN = TrainConfig(dim=16, epochs=6, patience=6, hidden=15)  # an epoch is nine steps: HR@10 may first fall


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(world(planted.events(360)), tmp_path_factory.mktemp("anchors"), TRAIN)


def hits(bench: Bench, parts: Parts) -> tuple[float, float]:
    outcome = bench.test.judge(gpl(bench, parts))
    return outcome.mean("hr@10"), outcome.mean("auc")


def test_labels_help_where_content_says_what_users_like(bench: Bench) -> None:
    parts = Parts(generator="history", negatives=0.0)
    with_labels, with_auc = hits(bench, parts)
    without, without_auc = hits(bench, replace(parts, weight=0.0))
    assert with_labels > 1.15 * without
    assert with_auc > without_auc


def test_anchors_of_other_users_change_nothing(bench: Bench) -> None:
    """Evidence finds none in them, so every step equals one without pseudo-labels."""
    parts = Parts(generator="history", shuffled=True)
    users = bench.test.users[:50]
    assert np.array_equal(gpl(bench, parts)(users), gpl(bench, replace(parts, weight=0.0))(users))


def test_evidence_tells_true_anchors_from_shuffled_and_random_ones(bench: Bench) -> None:
    weights = {}
    for spec in (AnchorSpec("history"), AnchorSpec("history", shuffled=True), AnchorSpec("random")):
        labels, _ = bench.labels(spec, Config(), "recalled")
        pairs = bench.pairs("recalled")
        kept = pairs.exposed | ~np.isnan(labels.score)
        weights[spec] = evidence(pairs.keep(kept), labels.score[kept]).weight
    true, shuffled, random = weights.values()
    assert true > 0.9 and shuffled == random == 0.0


def test_labels_that_are_flat_say_nothing_of_taste(bench: Bench) -> None:
    """The same mass of unexposed candidates, without the anchors' order among them."""
    users = bench.test.users[:50]

    def personal(sharpness: Literal["full", "effect", "flat"]) -> float:
        scores = gpl(bench, Parts(generator="history", sharpness=sharpness, weight=10.0))(users)
        return float(np.std(scores - scores.mean(axis=0), axis=1).mean())

    assert personal("flat") < 0.9 * min(personal("effect"), personal("full"))


def test_pointwise_labels_carry_the_anchors_order_and_what_feedback_says_of_items(bench: Bench) -> None:
    labels, _ = bench.labels(AnchorSpec("history"), Config(), "recalled")
    pairs = bench.pairs("recalled")
    mixed = mixed_labels(pairs, labels.score, labels.label)
    flat = mixed_labels(pairs, np.full_like(labels.score, np.nan), labels.label)
    request = pairs.request
    hidden = np.flatnonzero(~pairs.exposed & ~np.isnan(labels.score))
    of_item = pairs.item[hidden]

    def within(values: np.ndarray) -> np.ndarray:
        """Log-odds less their request's mean."""
        logits = np.log(values[hidden] / (1 - values[hidden]))
        sums = np.bincount(request[hidden], logits) / np.maximum(np.bincount(request[hidden]), 1)
        return logits - sums[request[hidden]]

    clicks = np.bincount(pairs.item[pairs.exposed], pairs.clicked[pairs.exposed], minlength=bench.world.n_items)
    rate = clicks / np.maximum(np.bincount(pairs.item[pairs.exposed], minlength=bench.world.n_items), 1)
    assert np.corrcoef(within(flat), rate[of_item])[0, 1] > 0.5
    assert (
        np.corrcoef(within(mixed), labels.score[hidden])[0, 1]
        > np.corrcoef(within(flat), labels.score[hidden])[0, 1] + 0.3
    )


@pytest.mark.parametrize("pseudo", ["pointwise", "paper", "feedback"])
def test_which_labels_follow_evidence(bench: Bench, pseudo: Pseudo) -> None:
    """Anchors of other users have none: ours fall silent, the paper's and those without anchors do not."""
    parts = Parts(generator="history", shuffled=True, pseudo=pseudo, negatives=0.2)
    users = bench.test.users[:50]
    same = np.array_equal(gpl(bench, parts)(users), gpl(bench, replace(parts, weight=0.0))(users))
    assert same == (pseudo == "pointwise")


def test_flat_pointwise_labels_are_of_user_and_item_alone(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    class Found(Exception):
        """Labels, before anything is trained on them."""

    def found(_: object, pairs: Pairs, columns: Columns, *__: object) -> None:
        raise Found(pairs, columns)

    def unexplained(sharpness: Literal["full", "flat"]) -> float:
        """The largest part of some labels' log-odds that is not a sum of one number of the user and one of the item."""
        with pytest.raises(Found) as caught:
            gpl(bench, Parts(generator="history", pseudo="pointwise", sharpness=sharpness, negatives=0.0))
        pairs, columns = caught.value.args
        some = np.flatnonzero(~pairs.exposed)[:3000]
        user, item = pairs.user[pairs.request][some], pairs.item[some]
        design = np.zeros((len(some), bench.world.n_users + bench.world.n_items))
        design[np.arange(len(some)), user] = design[np.arange(len(some)), bench.world.n_users + item] = 1.0
        label = columns.label[some].astype(np.float64)
        logits = np.log(label / (1 - label))
        return float(np.abs(logits - design @ np.linalg.lstsq(design, logits, rcond=None)[0]).max())

    monkeypatch.setattr(generative, "train", found)
    assert unexplained("flat") < 1e-3 < 0.1 < unexplained("full")


BASELINES = [m for m in METHODS if m.group in ("untrained", "no pseudo-labels", "pseudo-labels")]


@pytest.mark.parametrize("method", BASELINES, ids=lambda method: method.name)
def test_every_baseline_beats_chance_on_a_planted_world(bench: Bench, method: Method) -> None:
    settings = {**method.settings, **{name: values[0] for name, values in method.grid.items()}}
    if settings.get("generator") == "small-lm":
        settings["generator"] = "history"
    scores = method.run(bench, **settings)
    matrix = scores(bench.test.users[:9])
    assert matrix.shape == (9, bench.world.n_items) and np.isfinite(matrix).all()
    outcome = bench.test.judge(scores)
    # Exposures of what is popular may teach nothing of the rest, but must teach something of themselves.
    assert max(outcome.mean("auc"), outcome.mean("exposed_auc")) > 0.52


@pytest.mark.parametrize("weight", [0.3, 1.0, 3.0])
@pytest.mark.parametrize("hidden", [6, 60])
def test_corrected_negatives_learn_what_is_clicked_whatever_is_shown_or_recalled(weight: float, hidden: int) -> None:
    """A logit for each item in the model's place, full batch: log p up to a constant. The policy shows some items much
    more than it leaves others unexposed, so that both kinds of negatives must have their right mass."""
    rng, n, requests = np.random.default_rng(0), 12, 4_000
    p = rng.dirichlet(np.ones(n) * 2)
    shown_by, recalled_by = np.arange(1.0, n + 1) ** 1.5, np.arange(1.0, n + 1)[::-1] ** 1.5
    clicks = rng.choice(n, requests, p=p)
    exposed, recalled = [], []
    for click in clicks.tolist():
        others = rng.choice(n, 2, replace=False, p=shown_by / shown_by.sum())
        exposed.append(np.concatenate([[click], others[others != click]]))
        recalled.append(rng.choice(n, int(rng.integers(4, 12)), p=recalled_by / recalled_by.sum()))  # may repeat
    clicked = np.concatenate([np.arange(len(row)) == 0 for row in exposed])
    pairs = Pairs.of(Requests(np.zeros(requests, dtype=np.int64), Ragged.of(exposed), clicked, Ragged.of(recalled)))
    # What an epoch takes is drawn; over many epochs each pair counts by how often it is.
    at = np.concatenate([pairs.of_requests(np.arange(requests), hidden, rng)[0] for _ in range(4)])
    item, mask = torch.from_numpy(pairs.item[at]), torch.from_numpy(pairs.exposed[at])
    log_q = torch.from_numpy(sampling(pairs, n, weight, hidden))
    table = torch.zeros(n, requires_grad=True)
    optimiser = torch.optim.LBFGS([table], max_iter=300, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimiser.zero_grad()
        target = torch.from_numpy(pairs.clicked[at])
        terms = binary_cross_entropy_with_logits((table - log_q)[item], target, reduction="none")
        total = with_negatives(terms, mask, weight)
        total.backward()  # type: ignore[no-untyped-call]
        return total

    optimiser.step(closure)  # type: ignore[no-untyped-call]
    found = table.detach().numpy() - np.log(np.bincount(clicks, minlength=n))
    assert np.ptp(found) < 0.03


def test_training_is_a_function_of_the_seed(bench: Bench) -> None:
    parts, users = Parts(generator="history"), bench.test.users[:20]
    first, again = gpl(bench, parts)(users), gpl(bench, parts)(users)
    other = gpl(Bench(replace(bench.world, seed=1), None, TRAIN), parts)(users)
    assert np.array_equal(first, again) and not np.array_equal(first, other)


def test_small_lm_anchors_are_made_crosswise_and_kept_on_disk(tmp_path: Path) -> None:
    made = world(planted.events(80, length=5))
    bench = Bench(made, tmp_path, TRAIN)
    sets = bench.anchors(AnchorSpec("small-lm", beams=4))
    assert len(list(tmp_path.iterdir())) == 1
    assert (sets.index[bench.cases.known > 0] >= 0).any(axis=1).all()
    assert not (sets.index[bench.cases.known == 0] >= 0).any()
    again = Bench(made, tmp_path, TRAIN).anchors(AnchorSpec("small-lm", beams=4))
    assert np.array_equal(sets.table, again.table) and np.array_equal(sets.index, again.index)
    fresh = make_anchors(made, Cases(made), AnchorSpec("small-lm", beams=4), 0)
    assert np.array_equal(sets.index, fresh.index)


def test_anchors_are_refreshed_as_positives_grow_by_half() -> None:
    assert refreshed(np.arange(14)).tolist() == [0, 1, 2, 3, 3, 5, 5, 5, 8, 8, 8, 8, 12, 12]


def test_settings_are_searched_one_after_the_other() -> None:
    asked: list[tuple[int, str]] = []

    def score(settings: dict[str, object]) -> float:
        asked.append((settings["a"], settings["b"]))  # type: ignore[arg-type]
        return {(1, "x"): 0.1, (2, "x"): 0.3, (2, "y"): 0.2}[asked[-1]]

    method = Method("m", "M", "gpl", lambda: None, {"a": (1, 2), "b": ("x", "y")}, settings={"c": 0})  # type: ignore[arg-type, return-value]
    assert method.tuned({}, score) == {"a": 2, "b": "x", "c": 0}
    assert asked == [(1, "x"), (2, "x"), (2, "y")]
    assert all(m.like is None or m.like in BY_NAME for m in METHODS)


def test_the_best_of_several_starts_is_taken() -> None:
    """From (0, 0) no single step leads uphill to (1, 1)."""
    hills = {(0, 0): 0.2, (1, 0): 0.1, (0, 1): 0.1, (1, 1): 0.3}
    grid = {"a": (0, 1), "b": (0, 1)}
    for starts, best in ((({},), (0, 0)), (({}, {"a": 1, "b": 1}), (1, 1)), (({"a": 1, "b": 1}, {}), (1, 1))):
        method = Method("m", "M", "gpl", lambda: None, grid, starts=starts)  # type: ignore[arg-type, return-value]
        chosen = method.tuned({"a": 0, "b": 0}, lambda s: hills[s["a"], s["b"]])
        assert (chosen["a"], chosen["b"]) == best


def test_confidence_bins_cover_what_labels_call_good(bench: Bench) -> None:
    bins = reliability(bench, {"generator": "history"})
    mixed = reliability(bench, {"generator": "history", "pseudo": "pointwise"})
    assert [one["relevant"] for one in mixed] == [one["relevant"] for one in bins]
    assert [one["label"] for one in mixed] != [one["label"] for one in bins]
    assert len(bins) == 10
    confidence = [one["confidence"] for one in bins]
    assert confidence == sorted(confidence)
    assert sum(one["pairs"] for one in bins) == 20 * len(bench.test.users)
    assert all(0 <= one["relevant"] <= 1 and 0 <= one["label"] <= 1 for one in bins)


def test_a_batch_of_pairs_keeps_the_exposed_and_some_of_the_others(bench: Bench) -> None:
    pairs = Pairs.of(bench.world.log)
    requests = np.arange(len(pairs))
    at, owner = pairs.of_requests(requests, 7, np.random.default_rng(0))
    assert len(np.unique(at)) == len(at)
    exposed = pairs.exposed[at]
    assert np.array_equal(np.bincount(owner[exposed], minlength=len(pairs)), pairs.shown)
    assert (np.bincount(owner[~exposed], minlength=len(pairs)) <= 7).all()
    everything, _ = pairs.of_requests(requests, None, np.random.default_rng(0))
    assert np.array_equal(everything, np.arange(len(pairs.item)))


def test_which_of_the_others_a_batch_keeps_does_not_hang_on_their_order() -> None:
    """Recalled items are often in the order of the catalogue: a run of them would be alike."""
    log = Requests(np.zeros(2, np.int64), Ragged.of([[0], [0]]), np.array([True, False]), Ragged.of([range(1, 41)] * 2))
    pairs, rng = Pairs.of(log), np.random.default_rng(0)
    together = np.zeros((41, 41))
    for _ in range(2_000):
        at, owner = pairs.of_requests(np.array([1, 0]), 10, rng)
        kept = pairs.item[at[owner == 0]]
        assert len(kept) == 11 and kept[0] == 0
        together[np.ix_(kept, kept)] += 1
    apart = [together[a, b] / 2_000 for a, b in ((1, 2), (1, 40), (7, 30))]
    assert apart == pytest.approx([10 * 9 / (40 * 39)] * 3, abs=0.02)


def test_an_item_without_content_has_no_anchor_score_and_no_label() -> None:
    made = world(planted.events(60))
    bare = int(np.bincount(made.positives.values).argmax())
    vectors = made.vectors.copy()
    vectors[bare] = 0.0
    bench = Bench(replace(made, vectors=vectors, raw=vectors), None, TRAIN)
    spec, pairs = AnchorSpec("history"), bench.pairs("recalled")
    labels, scores_of = bench.labels(spec, Config(), "recalled")
    has_anchors = ~np.isnan(labels.score)
    assert (pairs.item == bare).any() and not has_anchors[pairs.item == bare].any() and has_anchors.any()
    assert not labels.confidence[pairs.item == bare].any()
    users = bench.test.users
    assert np.isnan(scores_of(users)[:, bare]).all()
    alone = BY_NAME["anchor-history"].run(bench, generator="history")(users)
    assert np.isfinite(alone).all() and (alone.argmin(axis=1) == bare).all()
    assert bare not in np.concatenate(histories(bench.world))
    assert np.isfinite(gpl(bench, Parts(generator="history"))(users)).all()


def test_too_few_users_for_a_language_model_have_history_clusters() -> None:
    made = world(planted.events(16))
    cases = Cases(made)
    lm, clusters = (make_anchors(made, cases, spec, 0) for spec in (AnchorSpec("small-lm"), AnchorSpec("history")))
    assert np.array_equal(lm.index, clusters.index) and np.array_equal(lm.table, clusters.table)
