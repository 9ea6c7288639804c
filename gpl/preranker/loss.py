"""The training loss: what was exposed, and pseudo-labels of what was not.

    total = actual + pseudo_weight * pseudo + negatives_weight * negatives

Each term is a mean over its own weights, so none depends on how many candidates a request has. Without unexposed
pairs, or with both weights 0, ``total`` is ``actual`` itself.

All terms act on the full logits, the anchor score's cross input included. The listwise target is a function of that
input, so the towers could be taught alone; that measured much worse (Amazon Office, six passes, HR@10 .056 against
.132): they learn a blurred copy of the score, which the full logit then counts twice.

How the forms compare is in docs/method.md. In short, the listwise form with targets less their items' means and
negatives by softmax were best on both shop sets. Pseudo-labels teach their anchors, right or wrong: with anchors of
other users, listwise labels beside negatives made HR@10 fall from .015 to .005, so lambda follows evidence.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from gpl.labels.matching import Floats, Ints
from gpl.preranker.batch import Batch
from gpl.preranker.effects import PairEffects
from gpl.preranker.model import Logits

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class LossConfig:
    """``pseudo_weight`` is lambda. ``negatives_weight``: unexposed pairs also count as not clicked, this much.

    ``centred``: listwise targets are of the scores less their items' means. ``log_odds``: negatives are corrected for
    how often their items are candidates. ``personal``: listwise pseudo-labels are compared with what the model says
    of the user beyond the default user; what it says of items to everybody is left to clicks.
    """

    pseudo: Literal["listwise", "pointwise"] = "listwise"
    pseudo_weight: float = 3.0
    negatives_weight: float = 1.0
    negatives: Literal["softmax", "pointwise"] = "softmax"
    centred: bool = True
    log_odds: bool = True
    temperature: float = 1.0
    personal: bool = False

    def __post_init__(self) -> None:
        if self.pseudo not in ("listwise", "pointwise"):
            raise ValueError(f"pseudo: {self.pseudo!r}, expected 'listwise' or 'pointwise'")
        if self.negatives not in ("softmax", "pointwise"):
            raise ValueError(f"negatives: {self.negatives!r}, expected 'softmax' or 'pointwise'")
        for name in ("pseudo_weight", "negatives_weight"):
            value = getattr(self, name)
            if not (np.isfinite(value) and value >= 0):
                raise ValueError(f"{name}: {value}, expected a finite number, at least 0")
        if not self.temperature > 0:
            raise ValueError(f"temperature: {self.temperature}, expected a positive number")

    def scaled(self, evidence: float, sharpness: float = 1.0) -> LossConfig:
        """The same with lambda times ``evidence``, and listwise targets of standard scores times ``sharpness``.

        Raises ValueError outside [0, 1] and (0, 1].
        """
        if not 0 <= evidence <= 1:
            raise ValueError(f"evidence: {evidence}, expected within [0, 1]")
        if not 0 < sharpness <= 1:
            raise ValueError(f"sharpness: {sharpness}, expected within (0, 1]")
        return replace(self, pseudo_weight=evidence * self.pseudo_weight, temperature=self.temperature / sharpness)

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


@dataclass(frozen=True)
class Mass:
    """What each term is a mean over: exposed pairs; confidence, of unexposed pairs or of requests that teach an order;
    requests with a click, or unexposed pairs. 0 where a batch or the weights leave the term out."""

    actual: float
    pseudo: float
    negatives: float

    @classmethod
    def of(cls, batch: Batch, config: LossConfig, effects: PairEffects | None = None, is_part: bool = False) -> Mass:
        """Of a batch, or of a part of one. The loss of a batch is the sum of its parts' losses, each term by the
        part's share of mass."""
        hidden = np.flatnonzero(~batch.exposed)
        pseudo = negatives = 0.0
        if len(hidden) and config.pseudo_weight > 0:
            if config.pseudo == "pointwise":
                pseudo = float(batch.confidence[hidden].sum(dtype=np.float64))
            else:
                lists = Lists.of(batch.request[hidden])
                pseudo = float(_listed(lists, batch, hidden, _targets(batch, hidden, config, effects))[0].sum())
        # A part without unexposed pairs has clicks among exposed ones, which count when another part has some.
        if (len(hidden) or is_part) and config.negatives_weight > 0:
            clicked = len(np.unique(batch.request[batch.clicked > 0]))
            negatives = float(len(hidden) if config.negatives == "pointwise" else clicked)
        return cls(float(np.count_nonzero(batch.exposed)), pseudo, negatives)

    def share(self, whole: Mass) -> Mass:
        """As fractions of ``whole``, 0 where it has none."""
        parts = zip(vars(self).values(), vars(whole).values(), strict=True)
        return Mass(*(mine / all_ if all_ > 0 else 0.0 for mine, all_ in parts))


