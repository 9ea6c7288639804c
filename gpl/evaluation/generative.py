"""Generative pseudo-labelling as the product does it: labels, evidence, joint loss. And its parts taken away."""

from __future__ import annotations

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
from gpl.preranker.batch import Batch
from gpl.preranker.learner import Learner
from gpl.preranker.loss import LossConfig

_CHUNK = 256
"""Requests that evidence takes in at a time: a request is judged by what earlier chunks told of its items."""

_FLAT = 1e-6
"""Log-odds a standard deviation of the anchor score: a step must be above 0."""


@dataclass(frozen=True)
class Parts:
    """What of GPL is on. ``weight``: lambda; ``negatives``, ``form``, ``source``: their weight, loss and where they are
    from; ``personal`` as in `LossConfig`. ``sharpness`` of listwise labels: a standard deviation of the anchor score is
    worth one unit of log-odds (full), what the evidence bears out (effect), or next to nothing, whoever the anchors
    are for (flat). ``matching`` as in the labeller. A factor of confidence that is False is left out."""

    generator: Generator = "small-lm"
    matching: Matching = "max"
    weight: float = 1.0
    negatives: float = 1.0
    form: Literal["softmax", "pointwise"] = "softmax"
    source: Source = "recalled"
    personal: bool = False
    sharpness: Literal["full", "effect", "flat"] = "full"
    centred: bool = True
    downsample: bool = True
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
    columns = Columns(labels.score[kept], labels.label[kept], labels.confidence[kept])
    loss = LossConfig(
        pseudo_weight=parts.weight, negatives_weight=parts.negatives, negatives=parts.form, personal=parts.personal
    )
    reading = evidence(pairs, columns.score)
    sharpness = {"full": 1.0, "effect": reading.sharpness, "flat": _FLAT}[parts.sharpness]

    def step(learner: Learner, batch: Batch, _: Ints) -> None:
        learner.step(batch, bench.world.vectors, reading.weight, sharpness=sharpness)

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
    for start in range(0, len(pairs), _CHUNK):
        stop = min(start + _CHUNK, len(pairs))
        at = slice(int(pairs.offsets[start]), int(pairs.offsets[stop]))
        request = np.repeat(np.arange(stop - start), np.diff(pairs.offsets[start : stop + 1]))
        found.observe(pairs.user[start:stop], pairs.item[at], request, score[at], pairs.exposed[at], pairs.clicked[at])
    return found.read()
