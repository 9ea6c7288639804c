"""``report.json``: what a demo run came to, in numbers. ``docs/report.md`` documents each key."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from streams.demo import figures
from streams.demo.figures import Evaluation
from streams.demo.follow import Outcome

SIMULATED = (
    "Simulated from the ratings of MovieLens-100K. Simulated recall: 500 candidates a request, from popularity and "
    "co-occurrence as of that moment, from chance, and from what the user really rated on this page and next. "
    "Simulated impressions: what the user really rated, in pages of at most 10; a click is a rating of 4 or 5. "
    "Everything after that is the real system."
)
OWN_DATA = "None: recalls and feedback are the ones in the data directory."
EVALUATION = (
    "Progressive validation: every request is ranked by both models before either is trained on it, so no figure is "
    "of data that a model had seen. HR@10: the share of clicked items that a model puts among its first 10 of all "
    "candidates of their request, exposed and unexposed, over requests of users that had anchors; ties count against "
    "the model. Tail: the half of the items with fewer exposures so far. The exposed-only model is the same network, "
    "from the same start, on the same stream, without pseudo-labels. Intervals: 95%, bootstrap over users; the "
    "difference is paired. The numbers are what this run gave, whichever way they point."
)


@dataclass
class Series:
    """Samples over the run. ``at``: seconds since the first event was sent."""

    at: list[float] = field(default_factory=list)
    events: list[int] = field(default_factory=list)
    requests: list[int] = field(default_factory=list)
    unexposed: list[int] = field(default_factory=list)
    lag: list[float] = field(default_factory=list)


@dataclass
class Run:
    """What the driver knows when the stream is over."""

    source: str
    simulated: bool
    started_at: str
    broker: str
    broker_reason: str
    sent: dict[str, int]
    refused: dict[str, int]
    items: int
    requests: int
    speed: float
    window_seconds: float
    train_fraction: float
    versions: dict[str, str]
    seconds: dict[str, float | None]
    peak_memory_mib: float | None
    series: Series = field(default_factory=Series)


def build(run: Run, outcome: Outcome, evaluation: Evaluation) -> dict[str, Any]:
    """The document. Every figure is of this run; what could not be measured is null."""
    ages = [model.metrics["model_age_seconds"] for model in outcome.models if "model_age_seconds" in model.metrics]
    dead: Counter[str] = Counter()
    for (topic, reason), count in outcome.dead_letters.items():
        dead[f"{topic}: {reason}"] += count
    return {
        "schema": 1,
        "started_at": run.started_at,
        "source": run.source,
        "simulated": run.simulated,
        "upstream": SIMULATED if run.simulated else OWN_DATA,
        "evaluation": EVALUATION,
        "broker": run.broker,
        "broker_reason": run.broker_reason,
        "versions": run.versions,
        "speed": run.speed,
        "label_window_seconds": run.window_seconds,
        "train_fraction": run.train_fraction,
        "seconds": run.seconds,
        "peak_memory_mib": run.peak_memory_mib,
        "events": run.sent["recalls"] + run.sent["feedback"],
        "events_by_topic": dict(run.sent),
        "events_over_cap": sum(run.refused.values()),
        "items": run.items,
        "requests": run.requests,
        "requests_closed": len(outcome.requests),
        "requests_by_outcome": outcome.requests_by_outcome(),
        "exposed_labelled": outcome.exposed_labelled,
        "unexposed_labelled": outcome.unexposed_labelled,
        "corrections": dict(sorted(outcome.corrections.items())),
        "anchors_refreshed": outcome.anchors_by_reason(),
        "dead_letters": sum(dead.values()),
        "dead_letters_by_reason": dict(sorted(dead.items())),
        "label_delay_seconds": quantiles(outcome.delays),
        "models_published": len(outcome.models),
        "model_versions": [model.version for model in outcome.models],
        "model_age_seconds": {
            "p50": float(np.median(ages)) if ages else None,
            "max": max(ages, default=None),
            "last": ages[-1] if ages else None,
        },
        "progressive": figures.progressive(evaluation),
        "hr10": figures.hit_rates(evaluation),
        "candidates_ranked": evaluation.candidates,
    }


def quantiles(values: list[float]) -> dict[str, float | int | None]:
    """p50, p95 and p99, and how many values they are of."""
    if not values:
        return {"p50": None, "p95": None, "p99": None, "count": 0}
    p50, p95, p99 = np.percentile(values, [50, 95, 99]).tolist()
    return {"p50": p50, "p95": p95, "p99": p99, "count": len(values)}
