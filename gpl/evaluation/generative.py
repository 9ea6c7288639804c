"""Generative pseudo-labelling as the product does it: labels, evidence, joint loss. And its parts taken away."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from gpl.evaluation.anchors import AnchorSpec, Generator
from gpl.evaluation.bench import Bench, Source
from gpl.evaluation.dataset import Floats, Ints
from gpl.evaluation.judge import Scores
from gpl.evaluation.pairs import Columns, Pairs
from gpl.evaluation.training import train
from gpl.labels.evidence import Evidence
from gpl.labels.labeller import Config
from gpl.preranker.batch import Batch
from gpl.preranker.learner import Learner
from gpl.preranker.loss import LossConfig

_CHUNK = 256
"""Requests that evidence takes in at a time: a request is judged by what earlier chunks told of its items."""


@dataclass(frozen=True)
class Parts:
    """What of GPL is on. ``weight``: lambda; ``negatives``, ``form``, ``source``: their weight, loss and where they are
    from; ``personal`` as in `LossConfig`. A factor of confidence that is False is left out."""

    generator: Generator = "small-lm"
    weight: float = 1.0
    negatives: float = 1.0
    form: Literal["softmax", "pointwise"] = "softmax"
    source: Source = "recalled"
    personal: bool = False
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
        return Config(dispersion=self.dispersion, history=self.history, generation=self.generation)


def gpl(bench: Bench, parts: Parts) -> Scores:
    """Train on the log's actual labels and on pseudo-labels of its unexposed candidates."""
    labels, scores_of = bench.labels(parts.spec, parts.labelling, parts.source)
    pairs = bench.pairs(parts.source)
    # A user without anchors has no pseudo-labels: the product's records name no unexposed candidates then.
    kept = pairs.exposed | ~np.isnan(labels.score)
    pairs = pairs.keep(kept)
    columns = Columns(labels.score[kept], labels.label[kept], labels.confidence[kept])
    loss = LossConfig(
        pseudo_weight=parts.weight, negatives_weight=parts.negatives, negatives=parts.form, personal=parts.personal
    )

    weight = evidence_weight(pairs, columns.score)

    def step(learner: Learner, batch: Batch, _: Ints) -> None:
        learner.step(batch, bench.world.vectors, weight)

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


def evidence_weight(pairs: Pairs, score: Floats) -> float:
    """How much the anchor ``score`` (P,) tells about the log's clicks, in [0, 1]: what scales lambda.

    The whole log is read in its order, in chunks, as the trainer reads it.
    """
    evidence = Evidence()
    for start in range(0, len(pairs), _CHUNK):
        stop = min(start + _CHUNK, len(pairs))
        at = slice(int(pairs.offsets[start]), int(pairs.offsets[stop]))
        request = np.repeat(np.arange(stop - start), np.diff(pairs.offsets[start : stop + 1]))
        evidence.observe(
            pairs.user[start:stop], pairs.item[at], request, score[at], pairs.exposed[at], pairs.clicked[at]
        )
    return evidence.read().weight
