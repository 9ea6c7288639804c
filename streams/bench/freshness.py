"""``gpl bench freshness``: what a fresh model and fresh anchors are worth, on real streams, as one page."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray

from gpl.artefacts import Artefacts
from gpl.evaluation.intervals import Interval, bootstrap_mean_ci, paired_difference_ci
from streams.bench.live import CANDIDATES, SHOWN, Stages
from streams.bench.sync import ANCHORS, Outcomes, run
from streams.bench.timed import TimedStream
from streams.fitting import catalogue_of, fit_records
from streams.settings import Settings
from streams.storage import LocalStorage

HOUR = 3_600_000
INTERVALS: dict[str, int | None] = {
    "never": None,
    "7 d": 168 * HOUR,
    "1 d": 24 * HOUR,
    "5 h": 5 * HOUR,
    "1 h": HOUR,
    "30 min": HOUR // 2,
    "5 min": HOUR // 12,
    "1 min": HOUR // 60,
}
REFERENCE = "5 h"
POLICIES: dict[str, int | None] = {"weekly": 168 * HOUR, "daily": 24 * HOUR, "drift": None}
DRIFT = "drift"
COMPARED = ("daily", DRIFT)
"""The policies under which the other trainings run too: each takes as long as the stream itself."""
CONFIGURED = "as configured"
ARMS: dict[str, dict[str, float]] = {
    "exposed labels only": {"pseudo_weight": 0.0, "negatives_weight": 0.0},
    "+ negatives": {"pseudo_weight": 0.0},
    "+ pseudo-labels": {"negatives_weight": 0.0},
    "+ both, flat": {"temperature": 1e6},
}
"""Other trainings on the same labels: which part of the loss does what. In all of them the anchor score is an input."""
_FRESH = "1 min"
_RESAMPLES = 400


@dataclass(frozen=True)
class Study:
    """What is run on each stream. ``judged_share``: of the feedback, the last part; the first is fitted on."""

    seeds: int
    candidates: int
    judged_share: float = 0.5


class Run(NamedTuple):
    """One seed under one anchor policy."""

    seed: int
    policy: str
    outcomes: Outcomes


_CHANGES_NOTHING: dict[str, Any] = {
    "artefacts": True,
    "kafka": True,
    "index": True,
    "space": {"cache", "batch_size"},
    "anchors": True,
    "dead_letters": True,
    "trainer": {"checkpoints", "models", "journal", "seed"},
    "serve": True,
    "metrics": True,
}
"""Settings that no result depends on; a run's seed is in its name."""


def fingerprint(settings: Settings) -> str:
    """Short hash of the settings that results depend on."""
    said = settings.model_dump(mode="json", exclude=_CHANGES_NOTHING)
    return hashlib.sha256(msgspec.json.encode(said, order="sorted")).hexdigest()[:8]


def study(
    stream: TimedStream, settings: Settings, plan: Study, out: Path, jobs: int, say: Callable[[str], None]
) -> list[Run]:
    """All runs on a stream, ``jobs`` at a time. What was run before under the same settings is in a directory of its
    own in ``out`` and not run again; remove it to do so. Raises what fitting raises.
    """
    window = settings.labels.window_seconds
    name = f"{stream.name.lower().replace(' ', '-')}-{plan.candidates}-{window:g}-{fingerprint(settings)}"
    directory = out / name
    times = sorted(rating.ts for rating in stream.ratings)
    judged_from = times[int(len(times) * (1 - plan.judged_share))]
    fitted = directory / "artefacts"
    if not fitted.exists():
        past = [f for _, page in stream.requests(plan.candidates, 0) for f in page if f.ts < judged_from]
        fit_records(stream.items, past, settings, 0, say).save(fitted)
    planned = [(seed, policy, directory / f"{policy}-{seed}.json") for seed in range(plan.seeds) for policy in POLICIES]
    waiting = [run for run in planned if not run[2].exists()]
    running: dict[Future[None], str] = {}
    with ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
        while waiting or running:
            # One a process: what a pool has taken over it also runs after a failure or Ctrl-C, each for many minutes.
            while waiting and len(running) < jobs:
                seed, policy, path = waiting.pop(0)
                taken = pool.submit(
                    _write_run, stream, settings, plan.candidates, fitted, judged_from, seed, policy, path
                )
                running[taken] = policy
            for done in wait(running, return_when=FIRST_COMPLETED).done:
                policy = running.pop(done)
                done.result()
                say(f"{stream.name}: {policy} anchors, a seed of {plan.seeds} is judged")
    return [Run(seed, policy, msgspec.json.decode(path.read_bytes(), type=Outcomes)) for seed, policy, path in planned]


