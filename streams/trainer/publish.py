"""Publication: a gate, a directory that never changes, an announcement.

What was announced last is read from ``gpl.model-updates`` itself, so a restarted trainer publishes when, and only
when, it is past that. A kill between directory and announcement leaves a version that nobody was told of; the
next publication has a higher number. While a version is pinned, models are made and kept and no other is announced.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import structlog
from torch import Tensor

from streams import metrics, models
from streams.contracts import ModelUpdate, decode, encode
from streams.kafka import check_size
from streams.log_view import LogView
from streams.settings import KafkaSettings, TrainerSettings
from streams.topics import full_name
from streams.trainer import probe
from streams.trainer.gate import Feed, Refusal, gate, levels
from streams.trainer.retention import retained

log = structlog.get_logger()

TOPIC = "model-updates"
_SEND_TIMEOUT_SECONDS = 60.0
_LOOK_BACK = 100  # requests at least that the gate looks at: a slow flood has few between two attempts
_LOOK_BACK_EXPOSURES = 500  # exposed items at least that it looks at beside: a request may have one


@dataclass(frozen=True)
class Candidate:
    """A model that could be published, as of one step of a run of the batch journal.

    ``records``: trained on; ``trained``: steps that moved weights. ``evaluated``: requests in the progressive window,
    whose figures are ``metrics``; ``feed`` tells of the newest n of them. ``newest_at``: wall milliseconds of the
    newest source record trained on, None when no label named it. ``asked``: recent requests for the next probe;
    ``score``: the model's answers.
    """

    step: int
    run: int
    records: int
    trained: int
    weights: Mapping[str, Tensor]
    ids: models.Ids
    config: Mapping[str, float | int | str | bool]
    versions: Mapping[str, str]
    positions: Mapping[int, int]
    metrics: Mapping[str, float]
    evaluated: int
    newest_event_ts: int
    newest_at: int | None
    feed: Callable[[int], Feed]
    asked: models.Probe
    score: probe.Score


def announce(kafka: KafkaSettings, producer: Any, update: ModelUpdate) -> None:
    """Put a model into service: write it to ``gpl.model-updates``. Raises what the broker raises."""
    topic, key, value = full_name(kafka, TOPIC), update.model.encode(), encode(update)
    check_size(kafka, topic, key, value)
    producer.send(topic, key=key, value=value).get(timeout=_SEND_TIMEOUT_SECONDS)


def update_of(store: models.ModelStore, version: str) -> ModelUpdate:
    """The announcement of a version that is in storage. Raises ModelError when it is missing or damaged."""
    manifest, checksum = store.manifest(version)
    return ModelUpdate(
        model=manifest.model,
        version=version,
        uri=store.uri(version),
        checksum=checksum,
        source_offsets=manifest.source_offsets,
        newest_event_ts=manifest.newest_event_ts,
        metrics=manifest.metrics,
    )


class Announced:
    """Follows the announcements of one model's name. ``last``: the newest, None when there is none."""

    def __init__(self, kafka: KafkaSettings, model: str) -> None:
        self._model = model.encode()
        self.last: ModelUpdate | None = None
        self._view = LogView(kafka, {TOPIC: self._keep})
        self._view.warm_up()

    def refresh(self) -> ModelUpdate | None:
        """Read on to the present end."""
        self._view.refresh_goal()
        self._view.warm_up()
        return self.last

    def close(self) -> None:
        self._view.close()

    def __enter__(self) -> Announced:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _keep(self, record: Any) -> None:
        if record.key == self._model:
            self.last = None if record.value is None else decode(ModelUpdate, record.value)


