"""Generative pseudo-labelling as the product does it: labels, evidence, joint loss. And its parts taken away."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gpl.evaluation.anchors import AnchorSpec, Generator
from gpl.evaluation.bench import Bench, Source
from gpl.evaluation.dataset import Ints
from gpl.evaluation.judge import Scores
from gpl.evaluation.pairs import Columns
from gpl.evaluation.training import train
from gpl.labels.labeller import Config
from gpl.preranker.batch import Batch
from gpl.preranker.learner import Learner
from gpl.preranker.loss import LossConfig


@dataclass(frozen=True)
class Parts:
    """What of GPL is on. ``weight``: lambda; ``confidence`` False: every label weighs the same."""

    generator: Generator = "small-lm"
    weight: float = 1.0
    negatives: float = 1.0
    source: Source = "recalled"
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
    columns = Columns(labels.score[kept], labels.label[kept], labels.confidence[kept])
    loss = LossConfig(pseudo_weight=parts.weight, negatives_weight=parts.negatives)

    def step(learner: Learner, batch: Batch, _: Ints) -> None:
        learner.step(batch, bench.world.vectors)

    return train(
        bench.world,
        pairs.keep(kept),
        columns,
        scores_of,
        step,
        loss,
        bench.train_config,
        bench.seed,
        bench.validation,
    ).scores
