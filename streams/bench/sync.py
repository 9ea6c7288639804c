"""The value of freshness, offline and in event time: what a model serves that is synchronised every so often.

The trainer goes on label by label; the model in service at a time is the snapshot of the last multiple of the interval,
and every request is scored by it before any of its labels is trained on (progressive validation). A label exists when
its request's window is over. Anchors are those in force at the request.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from gpl.artefacts import Artefacts
from gpl.catalogue import Catalogue
from gpl.labels import labeller
from gpl.labels.matching import Floats
from streams.contracts import Feedback, Label, Recall
from streams.frame import Frame
from streams.history.pipeline import Event, Pipeline, in_event_time
from streams.scoring.served import Served
from streams.settings import Settings, TrainerSettings
from streams.trainer.trainer import Trainer

TOP = 10
MINUTE = 60_000
ANCHORS = "anchors alone"
"""Name of the anchor score as a ranker of its own."""


@dataclass
class Outcomes:
    """Columns over the requests judged; by ranker name: logits of exposed pairs and whether a clicked item was a hit.

    ``pair_*`` per exposed item, ``click_user`` per clicked item. ``refreshes``: anchor requests by reason, in the part
    of the stream that is judged; ``clicks`` in it.
    """

    pair_user: list[str] = field(default_factory=list)
    pair_request: list[int] = field(default_factory=list)
    pair_clicked: list[bool] = field(default_factory=list)
    pair_logit: dict[str, list[float]] = field(default_factory=dict)
    click_user: list[str] = field(default_factory=list)
    click_hit: dict[str, list[bool]] = field(default_factory=dict)
    requests: int = 0
    with_anchors: int = 0
    anchor_age_hours: list[float] = field(default_factory=list)
    refreshes: dict[str, int] = field(default_factory=dict)

    def judge(
        self, user: str, exposed: Mapping[str, bool], at: Mapping[str, int], scores: Mapping[str, Floats]
    ) -> None:
        """One request: ``exposed`` item -> clicked, ``at`` candidate -> index into each ranker's ``scores`` (n,).

        A tie counts against the ranker.
        """
        for item, clicked in exposed.items():
            index = at.get(item)
            if index is None:
                continue
            self.pair_user.append(user)
            self.pair_request.append(self.requests)
            self.pair_clicked.append(clicked)
            if clicked:
                self.click_user.append(user)
            for name, values in scores.items():
                self.pair_logit.setdefault(name, []).append(float(values[index]))
                if clicked:
                    rank = int(np.count_nonzero(values >= values[index]))
                    self.click_hit.setdefault(name, []).append(rank <= TOP)
        self.requests += 1


def run(
    requests: Iterable[tuple[Recall, list[Feedback]]],
    artefacts: Artefacts,
    catalogue: Catalogue,
    settings: Settings,
    intervals: Mapping[str, int | None],
    judged_from: int,
    period_ms: int | None,
    arms: Mapping[str, TrainerSettings] | None = None,
) -> Outcomes:
    """Stream all requests; judge those at or after ``judged_from`` (ms) under every sync interval (ms).

    An interval of None never synchronises after ``judged_from``. ``period_ms``: of anchors on a timetable, None: by
    drift. ``arms``: other trainings on the same labels, by the names of their rankers, synchronised every minute.
    """
    frame = Frame.of(artefacts)
    pipeline = Pipeline(settings, artefacts, catalogue, period_ms=period_ms)
    feedback_of = {recall.request_id: (recall, feedback) for recall, feedback in requests}
    events: list[tuple[int, Event]] = []
    for recall, feedback in feedback_of.values():
        events.append((len(events), recall))
        events += [(len(events) + n, event) for n, event in enumerate(feedback)]
    servings = [
        _Serving(Trainer(own, frame, catalogue, evaluations=False), frame, catalogue, synced, judged_from)
        for own, synced in [
            (settings.trainer, intervals),
            *((own, {name: MINUTE}) for name, own in (arms or {}).items()),
        ]
    ]
    window = int(settings.labels.window_seconds * 1000)
    outcomes, before = Outcomes(), Counter[str]()
    for offset, event in in_event_time(events):
        labels = pipeline.advance(event.ts)
        for serving in servings:
            serving.train(labels, window, settings.trainer.batch_records)
        if isinstance(event, Recall) and event.ts >= judged_from:
            if not outcomes.requests:
                before = Counter(pipeline.refreshes)
            _judge(outcomes, event, feedback_of[event.request_id][1], pipeline, servings, catalogue)
        pipeline.take(offset, event)
        pipeline.answers.clear()
    outcomes.refreshes = dict(pipeline.refreshes - before)
    return outcomes


class _Serving:
    """The snapshots in service, one an interval, and the training that goes on beside them."""

    def __init__(
        self,
        trainer: Trainer,
        frame: Frame,
        catalogue: Catalogue,
        intervals: Mapping[str, int | None],
        judged_from: int,
    ) -> None:
        self._trainer, self._frame, self._catalogue = trainer, frame, catalogue
        self._intervals = intervals
        self._judged_from = judged_from
        self._synced: dict[str, int] = {}
        self._in_service: dict[str, tuple[int, Served]] = {}
        self._last: tuple[int, Served] | None = None

    def train(self, labels: Sequence[Label], window: int, size: int) -> None:
        """Train on labels in the order in which they closed, those of one minute together, ``size`` at most."""
        by_minute: dict[int, list[Label]] = {}
        for label in labels:
            by_minute.setdefault((label.ts + window) // MINUTE, []).append(label)
        for minute, some in by_minute.items():
            if minute * MINUTE >= self._judged_from:
                self.sync(minute * MINUTE)
            for start in range(0, len(some), size):
                self._trainer.step(some[start : start + size])

    def sync(self, ts: int) -> Mapping[str, tuple[int, Served]]:
        """Event time is ``ts``: take the snapshots that have fallen due. What is in service then, with its step."""
        for name, interval in self._intervals.items():
            number = self._judged_from if interval is None else ts // interval
            if self._synced.get(name) != number:
                self._synced[name] = number
                step = self._trainer.step_count
                if self._last is None or self._last[0] != step:
                    weights, ids = self._trainer.model()
                    self._last = step, Served(f"step {step}", ts, weights, ids, self._frame, self._catalogue)
                self._in_service[name] = self._last
        return self._in_service


def _judge(
    outcomes: Outcomes,
    recall: Recall,
    feedback: Sequence[Feedback],
    pipeline: Pipeline,
    servings: Sequence[_Serving],
    catalogue: Catalogue,
) -> None:
    exposed: dict[str, bool] = {}
    for event in feedback:
        exposed[event.item_id] = exposed.get(event.item_id, False) or event.kind == "click"
    rows = catalogue.rows(recall.candidates)
    vectors = catalogue.vectors[rows]
    anchors = pipeline.anchors(recall.user_id, recall.ts)
    cross, history = None, list[str]()
    if anchors is not None and anchors.prepared is not None:
        cross, history = labeller.score(anchors.prepared, vectors)[0], anchors.history
        outcomes.with_anchors += 1
        outcomes.anchor_age_hours.append((recall.ts - anchors.ts) / 3_600_000)
    scores: dict[str, Floats] = {ANCHORS: np.zeros(len(rows), np.float32) if cross is None else cross}
    for serving in servings:
        made: dict[int, Floats] = {}
        for name, (step, served) in serving.sync(recall.ts).items():
            if step not in made:
                made[step] = served.logits(served.towers(recall.user_id, history, rows), cross)
            scores[name] = made[step]
    outcomes.judge(recall.user_id, exposed, {item: n for n, item in enumerate(recall.candidates)}, scores)