def _write_run(
    stream: TimedStream,
    settings: Settings,
    candidates: int,
    fitted: Path,
    judged_from: int,
    seed: int,
    policy: str,
    path: Path,
) -> None:
    torch.set_num_threads(1)
    artefacts = Artefacts.load(fitted)
    catalogue = catalogue_of(stream.items, artefacts, settings.space)
    own = settings.model_copy(update={"trainer": settings.trainer.model_copy(update={"seed": seed})})
    compared = ARMS if policy in COMPARED else {}
    arms = {name: own.trainer.model_copy(update=changed) for name, changed in compared.items()}
    intervals = INTERVALS if policy == DRIFT else {_FRESH: INTERVALS[_FRESH]}
    requests = stream.requests(candidates, seed)
    outcomes = run(requests, artefacts, catalogue, own, intervals, judged_from, POLICIES[policy], arms)
    LocalStorage(path.parent).put(path.name, msgspec.json.encode(outcomes))


def page(
    streams: Sequence[tuple[TimedStream, list[Run]]],
    settings: Settings,
    plan: Study,
    command: str,
    live: Stages | None = None,
) -> str:
    """The results as a Markdown page. ``live``: of a click's way through a running system, if it was timed."""
    return "\n".join(_page(streams, settings, plan, command, live)) + "\n"


def _page(
    streams: Sequence[tuple[TimedStream, list[Run]]], settings: Settings, plan: Study, command: str, live: Stages | None
) -> Iterator[str]:
    yield "# What freshness is worth"
    yield ""
    yield f"Written by `{command}`; not edited by hand."
    if len(streams) > 1:
        yield (
            "`DIR` holds `online_retail/items.csv.gz` (columns `item`, `title`) and `online_retail/events.csv.gz` "
            "(`user`, `item`, `timestamp` in seconds)."
        )
    yield ""
    yield (
        f"Each stream in event-time order; the first {1 - plan.judged_share:.0%} of events is fitted and trained on, "
        f"the rest is judged: every request is scored before any of its labels is trained on. Recall returns "
        f"{plan.candidates} candidates, simulated (popular, co-occurring, random items and what was really met next). "
        f"A label exists {settings.labels.window_seconds:.0f} s after its request. Seeds (of simulated recall and of "
        f"the pre-ranker): {plan.seeds}, pooled; 95% intervals by resampling users, so that one user's outcomes stay "
        "together over all seeds; what seeds change is in them only as far as several were run. AUC is over exposed "
        "items, HR@10 over clicked items among all candidates of their request. Differences are paired, on the same "
        "requests."
    )
    for stream, runs in streams:
        yield from ["", f"## {stream.name}", "", stream.about, ""]
        yield from _sync_table([run.outcomes for run in runs if run.policy == DRIFT])
        yield ""
        yield from _policy_table(runs)
        yield ""
        yield from _arms_table(runs)
    if live is not None:
        yield ""
        yield from _live_table(live)


def _live_table(live: Stages) -> Iterator[str]:
    plan = live.plan
    yield "## From a click to the served model"
    yield ""
    yield (
        f"Wall time through a running system: {live.broker}, `gpl worker all`, `gpl train` and a scorer that follows "
        f"the log, all on one machine of {live.cores} cores, which others use too. {plan.rate:g} requests a second of "
        f"{CANDIDATES} candidates with {SHOWN} shown and one clicked; {len(live.whole):,} clicks, followed by their "
        "offsets into the first model that was trained on them."
    )
    yield ""
    yield "| Section | p50, s | p99, s |"
    yield "| --- | --- | --- |"
    yield from live.lines()