def joint_loss(
    logits: Logits,
    batch: Batch,
    config: LossConfig,
    effects: PairEffects | None = None,
    share: Mass | None = None,
    default: Tensor | None = None,
) -> Loss:
    """The loss of one batch; ``logits`` are the model's for ``batch``, ``effects`` what is known of its items.

    Without ``effects`` nothing is taken out: all items are alike. ``share``: of each term's mass in a larger batch of
    which this is a part; the loss is then its summand. ``default`` (P,): logits of the same items for the default user,
    taken off where listwise pseudo-labels are compared.
    """
    zero = logits.full.new_zeros(())
    exposed, hidden = np.flatnonzero(batch.exposed), np.flatnonzero(~batch.exposed)
    actual = pseudo = negatives = zero
    if len(exposed):
        clicked = torch.from_numpy(batch.clicked[exposed])
        actual = F.binary_cross_entropy_with_logits(_at(logits.full, exposed), clicked)
        if share is not None:
            actual = actual * share.actual
    total = actual
    if len(hidden) and config.pseudo_weight > 0:
        if config.pseudo == "pointwise":
            pseudo = pointwise(_at(logits.full, hidden), batch, hidden)
        else:
            score = _targets(batch, hidden, config, effects)
            own = logits.full if default is None else logits.full - default
            pseudo = listwise(_at(own, hidden), batch, hidden, score, config.temperature)
        if share is not None:
            pseudo = pseudo * share.pseudo
        total = total + config.pseudo_weight * pseudo
    if (len(hidden) if share is None else share.negatives) and config.negatives_weight > 0:
        odds = effects.log_odds if effects is not None and config.log_odds else None
        corrected = logits.full if odds is None else logits.full - torch.from_numpy(odds)
        if config.negatives == "pointwise":
            negatives = F.softplus(_at(corrected, hidden)).mean()  # cross-entropy with the label 0
        else:
            negatives = sampled_softmax(corrected, batch)
        if share is not None:
            negatives = negatives * share.negatives
        total = total + config.negatives_weight * negatives
    return Loss(total, actual, pseudo, negatives)


def with_default_user(batch: Batch) -> Batch:
    """The batch and one more request at its end: of the default user (row 0, no history, no anchors) for each item."""
    items = len(batch.item_row)
    nothing = np.zeros(items, dtype=np.float32)
    return Batch(
        user_row=np.append(batch.user_row, 0),
        history=batch.history,
        history_request=batch.history_request,
        item_row=batch.item_row,
        content_row=batch.content_row,
        request=np.append(batch.request, np.full(items, len(batch.user_row))),
        item=np.append(batch.item, np.arange(items)),
        score=np.append(batch.score, np.full(items, np.nan, dtype=np.float32)),
        exposed=np.append(batch.exposed, np.zeros(items, dtype=bool)),
        clicked=np.append(batch.clicked, nothing),
        label=np.append(batch.label, nothing),
        confidence=np.append(batch.confidence, nothing),
    )


def sampled_softmax(logits: Tensor, batch: Batch) -> Tensor:
    """Softmax cross-entropy of the clicks of each request among all its pairs, mean over requests with a click.

    Several clicks of a request share its weight. ``logits`` (P,), corrected for how likely each pair is a candidate.
    """
    clicks = np.bincount(batch.request, batch.clicked, minlength=len(batch.user_row))
    clicked = np.flatnonzero(batch.clicked)
    if len(clicked) == 0:
        return logits.new_zeros(())
    lists = Lists.of(batch.request)
    log_model = lists.log_softmax(logits)
    row, column = lists.row[clicked], lists.column[clicked]
    share = 1.0 / (clicks[batch.request[clicked]] * np.count_nonzero(clicks))
    return -(log_model[row, column] * torch.from_numpy(share.astype(np.float32))).sum()


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