class Publisher:
    """Publishes the models of one name. ``producer``: a kafka-python producer; ``clock``: wall seconds."""

    def __init__(
        self,
        kafka: KafkaSettings,
        settings: TrainerSettings,
        producer: Any,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._kafka = kafka
        self._settings = settings
        self._producer = producer
        self._clock = clock
        self.store = models.ModelStore(settings.models)
        self.store.storage.recover()
        self._announced = Announced(kafka, settings.model_name)
        self._published_at: dict[str, int] = {}
        self._attempted: int | None = None  # records trained on at the last attempt, and
        self._trained = 0  # the steps that had moved weights

    @property
    def last(self) -> ModelUpdate | None:
        """The last announcement, whoever made it."""
        return self._announced.last

    def publish(self, candidate: Candidate) -> ModelUpdate | None:
        """Publish and announce; None when there is nothing new, the gate refuses (counted, logged, kept), a version is
        pinned, or it is put off because storage does not do as asked (logged)."""
        attempted = self._attempted, self._trained
        try:
            return self._publish(candidate)
        except (models.ModelError, OSError) as error:
            log.error("publication_put_off", step=candidate.step, why=str(error))
            # Whatever is there of the version, the next attempt's has a higher number.
            self._attempted, self._trained = attempted
            return None

    def _publish(self, candidate: Candidate) -> ModelUpdate | None:
        self._announced.refresh()
        self._follow_pin()  # first: the feed may be idle, and the gate shut
        if not self._has_moved(candidate):
            return None
        model = self._last_model()
        accepted = self.store.accepted()
        judged = self._judge(candidate, model, accepted)
        if isinstance(judged, Refusal):
            self.refuse(judged, candidate.step)
            return None
        metrics.PUBLICATION_BLOCKED.set(0)
        now = self._clock()
        counts = {"records": float(candidate.records), "trained": float(candidate.trained)}
        figures = {**candidate.metrics, **counts, **judged}
        if candidate.newest_at is not None:
            figures["model_age_seconds"] = now - candidate.newest_at / 1000
        version = self._write(candidate, figures, int(now * 1000))
        update = update_of(self.store, version)
        if not self._announce(update):
            return None
        if accepted:
            # Of one that does not come into service it is not used up. A kill or a failure here lets one more pass.
            log.warning("gate_opened_once", step=candidate.step)
            try:
                self.store.clear_acceptance()
            except OSError as error:
                log.warning("acceptance_not_used_up", why=str(error))
        metrics.MODELS_PUBLISHED.inc()
        if "model_age_seconds" in figures:
            metrics.MODEL_AGE.set(figures["model_age_seconds"])
        log.info("model_published", version=version, step=candidate.step, **figures)
        return update

    def refuse(self, refusal: Refusal, step: int) -> None:
        """Count, log and keep a refusal."""
        metrics.PUBLICATIONS_REFUSED.labels(refusal.reason).inc()
        metrics.PUBLICATION_BLOCKED.set(refusal.reason != "few_records")  # at the beginning that is as it should be
        log.warning("publication_refused", step=step, reason=refusal.reason, why=refusal.why)
        self.store.refuse(refusal.reason, refusal.why, step, int(self._clock() * 1000))

    def close(self) -> None:
        self._announced.close()

    def _judge(
        self, candidate: Candidate, model: models.Published | None, accepted: bool
    ) -> Refusal | dict[str, float]:
        """What the gate says beside ``model``, the last; of what it lets through, the drift and the levels to carry.
        ``accepted``: whatever it moved, an operator wants it; only what no model may be is refused."""
        last = self.last
        # After a restart: since what serves. Everything would hide a flood that has only begun.
        known = int(last.metrics.get("records", 0)) if self._attempted is None and last is not None else 0
        fresh = candidate.records - (self._attempted or known)
        if fresh <= 0:  # it started from before what serves
            fresh = self._settings.recent_records
        self._attempted, self._trained = candidate.records, candidate.trained
        spaces = candidate.versions["encoder"], candidate.versions["quantiser"]
        comparable = model is None or (model.manifest.encoder, model.manifest.quantiser) == spaces
        before = last.metrics if last is not None and comparable and not accepted else {}
        moved = probe.compare(model.probe if model is not None and comparable else models.NO_PROBE, candidate.score)
        refusal = gate(
            candidate.weights,
            candidate.metrics,
            candidate.evaluated,
            _feeds(candidate, max(fresh, _LOOK_BACK)),
            before,
            {name: value for name, value in moved.items() if name == "finite" or not accepted},
            self._settings,
        )
        if refusal is not None:
            return refusal
        since = 0.0 if model is None else max(0.0, self._clock() - model.manifest.published_at / 1000)
        slow = levels(candidate.metrics, candidate.evaluated, before, since, self._settings)
        return {**_drift(moved), **slow}

    def _has_moved(self, candidate: Candidate) -> bool:
        """Whether a weight has moved since the last attempt: of some records nothing can be learned."""
        if candidate.trained in (0, self._trained):
            return False
        last = self.last
        # Restarted, and not past what it published?
        return self._attempted is not None or last is None or last.metrics.get("trained") != candidate.trained

    def _last_model(self) -> models.Published | None:
        """The model that was announced last; None when there is none, or its files are gone or damaged.

        Raises UnreadableError when storage does not say: what the model moved must not go unseen for that.
        """
        last = self.last
        if last is None:
            return None
        try:
            return models.read(last.uri, last.checksum)
        except models.UnreadableError:
            raise
        except models.ModelError as error:
            log.warning("last_model_unreadable", version=last.version, why=str(error))
            return None

    def _write(self, candidate: Candidate, figures: Mapping[str, float], now: int) -> str:
        present = [models.number_of(version) for version in self.store.versions()]
        if self.last is not None:
            present.append(models.number_of(self.last.version))
        manifest = models.Manifest(
            model=self._settings.model_name,
            version=models.version_name(1 + max(present, default=0), candidate.step),
            step=candidate.step,
            run=candidate.run,
            records=candidate.records,
            config=dict(candidate.config),
            encoder=candidate.versions["encoder"],
            quantiser=candidate.versions["quantiser"],
            source_offsets={str(p): offset for p, offset in sorted(candidate.positions.items())},
            newest_event_ts=candidate.newest_event_ts,
            published_at=now,
            metrics=dict(figures),
        )
        asked = probe.answered(candidate.asked, candidate.score)
        self.store.write(manifest, candidate.weights, candidate.ids, asked)
        self._published_at[manifest.version] = now
        return manifest.version

    def _announce(self, update: ModelUpdate) -> bool:
        """Whether the model is in service now."""
        pin = self._follow_pin()
        if pin is not None:
            log.info("model_held_back", version=update.version, pinned=pin.version)
        else:
            announce(self._kafka, self._producer, update)
            self._announced.refresh()
            try:
                # Somebody may have pinned a version between the look and the announcement; theirs is to stay.
                pin = self._follow_pin()
            except models.ModelError as error:
                log.warning("pin_unreadable", why=str(error))  # the next look puts it right
        try:
            self._retain(update.version)
        except (models.ModelError, OSError) as error:
            log.warning("models_not_let_go_of", why=str(error))
        return pin is None or pin.version == update.version

    def _follow_pin(self) -> models.Pin | None:
        """The pin. Its version is announced when it does not serve: a command that was killed after pinning, or a
        trainer after announcing its own, has left it so. Raises ModelError when one of the two cannot be read."""
        pin = self.store.pinned()
        metrics.MODELS_PINNED.set(pin is not None)
        if pin is not None and (self.last is None or self.last.version != pin.version):
            announce(self._kafka, self._producer, update_of(self.store, pin.version))
            self._announced.refresh()
            log.warning("pinned_model_announced", version=pin.version)
        return pin

    def _retain(self, published: str) -> None:
        present = self.store.versions()
        own = self._settings
        written: dict[str, int | None] = {}
        kept = {published}
        for version in reversed(present):
            try:
                written[version] = self._when(version)
            except models.UnreadableError:
                kept.add(version)  # it may be one of them
            except models.OtherSoftwareError:
                written[version] = None
            except models.ModelError:
                pass  # what a failed write left half-written must not crowd good ones out
        kept |= retained(written, own.keep_models, own.keep_hourly_models, self._when(published))
        for version in present:
            if version not in kept and not self._is_held(version):
                self.store.remove(version)
                self._published_at.pop(version, None)

    def _is_held(self, version: str) -> bool:
        """Whether it serves or is pinned as of now: an operator may be going back to it at this moment."""
        serving = self._announced.refresh()
        try:
            pin = self.store.pinned()
        except models.ModelError:
            return True
        return version in (serving and serving.version, pin and pin.version)

    def _when(self, version: str) -> int:
        """A version was published, wall milliseconds. Raises ModelError."""
        if version not in self._published_at:
            self._published_at[version] = self.store.manifest(version)[0].published_at
        return self._published_at[version]


def _drift(moved: Mapping[str, float]) -> dict[str, float]:
    return {name: moved[name] for name in ("psi", "agreement") if name in moved}


def _feeds(candidate: Candidate, requests: int) -> list[Feed]:
    """The labels of the newest ``requests``, and of as many as have `_LOOK_BACK_EXPOSURES`, or of all there are."""
    feeds = [candidate.feed(requests)]
    while feeds[-1].exposures < _LOOK_BACK_EXPOSURES and feeds[-1].requests >= requests:
        requests *= 2
        feeds[1:] = [candidate.feed(requests)]
    return feeds