def _sync_table(runs: Sequence[Outcomes]) -> Iterator[str]:
    requests = sum(outcomes.requests for outcomes in runs)
    yield f"### Model synchronised every ... ({requests:,} requests, anchors by drift)"
    yield ""
    yield f"| Sync | AUC | difference from {REFERENCE} | HR@10 | difference from {REFERENCE} |"
    yield "| --- | --- | --- | --- | --- |"
    pairs, clicks = _Pairs(runs, runs), _Clicks(runs, runs)
    for name in INTERVALS:
        auc, auc_gain = pairs.auc(name, REFERENCE)
        hit, hit_gain = clicks.hits(name, REFERENCE)
        yield f"| {name} | {_text(auc)} | {_signed(auc_gain)} | {_text(hit)} | {_signed(hit_gain)} |"


def _policy_table(runs: Sequence[Run]) -> Iterator[str]:
    by_policy = {policy: [run.outcomes for run in runs if run.policy == policy] for policy in POLICIES}
    clicks_judged = sum(len(outcomes.click_user) for outcomes in by_policy[DRIFT])
    yield f"### Anchors refreshed ... ({clicks_judged:,} clicks, model synchronised every {_FRESH})"
    yield ""
    yield (
        "| Anchors | refreshes per 1,000 clicks | requests with anchors | median age | AUC, anchor score | HR@10, "
        "anchor score | AUC, pre-ranker | HR@10, pre-ranker |"
    )
    yield "| --- | --- | --- | --- | --- | --- | --- | --- |"
    for policy, own in by_policy.items():
        pairs, clicks = _Pairs(own, own), _Clicks(own, own)
        count = sum(sum(outcomes.refreshes.values()) for outcomes in own)
        covered = sum(outcomes.with_anchors for outcomes in own) / sum(outcomes.requests for outcomes in own)
        ages = [age for outcomes in own for age in outcomes.anchor_age_hours]
        cells = [
            policy,
            f"{1000 * count / clicks_judged:.0f}",
            f"{covered:.0%}",
            f"{np.median(ages):.1f} h" if ages else "",
            _text(pairs.auc(ANCHORS, ANCHORS)[0]),
            _text(clicks.hits(ANCHORS, ANCHORS)[0]),
            _text(pairs.auc(_FRESH, _FRESH)[0]),
            _text(clicks.hits(_FRESH, _FRESH)[0]),
        ]
        yield f"| {' | '.join(cells)} |"
    yield ""
    for other in (policy for policy in POLICIES if policy != DRIFT):
        pairs, clicks = _Pairs(by_policy[DRIFT], by_policy[other]), _Clicks(by_policy[DRIFT], by_policy[other])
        found = [
            f"{what} {_signed(gain)}"
            for what, gain in (
                ("AUC of the anchor score", pairs.auc(ANCHORS, ANCHORS)[1]),
                ("its HR@10", clicks.hits(ANCHORS, ANCHORS)[1]),
                ("AUC of the pre-ranker", pairs.auc(_FRESH, _FRESH)[1]),
                ("its HR@10", clicks.hits(_FRESH, _FRESH)[1]),
            )
        ]
        yield f"Drift less {other}: {', '.join(found)}."
        yield ""
    reasons: Counter[str] = sum((Counter(outcomes.refreshes) for outcomes in by_policy[DRIFT]), Counter())
    total = sum(reasons.values()) or 1
    named = ", ".join(f"{reason} {count / total:.0%}" for reason, count in reasons.most_common())
    yield f"Reasons of the refreshes by drift: {named}."