def listwise(logits: Tensor, batch: Batch, hidden: Ints, score: Floats, temperature: float) -> Tensor:
    """Ours: within each request, how far the model's ranking of the unexposed is from that of their anchor scores.

    Kullback-Leibler divergence of softmax(logits) from softmax(standardised ``score`` / ``temperature``): their
    cross-entropy less a constant, so 0 is a perfect match. Requests are weighted by their mean confidence; one whose
    scores do not differ says nothing and is left out. ``hidden`` (U,) are the unexposed pairs, ``logits`` and ``score``
    (U,) theirs.
    """
    lists = Lists.of(batch.request[hidden])
    inside = lists.inside
    weight, centred, spread = _listed(lists, batch, hidden, score)
    if not weight.sum() > 0:
        return logits.new_zeros(())
    standard = np.where(inside, centred / (temperature * np.maximum(spread, _MIN_SPREAD))[:, None], -np.inf)
    target = np.exp(standard - standard.max(axis=1, keepdims=True))
    target /= target.sum(axis=1, keepdims=True)
    negative_entropy = (target * np.log(np.where(target > 0, target, 1.0))).sum(axis=1)  # 0 log 0 is 0
    share = weight / weight.sum()
    target_share = torch.from_numpy((target * share[:, None]).astype(np.float32))
    return float((share * negative_entropy).sum()) - (target_share * lists.log_softmax(logits)).sum()


def _targets(batch: Batch, hidden: Ints, config: LossConfig, effects: PairEffects | None) -> Floats:
    level = effects.mean_score[hidden] if effects is not None and config.centred else np.float32(0)
    score: Floats = batch.score[hidden] - level
    return score


def _listed(lists: Lists, batch: Batch, hidden: Ints, score: Floats) -> tuple[Array, Array, Array]:
    """Of each request: its weight, its scores less their mean (R, longest), and their standard deviation."""
    row, inside = lists.row, lists.inside
    size = inside.sum(axis=1)
    values = np.zeros(inside.shape)
    values[row, lists.column] = score
    centred = np.where(inside, values - values.sum(axis=1, keepdims=True) / size[:, None], 0.0)
    spread = np.sqrt((centred**2).sum(axis=1) / size)
    weight = np.where(spread > _MIN_SPREAD, np.bincount(row, batch.confidence[hidden]) / size, 0.0)
    return weight, centred, spread


@dataclass(frozen=True)
class Lists:
    """Requests as the rows of a padded matrix: log-softmax over a dense matrix is fast and deterministic.

    ``row``, ``column`` (P,): place of each pair. ``inside`` (R, longest): where there is one.
    """

    row: Ints
    column: Ints
    inside: npt.NDArray[np.bool_]

    @classmethod
    def of(cls, request: Ints) -> Lists:
        """``request`` (P,): the request of each pair, those of a request together."""
        _, row, size = np.unique(request, return_inverse=True, return_counts=True)
        column = np.arange(len(row)) - np.repeat(np.cumsum(size) - size, size)
        inside = np.zeros((len(size), int(size.max())), dtype=bool)
        inside[row, column] = True
        return cls(row, column, inside)

    def log_softmax(self, logits: Tensor) -> Tensor:
        """(R, longest) of ``logits`` (P,), each row over its own pairs; 0 outside."""
        grid = torch.full(self.inside.shape, -torch.inf)
        grid = grid.index_put((torch.from_numpy(self.row), torch.from_numpy(self.column)), logits)
        # -inf outside the lists would meet a target of 0 there: 0 * inf.
        return F.log_softmax(grid, dim=1).masked_fill(torch.from_numpy(~self.inside), 0.0)


_MIN_SPREAD = 1e-6  # standard deviation of a request's raw scores; records carry six digits


def _at(values: Tensor, pairs: Ints) -> Tensor:
    return values.index_select(0, torch.from_numpy(pairs))
