"""Trained methods to compare with: how each one's step differs. All share the pre-ranker and its optimizer."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gpl.evaluation.anchors import AnchorSpec, Generator
from gpl.evaluation.bench import Bench, Source
from gpl.evaluation.dataset import Floats, Ints
from gpl.evaluation.judge import Scores
from gpl.evaluation.pairs import Columns, Pairs
from gpl.evaluation.ranker import teach
from gpl.evaluation.training import Step, train
from gpl.labels.labeller import Config, Matching
from gpl.preranker.batch import Batch
from gpl.preranker.learner import Learner
from gpl.preranker.loss import LossConfig

_SMOOTHING = 5.0
_TEACHERS = 3


def exposed_only(bench: Bench, generator: Generator | None, matching: Matching = "max") -> Scores:
    """Cross-entropy on what was exposed, nothing else. ``generator`` and ``matching`` (here and below): whose
    anchor score the model has as its cross input, and how it is made; None: it does without."""

    def step(learner: Learner, batch: Batch, _: Ints) -> None:
        batch = batch.exposed_only()
        if len(batch.request):
            learner.update(_cross_entropy(learner, batch, bench.world.vectors).mean())

    return _fit(bench, "recalled", *_inputs(bench, generator, matching, "recalled"), step)


def negatives(
    bench: Bench, generator: Generator | None, weight: float, source: Source, matching: Matching = "max"
) -> Scores:
    """Unexposed items as negatives, with the log-odds correction (Yi et al. 2019; Monolith).

    Item i is a negative with probability Q(i), so the trained logit would be that of p(i|u) / Q(i): log Q(i) is taken
    off while training, and what is learnt is log p(i|u) up to a constant.
    """
    columns, scores_of = _inputs(bench, generator, matching, source)
    log_q = sampling(bench.pairs(source), bench.world.n_items, weight, bench.train_config.hidden)

    def step(learner: Learner, batch: Batch, _: Ints) -> None:
        shift = log_q[batch.item_row[batch.item] - 1]
        terms = _cross_entropy(learner, batch, bench.world.vectors, shift=shift)
        learner.update(with_negatives(terms, torch.from_numpy(batch.exposed), weight))

    return _fit(bench, source, columns, scores_of, step)


def sampling(pairs: Pairs, n: int, weight: float, hidden: int) -> Floats:
    """(n,) log Q: of each item's mass as a negative in the loss of :func:`with_negatives`, relative to the mean item's.

    In units of an exposed pair an unexposed one has the mass ``weight`` E / U, for E exposed pairs and the U unexposed
    ones that an epoch takes, at most ``hidden`` of a request: each counts by how likely it is taken.
    """
    sizes = np.diff(pairs.offsets)
    taken = np.repeat(np.minimum(1.0, hidden / np.maximum(sizes - pairs.shown, 1)), sizes) * ~pairs.exposed
    unexposed = weight * pairs.exposed.sum() / max(taken.sum(), 1.0) * taken
    mass = np.where(pairs.exposed, 1.0 - pairs.clicked, unexposed)
    counts = np.bincount(pairs.item, mass, minlength=n) + _SMOOTHING
    log_q: Floats = np.log(counts / counts.mean()).astype(np.float32)
    return log_q


def with_negatives(terms: Tensor, exposed: Tensor, weight: float) -> Tensor:
    """Mean of the exposed pairs' ``terms`` (P,) and ``weight`` times that of the others'; ``exposed`` (P,)."""
    total = terms[exposed].mean()
    return total if exposed.all() else total + weight * terms[~exposed].mean()


def inverse_propensity(bench: Bench, generator: Generator | None, clip: float, matching: Matching = "max") -> Scores:
    """Exposed pairs weighted by the inverse of their item's propensity, self-normalised (Schnabel et al. 2016).

    The propensity is the item's share of all exposures; weights are clipped at ``clip`` times the least one.
    """
    columns, scores_of = _inputs(bench, generator, matching, "recalled")
    shown = np.bincount(bench.world.log.exposed.values, minlength=bench.world.n_items) + 1.0
    weight_of = np.minimum(shown.max() / shown, clip).astype(np.float32)

    def step(learner: Learner, batch: Batch, _: Ints) -> None:
        batch = batch.exposed_only()
        if len(batch.request) == 0:
            return
        weight = torch.from_numpy(weight_of[batch.item_row[batch.item] - 1])
        terms = _cross_entropy(learner, batch, bench.world.vectors)
        learner.update((terms * weight).sum() / weight.sum())

    return _fit(bench, "recalled", columns, scores_of, step)


def distillation(
    bench: Bench, generator: Generator | None, weight: float, matching: Matching = "max", source: Source = "recalled"
) -> Scores:
    """The probabilities of a ranker trained on exposures are the labels of what was not exposed."""
    return _taught(bench, generator, matching, weight, source, teachers=1)


def self_training(
    bench: Bench, generator: Generator | None, weight: float, matching: Matching = "max", source: Source = "recalled"
) -> Scores:
    """Distillation from several rankers, and the less they agree, the less a label weighs.

    After UKD (Yan et al. 2022): weight exp(-KL), the mean divergence of the rankers from their mean.
    """
    return _taught(bench, generator, matching, weight, source, teachers=_TEACHERS)


def _taught(
    bench: Bench, generator: Generator | None, matching: Matching, weight: float, source: Source, teachers: int
) -> Scores:
    columns, scores_of = _inputs(bench, generator, matching, source)
    seeds = [bench.seed * _TEACHERS + t for t in range(teachers)]
    every = np.stack([teach(bench.world, bench.pairs(source), columns.score, seed) for seed in seeds])
    label = every.mean(axis=0).astype(np.float32)
    confidence = np.exp(-_divergence(every, label)).astype(np.float32)

    def step(learner: Learner, batch: Batch, _: Ints) -> None:
        target = np.where(batch.exposed, batch.clicked, batch.label)
        terms = _cross_entropy(learner, batch, bench.world.vectors, target)
        exposed = torch.from_numpy(batch.exposed)
        total = terms[exposed].mean()
        if not batch.exposed.all():
            certainty = torch.from_numpy(batch.confidence)[~exposed]
            total = total + weight * (terms[~exposed] * certainty).sum() / certainty.sum()
        learner.update(total)

    return _fit(bench, source, Columns(columns.score, label, confidence), scores_of, step)


def _divergence(every: Floats, mean: Floats) -> Floats:
    """(P,) mean Kullback-Leibler divergence, in nats, of Bernoulli probabilities (T, P) from their mean (P,)."""
    p, m = np.clip(every.astype(np.float64), 1e-6, 1 - 1e-6), np.clip(mean.astype(np.float64), 1e-6, 1 - 1e-6)
    result: Floats = (p * np.log(p / m) + (1 - p) * np.log((1 - p) / (1 - m))).mean(axis=0)
    return result


def _inputs(
    bench: Bench, generator: Generator | None, matching: Matching, source: Source
) -> tuple[Columns, Scores | None]:
    if generator is None:
        return blank(bench.pairs(source)), None
    labels, scores_of = bench.labels(AnchorSpec(generator), Config(matching), source)
    zeros = np.zeros_like(labels.score)
    return Columns(labels.score, zeros, zeros), scores_of


def blank(pairs: Pairs) -> Columns:
    """Columns without any anchor score or label."""
    n = len(pairs.item)
    return Columns(np.full(n, np.nan, np.float32), np.zeros(n, np.float32), np.zeros(n, np.float32))


def _cross_entropy(
    learner: Learner, batch: Batch, content: Floats, target: Floats | None = None, shift: Floats | None = None
) -> Tensor:
    """(P,) cross-entropy of the model's logits, less ``shift`` (P,), with ``target`` (P,), the clicks where None."""
    learner.model.observe(batch.score)
    logits = learner.model(batch, content).full
    if shift is not None:
        logits = logits - torch.from_numpy(shift)
    labels = torch.from_numpy(batch.clicked if target is None else target)
    return F.binary_cross_entropy_with_logits(logits, labels, reduction="none")


def _fit(bench: Bench, source: Source, columns: Columns, scores_of: Scores | None, step: Step) -> Scores:
    # The loss is the step's own; the learner's is not asked.
    loss, pairs = LossConfig(), bench.pairs(source)
    return train(
        bench.world, pairs, columns, scores_of, step, loss, bench.train_config, bench.seed, bench.validation
    ).scores