def _arms_table(runs: Sequence[Run]) -> Iterator[str]:
    daily, drift = ([run.outcomes for run in runs if run.policy == policy] for policy in COMPARED)
    yield "### Trained with ... (anchors daily and by drift, model synchronised every 1 min)"
    yield ""
    yield (
        "Labels of requests without anchors hold no unexposed candidates, so neither negatives nor pseudo-labels: a "
        "policy under which more requests have anchors trains on more of both. With exposed labels alone this is "
        "not so. Flat: pseudo-labels that say the same of every candidate, whatever the anchors (a control)."
    )
    yield ""
    yield "| Training | AUC, daily | AUC, drift | drift less daily | HR@10, daily | HR@10, drift | drift less daily |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    own, clicks = _Pairs(drift, daily), _Clicks(drift, daily)
    other, other_clicks = _Pairs(daily, daily), _Clicks(daily, daily)
    for name, ranker in (*((arm, arm) for arm in ARMS), (f"+ both, {CONFIGURED}", _FRESH)):
        auc, auc_gain = own.auc(ranker, ranker)
        hit, hit_gain = clicks.hits(ranker, ranker)
        cells = [
            name,
            _text(other.auc(ranker, ranker)[0]),
            _text(auc),
            _signed(auc_gain),
            _text(other_clicks.hits(ranker, ranker)[0]),
            _text(hit),
            _signed(hit_gain),
        ]
        yield f"| {' | '.join(cells)} |"
    yield ""
    pairs, clicks = _Pairs(drift, drift), _Clicks(drift, drift)
    found = [
        f"{arm}: AUC {_signed(pairs.auc(_FRESH, arm)[1])}, HR@10 {_signed(clicks.hits(_FRESH, arm)[1])}" for arm in ARMS
    ]
    yield f"By drift, {CONFIGURED} less ... {'; '.join(found)}."


class _Clicks:
    """Clicked items of two sets of runs over the same requests."""

    def __init__(self, first: Sequence[Outcomes], second: Sequence[Outcomes]) -> None:
        self._users = np.array([user for outcomes in first for user in outcomes.click_user])
        self._first, self._second = first, second

    def hits(self, name: str, reference: str) -> tuple[Interval, Interval]:
        """HR@10 of ``name`` in the first, and its difference from ``reference`` in the second."""
        ours = np.array([hit for outcomes in self._first for hit in outcomes.click_hit[name]], float)
        theirs = np.array([hit for outcomes in self._second for hit in outcomes.click_hit[reference]], float)
        return bootstrap_mean_ci(ours, self._users, 0), paired_difference_ci(ours, theirs, self._users, 0)


class _Pairs:
    """Exposed pairs of two sets of runs over the same requests."""

    def __init__(self, first: Sequence[Outcomes], second: Sequence[Outcomes]) -> None:
        names = np.array([user for outcomes in first for user in outcomes.pair_user])
        _, self._user = np.unique(names, return_inverse=True)
        self._clicked = np.array([clicked for outcomes in first for clicked in outcomes.pair_clicked])
        self._first, self._second = first, second

    def auc(self, name: str, reference: str) -> tuple[Interval, Interval]:
        """Pooled AUC of ``name`` in the first, and its difference from ``reference`` in the second."""
        ours = _Ranked(self._clicked, [x for outcomes in self._first for x in outcomes.pair_logit[name]])
        theirs = _Ranked(self._clicked, [x for outcomes in self._second for x in outcomes.pair_logit[reference]])
        rng = np.random.default_rng(0)
        users = int(self._user.max()) + 1
        drawn = np.empty((_RESAMPLES, 2))
        for n in range(_RESAMPLES):
            weight = np.bincount(rng.integers(users, size=users), minlength=users)[self._user].astype(float)
            drawn[n] = ours.auc(weight), theirs.auc(weight)
        once = np.ones(len(self._user))
        value, other = ours.auc(once), theirs.auc(once)
        return _interval(value, drawn[:, 0]), _interval(value - other, drawn[:, 0] - drawn[:, 1])


class _Ranked:
    """Scores sorted once, for weighted AUCs: ties count half."""

    def __init__(self, clicked: NDArray[np.bool_], scores: Sequence[float]) -> None:
        values = np.array(scores)
        self._order = np.argsort(values, kind="stable")
        _, self._group = np.unique(values[self._order], return_inverse=True)
        self._clicked = clicked[self._order]

    def auc(self, weight: NDArray[np.float64]) -> float:
        own = weight[self._order]
        positive = np.bincount(self._group, own * self._clicked)
        negative = np.bincount(self._group, own * ~self._clicked)
        below = np.cumsum(negative) - negative
        return float((positive * (below + negative / 2)).sum() / (positive.sum() * negative.sum()))


def _interval(estimate: float, drawn: NDArray[np.float64]) -> Interval:
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Interval(estimate, float(low), float(high))


def _text(found: Interval) -> str:
    return f"{found.estimate:.4f} ({found.low:.4f} to {found.high:.4f})"


def _signed(found: Interval) -> str:
    return f"{found.estimate:+.4f} ({found.low:+.4f} to {found.high:+.4f})"
