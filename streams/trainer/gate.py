"""The gate before publication: what a model, and the labels it was last trained on, must be like.

Rules that look at the model (finite, enough data, not much worse, its scores not much moved on a fixed probe) would
pass one that has only begun to learn from poison, so there are rules that look at the labels since the last
attempt: of one kind only, a click rate that has jumped, most of them of one user.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from streams.settings import TrainerSettings

RULES = ("not_finite", "few_records", "one_class", "click_rate", "one_user", "regression", "drift")
"""Reasons of refusals, the values of the metric's label."""

_MIN_REQUESTS = 50  # below it the share of one user says nothing
_PRIOR = 100.0  # exposures at the published click rate that a small sample is mixed with


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
    feed: Feed,
    last: Mapping[str, float],
    moved: Mapping[str, float],
    settings: TrainerSettings,
) -> Refusal | None:
    """None when a model may be published.

    ``metrics``: progressive figures of it, over ``evaluated`` requests. ``last``: those of the model announced last,
    empty when there is none. ``moved``: what ``probe.compare`` says of the two.
    """
    for name, tensor in weights.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            return Refusal("not_finite", f"{name} holds values that are not finite")
    if moved.get("finite", 1.0) == 0.0:
        return Refusal("not_finite", "the scores on the probe are not finite")
    if evaluated < settings.publish_min_records:
        return Refusal("few_records", f"{evaluated} records evaluated, {settings.publish_min_records} are asked for")
    return _labels(feed, last.get("click_rate"), settings) or _model(metrics, last, moved, settings)


def _labels(feed: Feed, published_rate: float | None, settings: TrainerSettings) -> Refusal | None:
    if feed.exposures and published_rate is None and feed.clicks in (0, feed.exposures):
        what = "a click" if feed.clicks else "without a click"
        return Refusal("one_class", f"all of the newest {feed.exposures} exposed items are {what}")
    if feed.exposures and published_rate is not None:
        rate = (feed.clicks + _PRIOR * published_rate) / (feed.exposures + _PRIOR)
        shift = _log_odds(rate) - _log_odds(published_rate)
        if abs(shift) > settings.publish_max_click_rate_shift:
            return Refusal(
                "click_rate",
                f"{feed.clicks} clicks on the newest {feed.exposures} exposed items, a rate of {published_rate:.4f} "
                f"when the last model was published: {shift:+.2f} in log-odds, "
                f"{settings.publish_max_click_rate_shift} is allowed",
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
    for name, sign, allowed in (
        ("log_loss", 1, settings.publish_max_regression),
        ("auc", -1, settings.publish_max_auc_drop),
    ):
        # Written so that NaN fails it too.
        if name in last and name in now and not sign * (now[name] - last[name]) <= allowed:
            return Refusal(
                "regression",
                f"progressive {name} {now[name]:.4f}, {last[name]:.4f} when the last model was published; "
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


def _log_odds(rate: float) -> float:
    rate = min(max(rate, 1e-6), 1 - 1e-6)
    return math.log(rate / (1 - rate))
