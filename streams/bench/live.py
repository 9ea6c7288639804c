"""From a click to a served model that was trained on it: real broker, worker, trainer and scorer, followed by offsets.

A feedback record's offset stands in the provenance of its label; the label's own offset lies below the source offsets
of the first model that was trained on it; and the scorer tells when that model, or a later one, came into service.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np

from gpl.catalogue import ItemContent
from gpl.fit import Event, FitOptions, fit
from streams import topics
from streams.contracts import Feedback, Item, Label, ModelUpdate, Recall, decode, encode
from streams.demo.processes import Part, without_settings
from streams.kafka import producer
from streams.log_view import LogView
from streams.metrics import Health
from streams.scoring.scorer import Scorer
from streams.settings import KafkaSettings, Settings, TrainerSettings

DIM, ITEMS, USERS = 32, 500, 200
CANDIDATES, SHOWN = 100, 5
_PATIENCE = 300.0
"""Seconds for the processes to start, and for the last click to be served."""
_GRACE = 60.0
"""Seconds for a process to end in order."""
T = TypeVar("T")


class Plan(msgspec.Struct, frozen=True):
    """``rate`` requests a second, each with one click, for ``seconds``; labelled ``window`` seconds after the request;
    published every ``publish`` seconds."""

    rate: float
    seconds: float
    window: float
    publish: float


class Stages(msgspec.Struct, frozen=True):
    """Seconds of each click, in order of the log. ``labelled``: click to label on the log; ``published``: from there to
    the announcement; ``served``: from there to a scorer; ``whole``: all of it. ``broker``: what it was; ``cores``: of
    the machine."""

    plan: Plan
    broker: str
    cores: int
    labelled: list[float]
    published: list[float]
    served: list[float]
    whole: list[float]

    def lines(self) -> Iterator[str]:
        """Rows of a Markdown table: stage, p50, p99 in seconds."""
        for name, values in (
            (f"click -> label on the log (window of {self.plan.window:g} s included)", self.labelled),
            (f"label -> model announced (an attempt every {self.plan.publish:g} s)", self.published),
            ("announced -> in service", self.served),
            ("click -> in service", self.whole),
        ):
            p50, p99 = np.percentile(values, [50, 99])
            yield f"| {name} | {p50:.2f} | {p99:.2f} |"


def measure(kafka: KafkaSettings, broker: str, directory: Path, plan: Plan) -> Stages:
    """Start worker and trainer as processes, a scorer here, and send clicks. Topics are made anew. ``broker``: what
    it is.

    Raises TimeoutError when something does not start, or the last click is not served in time, ProcessEndedError when
    worker or trainer has ended by itself.
    """
    topics.create(kafka)
    _fit(directory)
    settings = Settings(
        artefacts=directory / "artefacts",
        kafka=kafka,
        trainer=TrainerSettings(models=directory / "models", checkpoints=directory / "checkpoints"),
    )
    with contextlib.ExitStack() as stack:
        parts = []
        for command in (["worker", "all"], ["train"]):
            log = directory / f"{command[0]}.log"
            parts.append(Part(command[0], command, log, env=_environment(settings, directory, plan)))
            stack.callback(parts[-1].stop, _GRACE)
        health = Health()
        scorer = stack.enter_context(Scorer(settings, health=health))
        in_service = _Watch(scorer)
        stack.callback(in_service.stop)
        with contextlib.closing(producer(kafka)) as sending:
            for item in _items():
                sending.send(topics.full_name(kafka, "items"), key=item.item_id.encode(), value=encode(item))
            sending.flush()
            # Enough for the first publication; what is measured comes after it.
            _clicks(kafka, sending, Plan(max(plan.rate, 20), 150 / max(plan.rate, 20), 0, 0), "warm")
            _until("first model", lambda: in_service.versions, parts)
            clicked = _clicks(kafka, sending, plan, "timed")
            # Traffic goes on, as it does in life: event time moves on by what arrives.
            stop = threading.Event()
            going_on = threading.Thread(
                target=_clicks, args=(kafka, sending, msgspec.structs.replace(plan, seconds=_PATIENCE), "after", stop)
            )
            going_on.start()
            try:
                return Stages(plan, broker, os.cpu_count() or 1, *_follow(kafka, clicked, in_service, parts))
            finally:
                stop.set()
                going_on.join()


def _clicks(
    kafka: KafkaSettings, sending: Any, plan: Plan, name: str, stop: threading.Event | None = None
) -> dict[tuple[int, int], int]:
    """Send requests with a click each. Returns (partition, offset) -> Kafka time (ms) of each click."""
    rng = np.random.default_rng(1)
    started, acknowledged = time.monotonic(), []
    for n in range(int(plan.rate * plan.seconds)):
        time.sleep(max(0.0, started + n / plan.rate - time.monotonic()))
        if stop is not None and stop.is_set():
            break
        user, now = f"user-{rng.integers(USERS)}", int(time.time() * 1000)
        group = int(user.removeprefix("user-")) % 10
        candidates = [f"item-{i}" for i in rng.choice(ITEMS, CANDIDATES, replace=False)]
        shown = candidates[:SHOWN]
        taken = next((item for item in shown if int(item.removeprefix("item-")) % 10 == group), shown[0])
        key, request = user.encode(), f"{name}-{n}"
        sending.send(topics.full_name(kafka, "recalls"), key=key, value=encode(Recall(request, user, now, candidates)))
        for k, item in enumerate(shown):
            event = Feedback(f"{request}-{k}", user, item, now + 1, "impression", request)
            sending.send(topics.full_name(kafka, "feedback"), key=key, value=encode(event))
        click = Feedback(f"{request}-click", user, taken, now + 2, "click", request)
        acknowledged.append(sending.send(topics.full_name(kafka, "feedback"), key=key, value=encode(click)))
    sending.flush()
    found = [future.get(timeout=60) for future in acknowledged]
    return {(at.partition, at.offset): at.timestamp for at in found}


def _follow(
    kafka: KafkaSettings, clicked: dict[tuple[int, int], int], in_service: _Watch, parts: list[Part]
) -> list[list[float]]:
    """Seconds of each click: to its label, from there to the announcement, from there into service, and in all."""
    label_of: dict[tuple[int, int], tuple[int, int, int]] = {}
    updates: list[tuple[int, ModelUpdate]] = []

    def labels(record: Any) -> None:
        label = decode(Label, record.value)
        for offset in label.provenance.feedback:
            label_of.setdefault((record.partition, offset), (record.partition, record.offset, record.timestamp))

    def model(record: Any) -> None:
        updates.append((record.timestamp, decode(ModelUpdate, record.value)))

    def containing(partition: int, offset: int) -> tuple[int, ModelUpdate] | None:
        return next((u for u in updates if u[1].source_offsets.get(str(partition), 0) > offset), None)

    with contextlib.closing(LogView(kafka, {"labels": labels, "model-updates": model})) as view:

        def complete() -> bool:
            view.apply(view.fetch(0.2))
            last = [label_of.get(at) for at in clicked]
            return all(found is not None and containing(*found[:2]) is not None for found in last)

        _until("a model with the last click", complete, parts)
    rows = []
    for at, clicked_ms in clicked.items():
        partition, offset, labelled_ms = label_of[at]
        found = containing(partition, offset)
        assert found is not None
        published_ms, update = found
        served = _until(f"{update.version} in service", partial(in_service.since, update.version), parts)
        rows.append((clicked_ms / 1000, labelled_ms / 1000, published_ms / 1000, served))
    times = np.array(rows)
    steps = np.diff(times, axis=1)
    whole = times[:, 3] - times[:, 0]
    return [column.tolist() for column in (*steps.T, whole)]


class _Watch:
    """When each version came into service, by looking every few milliseconds."""

    def __init__(self, scorer: Scorer) -> None:
        self.versions: dict[str, float] = {}
        self._scorer = scorer
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def since(self, version: str) -> float | None:
        """Wall seconds at which this version or, by its name, a later one came into service."""
        return min((at for name, at in self.versions.items() if name >= version), default=None)

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._stop.wait(0.005):
            version = self._scorer.model_version
            if version is not None and version not in self.versions:
                self.versions = {**self.versions, version: time.time()}


def _until(what: str, condition: Callable[[], T], parts: list[Part]) -> T:
    """What the condition gives once that is something. Raises TimeoutError, ProcessEndedError."""
    deadline = time.monotonic() + _PATIENCE
    while True:
        found = condition()
        if found:
            return found
        for part in parts:
            part.check()
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {_PATIENCE:.0f} s")
        time.sleep(0.05)


def _items() -> list[Item]:
    rng = np.random.default_rng(7)
    centres = rng.normal(size=(10, DIM))
    vectors = centres[np.arange(ITEMS) % 10] + 0.4 * rng.normal(size=(ITEMS, DIM))
    return [Item(f"item-{n}", "", embedding=vector.round(4).tolist()) for n, vector in enumerate(vectors)]


def _fit(directory: Path) -> None:
    contents = [ItemContent(item.item_id, item.text, item.embedding) for item in _items()]
    past = [Event(f"past-{u}", f"item-{(u % 10) + 10 * k}", k, bool(k % 3)) for u in range(40) for k in range(12)]
    fit(contents, past, None, FitOptions(generator="history"), seed=0).save(directory / "artefacts")


def _environment(settings: Settings, directory: Path, plan: Plan) -> dict[str, str]:
    kafka, trainer = settings.kafka, settings.trainer
    return without_settings() | {
        "OMP_NUM_THREADS": "1",
        "GPL_CONFIG": "",
        "GPL_ARTEFACTS": str(settings.artefacts),
        "GPL_KAFKA__BOOTSTRAP_SERVERS": kafka.bootstrap_servers,
        "GPL_KAFKA__PREFIX": kafka.prefix,
        "GPL_KAFKA__GROUP_PREFIX": kafka.group_prefix,
        "GPL_KAFKA__PARTITIONS": str(kafka.partitions),
        "GPL_INDEX__PATH": str(directory / "index"),
        "GPL_LABELS__WINDOW_SECONDS": str(plan.window),
        "GPL_LABELS__ALLOWED_LATENESS_SECONDS": "0",
        "GPL_LABELS__IDLE_TIMEOUT_WALL_SECONDS": str(plan.window),
        "GPL_PROFILES__ALLOWED_LATENESS_SECONDS": "0",
        "GPL_TRAINER__MODELS": str(trainer.models),
        "GPL_TRAINER__CHECKPOINTS": str(trainer.checkpoints),
        "GPL_TRAINER__PUBLISH_EVERY_WALL_SECONDS": str(plan.publish),
    }
