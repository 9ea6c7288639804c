"""Generative pseudo-labelling as the product does it: labels, evidence, joint loss. And its parts taken away."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from gpl.evaluation.anchors import AnchorSpec, Generator
from gpl.evaluation.bench import Bench, Source
from gpl.evaluation.dataset import Floats, Ints
from gpl.evaluation.judge import Scores
from gpl.evaluation.pairs import Columns, Pairs
from gpl.evaluation.training import train
from gpl.labels.evidence import Evidence, Reading
from gpl.labels.labeller import Config, Matching
from gpl.labels.mixed import MixedCalibration
from gpl.preranker.batch import Batch
from gpl.preranker.learner import Learner
from gpl.preranker.loss import LossConfig

_CHUNK = 256
"""Requests that are read at a time: evidence judges a request by what earlier chunks told of its items."""

SOURCE = "anchors"
"""Of a study's scores, as the calibration names it."""

_FLAT = 1e-6
"""Log-odds a standard deviation of the anchor score: a step must be above 0."""

Pseudo = Literal["listwise", "personal", "pointwise", "paper", "feedback"]
"""How pseudo-labels teach: by the order of a request's candidates; the same of taste alone (``personal`` in
`LossConfig`); each by itself, calibrated for its user and item (`MixedCalibration`); as in the paper, each by itself,
calibrated by the anchor score alone, whatever the evidence; or each by itself by what feedback says of user and item,
without anchors, their evidence or their confidence: a rival."""


@dataclass(frozen=True)
class Parts:
    """What of GPL is on. ``weight``: lambda; ``negatives``, ``form``, ``source``: their weight, loss and where they are
    from. ``sharpness`` of listwise labels: a standard deviation of the anchor score is worth one unit of log-odds
    (full), what the evidence bears out (effect), or next to nothing, whoever the anchors are for (flat). Pointwise ones
    are as sharp as feedback says; flat, they are calibrated without the score. ``matching`` as in the labeller. A
    factor of confidence that is False is left out."""

    generator: Generator = "small-lm"
    matching: Matching = "max"
    weight: float = 1.0
    negatives: float = 1.0
    form: Literal["softmax", "pointwise"] = "softmax"
    source: Source = "recalled"
    pseudo: Pseudo = "listwise"
    sharpness: Literal["full", "effect", "flat"] = "full"
    centred: bool = True
    downsample: bool = True
    near_history: bool = True
    shuffled: bool = False
    dispersion: bool = True
    history: bool = True
    generation: bool = True

    @property
    def spec(self) -> AnchorSpec:
        return AnchorSpec(
            self.generator,
            centred=self.centred,
            downsample=self.downsample or self.generator != "small-lm",
            near_history=self.near_history or self.generator != "small-lm",
            shuffled=self.shuffled,
        )

    @property
    def labelling(self) -> Config:
        return Config(self.matching, dispersion=self.dispersion, history=self.history, generation=self.generation)


def gpl(bench: Bench, parts: Parts) -> Scores:
    """Train on the log's actual labels and on pseudo-labels of its unexposed candidates."""
    labels, scores_of = bench.labels(parts.spec, parts.labelling, parts.source)
    pairs = bench.pairs(parts.source)
    # No anchors or no content, no pseudo-labels: the product's records name no such unexposed candidates.
    kept = pairs.exposed | ~np.isnan(labels.score)
    pairs = pairs.keep(kept)
    score, label, confidence = labels.score[kept], labels.label[kept], labels.confidence[kept]
    if parts.pseudo in ("pointwise", "feedback"):
        without = parts.pseudo == "feedback" or parts.sharpness == "flat"
        label = mixed_labels(pairs, np.full_like(score, np.nan) if without else score, label)
    if parts.pseudo == "feedback":
        confidence = np.ones_like(confidence)
    columns = Columns(score, label, confidence)
    loss = LossConfig(
        "listwise" if parts.pseudo in ("listwise", "personal") else "pointwise",
        parts.weight,
        parts.negatives,
        parts.form,
        personal=parts.pseudo == "personal",
    )
    reading = evidence(pairs, score)
    weight = 1.0 if parts.pseudo in ("paper", "feedback") else reading.weight
    sharpness = {"full": 1.0, "effect": reading.sharpness, "flat": _FLAT}[parts.sharpness]

    def step(learner: Learner, batch: Batch, _: Ints) -> None:
        learner.step(batch, bench.world.vectors, weight, sharpness=sharpness)

    return train(
        bench.world,
        pairs,
        columns,
        scores_of,
        step,
        loss,
        bench.train_config,
        bench.seed,
        bench.validation,
    ).scores


def gpl_of(bench: Bench, **parts: Any) -> Scores:
    """:func:`gpl` with its parts by name."""
    return gpl(bench, Parts(**parts))


def evidence(pairs: Pairs, score: Floats) -> Reading:
    """How much the anchor ``score`` (P,) tells about the log's clicks: what scales lambda, and labels' sharpness.

    The whole log is read in its order, in chunks, as the trainer reads it.
    """
    found = Evidence()
    for user, request, at in _chunks(pairs):
        found.observe(user, pairs.item[at], request, score[at], pairs.exposed[at], pairs.clicked[at])
    return found.read()


def mixed_calibration(pairs: Pairs, score: Floats) -> MixedCalibration:
    """What the log's feedback ends with, read as :func:`evidence` reads it. Rows are users and items, plus 1; scores
    are of one source, `SOURCE`, or none."""
    calibration, source = MixedCalibration(), _source(score)
    for user, request, at in _chunks(pairs):
        sources = [source] * len(user)
        calibration.observe(
            user + 1, pairs.item[at] + 1, request, score[at], sources, pairs.exposed[at], pairs.clicked[at]
        )
    return calibration


def mixed_labels(pairs: Pairs, score: Floats, other: Floats) -> Floats:
    """(P,) labels by what the log's feedback ends with, ``other`` where that is too little."""
    sources = [_source(score)] * len(pairs)
    label = mixed_calibration(pairs, score).label(pairs.user + 1, pairs.item + 1, pairs.request, score, sources)
    return np.where(np.isnan(label), other, label)


def _source(score: Floats) -> str:
    return "" if np.isnan(score).all() else SOURCE


def _chunks(pairs: Pairs) -> Iterator[tuple[Ints, Ints, slice]]:
    """Users (R,) of some requests, the request (P,) of each of their pairs, and where these are."""
    for start in range(0, len(pairs), _CHUNK):
        stop = min(start + _CHUNK, len(pairs))
        at = slice(int(pairs.offsets[start]), int(pairs.offsets[stop]))
        yield pairs.user[start:stop], np.repeat(np.arange(stop - start), np.diff(pairs.offsets[start : stop + 1])), at
