"""The gate before publication: what a model, and the labels it was last trained on, must be like.

Rules that look at the model (finite, enough data, not much worse, its scores not much moved on a fixed probe) would
pass one that has only begun to learn from poison, so there are rules that look at the labels since the last
attempt: of one kind only, a click rate that has jumped, most of them of one user.

A trickle of poison makes each model only a little worse than the one before. So each announcement also carries levels
that move slowly, by which the next models are judged as by the last one: the best AUC and the best log loss (less the
entropy of the click rate, which comes and goes with the hour), and the usual click rate.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from streams.settings import TrainerSettings

RULES = ("not_finite", "few_records", "one_class", "click_rate", "one_user", "regression", "drift")
"""Reasons of refusals, the values of the metric's label."""

_MIN_REQUESTS = 50  # below it the share of one user says nothing
_PRIOR = 100.0  # exposures at the published click rate that a small sample is mixed with
_BY_CHANCE = math.log(1e-9)  # clicks of one kind only that are less likely than this are no chance
_HALF_LIFE = 24 * 3600.0  # seconds after which a level has come half way to where things are
_LEVEL = "level_"
_BEST = {f"{_LEVEL}auc": max, f"{_LEVEL}excess_log_loss": min}  # levels that what is better takes along at once


@dataclass(frozen=True)
class Feed:
    """The newest evaluated requests: how many, their exposed items and clicks, and the most requests of one user."""

    requests: int
    exposures: int
    clicks: int
    of_one_user: int


@dataclass(frozen=True)
class Refusal:
    """Why a model was not published: one of ``RULES``, and the sentence for people."""

    reason: str
    why: str


def gate(
    weights: Mapping[str, Tensor],
    metrics: Mapping[str, float],
    evaluated: int,
    feeds: Sequence[Feed],
    last: Mapping[str, float],
    moved: Mapping[str, float],
    settings: TrainerSettings,
) -> Refusal | None:
    """None when a model may be published.

    ``metrics``: progressive figures of it, over ``evaluated`` requests. ``feeds``: the labels of spans that end now.
    ``last``: the figures and :func:`levels` of the model announced last, empty when there is none. ``moved``: what
    ``probe.compare`` says of the two.
    """
    for name, tensor in weights.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            return Refusal("not_finite", f"{name} holds values that are not finite")
    if moved.get("finite", 1.0) == 0.0:
        return Refusal("not_finite", "the scores on the probe are not finite")
    if evaluated < settings.publish_min_records:
        return Refusal("few_records", f"{evaluated} records evaluated, {settings.publish_min_records} are asked for")
    for feed in feeds:
        if (refusal := _labels(feed, last, settings)) is not None:
            return refusal
    return _model(metrics, last, moved, settings)


def levels(
    metrics: Mapping[str, float], evaluated: int, last: Mapping[str, float], seconds: float, settings: TrainerSettings
) -> dict[str, float]:
    """What an announcement carries for the next models to be judged by, beside its own figures.

    ``metrics`` and ``evaluated`` of the model that is published, ``last`` the figures of the one before, ``seconds``
    earlier. A level begins with the first window that holds ``recent_records`` requests: the best of small windows is
    luck.
    """
    found = {name: value for name, value in last.items() if name.startswith(_LEVEL)}
    kept: float = 0.5 ** (seconds / _HALF_LIFE)
    for name, now in _measured(metrics).items():
        if name in found:
            slow = now + kept * (found[name] - now)
            found[name] = _BEST[name](now, slow) if name in _BEST else slow
        elif evaluated >= settings.recent_records:
            found[name] = now
    return found


def _measured(metrics: Mapping[str, float]) -> dict[str, float]:
    found = {_LEVEL + name: metrics[name] for name in ("auc", "click_rate") if name in metrics}
    if "log_loss" in metrics and "click_rate" in metrics:
        found[f"{_LEVEL}excess_log_loss"] = metrics["log_loss"] - _entropy(metrics["click_rate"])
    return found


def _labels(feed: Feed, last: Mapping[str, float], settings: TrainerSettings) -> Refusal | None:
    published_rate = last.get("click_rate")
    if feed.exposures and feed.clicks in (0, feed.exposures):
        chance = None if published_rate is None else published_rate if feed.clicks else 1 - published_rate
        if chance is None or feed.exposures * math.log(max(chance, 1e-6)) < _BY_CHANCE:
            what = "a click" if feed.clicks else "without a click"
            return Refusal("one_class", f"all of the newest {feed.exposures} exposed items are {what}")
    for name, when in (("click_rate", "when the last model was published"), (f"{_LEVEL}click_rate", "as a rule")):
        if not feed.exposures or name not in last:
            continue
        usual = last[name]
        rate = (feed.clicks + _PRIOR * usual) / (feed.exposures + _PRIOR)
        shift = _log_odds(rate) - _log_odds(usual)
        if abs(shift) > settings.publish_max_click_rate_shift:
            return Refusal(
                "click_rate",
                f"{feed.clicks} clicks on the newest {feed.exposures} exposed items, a rate of {usual:.4f} "
                f"{when}: {shift:+.2f} in log-odds, {settings.publish_max_click_rate_shift} is allowed",
            )
    if feed.requests >= _MIN_REQUESTS and feed.of_one_user > settings.publish_max_user_share * feed.requests:
        return Refusal(
            "one_user",
            f"{feed.of_one_user} of the newest {feed.requests} requests are of one user, "
            f"a share of {settings.publish_max_user_share} is allowed",
        )
    return None


def _model(
    now: Mapping[str, float], last: Mapping[str, float], moved: Mapping[str, float], settings: TrainerSettings
) -> Refusal | None:
    if "auc" in last and "click_rate" in now and "auc" not in now:
        return Refusal("regression", "progressive auc is not defined: all exposed items are clicks, or none is")
    measured = {**now, **_measured(now)}
    for name, sign, allowed in (
        ("log_loss", 1, settings.publish_max_regression),
        ("auc", -1, settings.publish_max_auc_drop),
        (f"{_LEVEL}excess_log_loss", 1, settings.publish_max_regression),
        (f"{_LEVEL}auc", -1, settings.publish_max_auc_drop),
    ):
        # Written so that NaN fails it too.
        if name in last and name in measured and not sign * (measured[name] - last[name]) <= allowed:
            when = "at the best of late" if name.startswith(_LEVEL) else "when the last model was published"
            return Refusal(
                "regression",
                f"progressive {name.removeprefix(_LEVEL)} {measured[name]:.4f}, {last[name]:.4f} {when}; "
                f"at most {allowed} worse is allowed",
            )
    if "psi" in moved and not moved["psi"] <= settings.publish_max_psi:
        return Refusal(
            "drift",
            f"the scores on the last model's probe have moved: PSI {moved['psi']:.2f}, "
            f"{settings.publish_max_psi} is allowed",
        )
    if "agreement" in moved and not moved["agreement"] >= settings.publish_min_agreement:
        return Refusal(
            "drift",
            f"the order of the last model's probe has changed: rank correlation {moved['agreement']:.2f}, "
            f"{settings.publish_min_agreement} is asked for",
        )
    return None


def _entropy(rate: float) -> float:
    """Nats of a click: the log loss of a model that knows the click rate alone."""
    return -sum(p * math.log(p) for p in (rate, 1 - rate) if p > 0)


def _log_odds(rate: float) -> float:
    rate = min(max(rate, 1e-6), 1 - 1e-6)
    return math.log(rate / (1 - rate))
