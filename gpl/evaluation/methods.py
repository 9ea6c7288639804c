"""The methods that a study compares, by name, each with the settings it may choose from on the validation users."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from gpl.evaluation import baselines, untrained
from gpl.evaluation.anchors import Generator
from gpl.evaluation.generative import gpl_of
from gpl.evaluation.judge import Scores

Group = Literal["untrained", "no pseudo-labels", "pseudo-labels", "gpl", "ablation", "control"]
Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Method:
    """``grid``: values of each setting, one being chosen on validation users, beside the fixed ``settings``.

    A method that is ``like`` another starts from the settings chosen for the other, changes ``settings``, and then
    searches its own grid. With several ``starts``, changes to that, it searches from each and takes the best found.
    So GPL starts from the negatives that are best without pseudo-labels, from the stream's defaults, and from
    pointwise labels without negatives.
    """

    name: str
    title: str
    group: Group
    run: Callable[..., Scores]
    grid: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    like: str | None = None
    settings: Settings = field(default_factory=dict)
    starts: tuple[Settings, ...] = ({},)

    def tuned(self, base: Settings, score: Callable[[dict[str, Any]], float]) -> dict[str, Any]:
        """The settings with the highest ``score``, searched one setting after the other in the grid's order, starting
        from ``base`` and the fixed ones; where these leave the grid, from its first value."""
        known: dict[str, float] = {}  # starts may meet

        def scored(settings: dict[str, Any]) -> float:
            key = json.dumps(settings, sort_keys=True)
            if key not in known:
                known[key] = score(settings)
            return known[key]

        found = [self._climbed({**base, **self.settings, **start}, scored) for start in self.starts]
        return max(found, key=lambda of: of[0])[1]

    def _climbed(
        self, chosen: dict[str, Any], score: Callable[[dict[str, Any]], float]
    ) -> tuple[float, dict[str, Any]]:
        chosen |= {name: values[0] for name, values in self.grid.items() if chosen.get(name) not in values}
        best = 0.0
        for name, values in self.grid.items():
            scores = {value: score({**chosen, name: value}) for value in values}
            winner = max(scores, key=lambda value: scores[value])
            chosen, best = {**chosen, name: winner}, scores[winner]
        return best, chosen


def _anchor_alone(name: str, title: str, generator: Generator, grid: Mapping[str, tuple[Any, ...]] = {}) -> Method:
    return Method(name, title, "untrained", untrained.anchor_score, grid, settings={"generator": generator})


def _like(name: str, title: str, group: Group, **settings: Any) -> Method:
    return Method(name, title, group, gpl_of, like="gpl", settings=settings)


_MATCHING = {"matching": ("max", "kernel")}
_OFF = {"dispersion": False, "history": False, "generation": False}
_NEGATIVES = {"weight": (1.0, 0.03, 0.3, 3.0, 10.0), "source": ("recalled", "uniform")}
_TAUGHT = {"weight": (1.0, 0.1, 0.3, 3.0), "source": ("recalled", "uniform"), **_MATCHING}

_FORM = {
    "source": ("recalled", "uniform"),
    "form": ("softmax", "pointwise"),
    "negatives": (1.0, 0.0, 0.02, 0.2, 3.0, 10.0),
    **_MATCHING,
}
_LABELS = {
    "pseudo": ("listwise", "personal", "pointwise"),
    "sharpness": ("full", "effect"),
    "weight": (0.0, 0.1, 0.3, 1.0, 3.0, 10.0),
    "negatives": (1.0, 0.0, 0.02, 0.2, 3.0, 10.0),
    "form": ("softmax", "pointwise"),
}
_LABELLED = {"weight": 1.0}
_STREAM = {
    "source": "recalled",
    "form": "softmax",
    "negatives": 0.2,
    "matching": "max",
    "pseudo": "listwise",
    "sharpness": "effect",
    "weight": 3.0,
}
"""As `streams.settings` has the trainer by default; the width and the steps of the model are the study's."""
_POINTWISE = {"pseudo": "pointwise", "negatives": 0.0}
_STARTS: tuple[Settings, ...] = ({}, _STREAM, {**_POINTWISE, "source": "uniform"})
"""What was chosen without pseudo-labels, and of which items; what the stream does by default, which labels what
requests recalled and nothing else; labels in the place of negatives."""

