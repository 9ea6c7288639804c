"""The training loss: what was exposed, and pseudo-labels of what was not.

    total = actual + pseudo_weight * pseudo + negatives_weight * negatives

Each term is a mean over its own weights, so none depends on how many candidates a request has. Without unexposed
pairs, or with both weights 0, ``total`` is ``actual`` itself.

All terms act on the full logits, the anchor score's cross input included. The listwise target is a function of that
input, so the towers could be taught alone; that measured much worse: they learn a blurred copy of the score, which the
full logit then counts twice. Measured on the Amazon Office world of method.md with causal anchors (12,754 records of 9
exposed and about 60 unexposed, anchors = the last 10 purchases; one seed), HR@10 / HR@50 / tail HR@10:

    the anchor score alone                            .113 / .213 / .091
    one pass: exposed only                            .055 / .146 / .108
              negatives 1                             .101 / .192 / .008
              negatives 1 + pointwise 1               .116 / .218 / .062
              listwise 1                              .110 / .212 / .094
              negatives 1 + listwise 1                .116 / .221 / .084
    the same with w_s starting at 0:
    one pass: negatives 1                             .096 / .184 / .008
              negatives 1 + listwise 1                .108 / .217 / .071
              negatives 1 + listwise 1, towers only   .047 / .117 / .026
    six passes: negatives 1                           .088 / .167 / .013
              negatives 1 + listwise 1                .132 / .228 / .087
              negatives 1 + listwise 1, towers only   .056 / .135 / .031

The limit: pseudo-labels teach their anchors, right or wrong. With anchors of other users, in training and in serving,
negatives 1 alone gave .015 / tail .000 and listwise beside them .005 / tail .002. The weight must follow evidence.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gpl.labels.matching import Ints
from gpl.preranker.batch import Batch
from gpl.preranker.model import Logits


@dataclass(frozen=True)
class LossConfig:
    """``pseudo_weight`` is lambda. ``negatives_weight``: unexposed pairs also count as not clicked, this much."""

    pseudo: Literal["listwise", "pointwise"] = "listwise"
    pseudo_weight: float = 1.0
    negatives_weight: float = 1.0

    def __post_init__(self) -> None:
        if self.pseudo not in ("listwise", "pointwise"):
            raise ValueError(f"pseudo: {self.pseudo!r}, expected 'listwise' or 'pointwise'")
        for name in ("pseudo_weight", "negatives_weight"):
            value = getattr(self, name)
            if not (np.isfinite(value) and value >= 0):
                raise ValueError(f"{name}: {value}, expected a finite number, at least 0")

    def scaled(self, evidence: float) -> LossConfig:
        """The same with lambda times ``evidence``. Raises ValueError outside [0, 1]."""
        if not 0 <= evidence <= 1:
            raise ValueError(f"evidence: {evidence}, expected within [0, 1]")
        return self if evidence == 1 else replace(self, pseudo_weight=evidence * self.pseudo_weight)

    @property
    def exposed_only(self) -> bool:
        """Whether unexposed pairs play no part."""
        return self.pseudo_weight == 0 and self.negatives_weight == 0


@dataclass(frozen=True)
class Loss:
    """Scalars; a term that the batch or the weights leave out is 0."""

    total: Tensor
    actual: Tensor
    pseudo: Tensor
    negatives: Tensor


def joint_loss(logits: Logits, batch: Batch, config: LossConfig) -> Loss:
    """The loss of one batch; ``logits`` are the model's for ``batch``."""
    zero = logits.full.new_zeros(())
    exposed, hidden = np.flatnonzero(batch.exposed), np.flatnonzero(~batch.exposed)
    actual = pseudo = negatives = zero
    if len(exposed):
        clicked = torch.from_numpy(batch.clicked[exposed])
        actual = F.binary_cross_entropy_with_logits(_at(logits.full, exposed), clicked)
    total = actual
    if len(hidden) and config.pseudo_weight > 0:
        term = listwise if config.pseudo == "listwise" else pointwise
        pseudo = term(_at(logits.full, hidden), batch, hidden)
        total = total + config.pseudo_weight * pseudo
    if len(hidden) and config.negatives_weight > 0:
        negatives = F.softplus(_at(logits.full, hidden)).mean()  # cross-entropy with the label 0
        total = total + config.negatives_weight * negatives
    return Loss(total, actual, pseudo, negatives)


def pointwise(logits: Tensor, batch: Batch, hidden: Ints) -> Tensor:
    """Paper: cross-entropy with the calibrated labels, weighted by confidence of mean 1.

    ``hidden`` (U,) are the unexposed pairs, ``logits`` (U,) theirs. 0 when no label has any confidence.
    """
    confidence = batch.confidence[hidden]
    mean = confidence.mean(dtype=np.float64)
    if not mean > 0:
        return logits.new_zeros(())
    label, weight = torch.from_numpy(batch.label[hidden]), torch.from_numpy(confidence / np.float32(mean))
    return F.binary_cross_entropy_with_logits(logits, label, weight)


def listwise(logits: Tensor, batch: Batch, hidden: Ints) -> Tensor:
    """Ours: within each request, how far the model's ranking of the unexposed is from that of their anchor scores.

    Kullback-Leibler divergence of softmax(logits) from softmax(standardised raw scores), which is their cross-entropy
    less a constant, so 0 is a perfect match. Requests are weighted by their mean confidence; one whose scores do not
    differ says nothing and is left out. ``hidden`` (U,) are the unexposed pairs, ``logits`` (U,) theirs.
    """
    _, row, size = np.unique(batch.request[hidden], return_inverse=True, return_counts=True)
    column = np.arange(len(row)) - np.repeat(np.cumsum(size) - size, size)
    # One row a request, padded: log-softmax over a dense matrix is fast and deterministic.
    inside = np.zeros((len(size), int(size.max())), dtype=bool)
    inside[row, column] = True
    score = np.zeros(inside.shape)
    score[row, column] = batch.score[hidden]
    centred = np.where(inside, score - score.sum(axis=1, keepdims=True) / size[:, None], 0.0)
    spread = np.sqrt((centred**2).sum(axis=1) / size)
    weight = np.where(spread > _MIN_SPREAD, np.bincount(row, batch.confidence[hidden]) / size, 0.0)
    if not weight.sum() > 0:
        return logits.new_zeros(())
    standard = np.where(inside, centred / np.maximum(spread, _MIN_SPREAD)[:, None], -np.inf)
    target = np.exp(standard - standard.max(axis=1, keepdims=True))
    target /= target.sum(axis=1, keepdims=True)
    negative_entropy = (target * np.log(np.where(inside, target, 1.0))).sum(axis=1)
    share = weight / weight.sum()
    grid = torch.full(inside.shape, -torch.inf)
    grid = grid.index_put((torch.from_numpy(row), torch.from_numpy(column)), logits)
    # -inf outside the lists would meet a target of 0 there: 0 * inf.
    log_model = F.log_softmax(grid, dim=1).masked_fill(torch.from_numpy(~inside), 0.0)
    target_share = torch.from_numpy((target * share[:, None]).astype(np.float32))
    return float((share * negative_entropy).sum()) - (target_share * log_model).sum()


_MIN_SPREAD = 1e-6  # standard deviation of a request's raw scores; records carry six digits


def _at(values: Tensor, pairs: Ints) -> Tensor:
    return values.index_select(0, torch.from_numpy(pairs))