METHODS: tuple[Method, ...] = (
    Method("popularity", "Popularity", "untrained", untrained.popularity),
    _anchor_alone("anchor-history", "Anchor score alone, history clusters", "history", _MATCHING),
    _anchor_alone("anchor-lm", "Anchor score alone, small LM", "small-lm", _MATCHING),
    _anchor_alone("anchor-mean", "Anchor score alone, centred mean history", "mean"),
    Method(
        "ease",
        "EASE",
        "no pseudo-labels",
        untrained.ease,
        {"regularisation": (100.0, 10.0, 30.0, 300.0, 1000.0, 3000.0)},
    ),
    Method("exposed", "Exposed only", "no pseudo-labels", baselines.exposed_only, settings={"generator": None}),
    Method(
        "exposed-score",
        "Exposed only, anchor score as input",
        "no pseudo-labels",
        baselines.exposed_only,
        _MATCHING,
        settings={"generator": "history"},
    ),
    Method(
        "negatives",
        "Negative sampling, log-odds corrected",
        "no pseudo-labels",
        baselines.negatives,
        _NEGATIVES,
        settings={"generator": None},
    ),
    Method(
        "negatives-score",
        "Negative sampling, anchor score as input",
        "no pseudo-labels",
        baselines.negatives,
        {**_NEGATIVES, **_MATCHING},
        settings={"generator": "history"},
    ),
    Method(
        "no-labels",
        "GPL's own loss without pseudo-labels",
        "no pseudo-labels",
        gpl_of,
        _FORM,
        settings={"generator": "history", "weight": 0.0},
    ),
    Method(
        "ips",
        "Inverse propensity, anchor score as input",
        "no pseudo-labels",
        baselines.inverse_propensity,
        {"clip": (10.0, 100.0), **_MATCHING},
        settings={"generator": "history"},
    ),
    Method(
        "distillation",
        "Distillation from a ranker",
        "pseudo-labels",
        baselines.distillation,
        _TAUGHT,
        settings={"generator": "history"},
    ),
    Method(
        "self-training",
        "Self-training with uncertainty",
        "pseudo-labels",
        baselines.self_training,
        _TAUGHT,
        settings={"generator": "history"},
    ),
    Method(
        "feedback-labels",
        "Labels by feedback on user and item, no anchors",
        "pseudo-labels",
        gpl_of,
        {
            "weight": (1.0, 0.1, 0.3, 3.0, 10.0),
            "source": ("uniform", "recalled"),
            "negatives": (0.0, 0.02, 0.2, 1.0),
            "form": ("pointwise", "softmax"),
            **_MATCHING,
        },
        settings={"generator": "history", "pseudo": "feedback"},
    ),
    Method("gpl", "GPL", "gpl", gpl_of, {**_MATCHING, **_LABELS}, like="no-labels", settings=_LABELLED, starts=_STARTS),
    Method(
        "mean-labels",
        "Mean-history labels instead of a generator's",
        "pseudo-labels",
        gpl_of,
        _LABELS,
        like="no-labels",
        settings={"generator": "mean", **_LABELLED},
        starts=_STARTS,
    ),
    Method(
        "gpl-stream",
        "GPL as the stream trains by default, with history clusters",
        "gpl",
        gpl_of,
        settings={"generator": "history", **_STREAM},
    ),
    Method(
        "gpl-stream-lm",
        "GPL as the stream trains by default, small LM",
        "gpl",
        gpl_of,
        settings={"generator": "small-lm", **_STREAM},
    ),
    Method(
        "stream-pointwise",
        "GPL as the stream trains with pointwise labels, history clusters",
        "gpl",
        gpl_of,
        settings={"generator": "history", **_STREAM, **_POINTWISE},
    ),
    Method(
        "gpl-paper",
        "GPL with the paper's loss: pointwise, labels by the score alone",
        "gpl",
        gpl_of,
        {**_TAUGHT, "weight": (*_TAUGHT["weight"], 10.0)},
        settings={"generator": "history", "pseudo": "paper", "negatives": 0.0},
    ),
    _like("gpl-lm", "GPL, small LM", "gpl", generator="small-lm"),
    _like("no-dispersion", "GPL without the dispersion factor", "ablation", dispersion=False),
    _like("no-history", "GPL without the history factor", "ablation", history=False),
    _like("no-generation", "GPL without the generation factor", "ablation", generation=False),
    _like("no-confidence", "GPL without confidence", "ablation", **_OFF),
    _like("no-centring", "GPL without centring", "ablation", centred=False),
    _like("no-downsampling", "GPL, small LM, popular not thinned", "ablation", generator="small-lm", downsample=False),
    _like("lm-alone", "GPL, small LM not held near the history", "ablation", generator="small-lm", near_history=False),
    _like("full-sharp", "GPL, listwise labels as sharp as their anchors' scores", "ablation", sharpness="full"),
    _like("effect-sharp", "GPL, listwise labels as sharp as evidence bears out", "ablation", sharpness="effect"),
    _like("flat-labels", "GPL, labels blind to anchors", "ablation", sharpness="flat"),
    *(_like(f"lambda-{w:g}", f"GPL, lambda {w:g}", "ablation", weight=w) for w in (0.0, 0.1, 0.3, 1.0, 3.0, 10.0)),
    _like("shuffled", "GPL with anchors of other users", "control", shuffled=True),
    _like("shuffled-0", "the same without pseudo-labels", "control", shuffled=True, weight=0.0),
    _like("random", "GPL with random anchors", "control", generator="random"),
    _like("random-0", "the same without pseudo-labels", "control", generator="random", weight=0.0),
)
"""Every row of the results, in order."""

BY_NAME = {method.name: method for method in METHODS}
