"""Publication: a gate, a directory that never changes, an announcement.

What was announced last is read from ``gpl.model-updates`` itself, so a restarted trainer publishes when, and only
when, it is past that. A kill between directory and announcement leaves a version that nobody was told of; the
next publication has a higher number.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog
import torch
from torch import Tensor

from streams import metrics, models
from streams.contracts import ModelUpdate, decode, encode
from streams.kafka import check_size
from streams.log_view import LogView
from streams.settings import KafkaSettings, TrainerSettings
from streams.topics import full_name

log = structlog.get_logger()

_TOPIC = "model-updates"
_SEND_TIMEOUT_SECONDS = 60.0


@dataclass(frozen=True)
class Candidate:
    """A model that could be published, as of one step.

    ``evaluated``: label records in the progressive window, whose figures are ``metrics``. ``newest_at``: wall
    milliseconds of the newest source record trained on, None when no label named it.
    """

    step: int
    weights: Mapping[str, Tensor]
    ids: models.Ids
    config: Mapping[str, float | int | str | bool]
    versions: Mapping[str, str]
    positions: Mapping[int, int]
    metrics: Mapping[str, float]
    evaluated: int
    newest_event_ts: int
    newest_at: int | None


@dataclass(frozen=True)
class Refusal:
    """Why a model was not published: a bounded word for the metric, and the sentence for people."""

    reason: str
    why: str


def gate(candidate: Candidate, last: Mapping[str, float] | None, settings: TrainerSettings) -> Refusal | None:
    """None when the candidate may be published. ``last``: metrics of the model announced last."""
    for name, tensor in candidate.weights.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            return Refusal("not_finite", f"{name} holds values that are not finite")
    if candidate.evaluated < settings.publish_min_records:
        return Refusal(
            "few_records", f"{candidate.evaluated} records evaluated, {settings.publish_min_records} are asked for"
        )
    before, now = (last or {}).get("log_loss"), candidate.metrics.get("log_loss")
    if before is not None and now is not None and not now <= before + settings.publish_max_regression:
        return Refusal(
            "regression",
            f"progressive log loss {now:.4f}, {before:.4f} when the last model was published; "
            f"at most {settings.publish_max_regression} worse is allowed",
        )
    return None


class Publisher:
    """Publishes the models of one name. ``producer``: a kafka-python producer; ``clock``: wall seconds.

    ``last`` is the last announcement of that name.
    """

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
        self.last = self._announced()

    def publish(self, candidate: Candidate) -> ModelUpdate | None:
        """Publish and announce; None when there is nothing new or the gate refuses (counted, logged)."""
        offsets = {str(p): offset for p, offset in sorted(candidate.positions.items())}
        if self.last is not None and self.last.source_offsets == offsets:
            return None
        refusal = gate(candidate, self.last.metrics if self.last else None, self._settings)
        if refusal is not None:
            metrics.PUBLICATIONS_REFUSED.labels(refusal.reason).inc()
            log.warning("publication_refused", step=candidate.step, reason=refusal.reason, why=refusal.why)
            return None
        now = self._clock()
        figures = dict(candidate.metrics)
        if candidate.newest_at is not None:
            figures["model_age_seconds"] = now - candidate.newest_at / 1000
        directory, checksum, version = self._write(candidate, figures, offsets, int(now * 1000))
        update = ModelUpdate(
            model=self._settings.model_name,
            version=version,
            uri=directory.resolve().as_uri(),
            checksum=checksum,
            source_offsets=offsets,
            newest_event_ts=candidate.newest_event_ts,
            metrics=figures,
        )
        self._announce(update)
        self.last = update
        metrics.MODELS_PUBLISHED.inc()
        if "model_age_seconds" in figures:
            metrics.MODEL_AGE.set(figures["model_age_seconds"])
        log.info("model_published", version=version, step=candidate.step, **figures)
        self._retain()
        return update

    def _write(
        self, candidate: Candidate, figures: Mapping[str, float], offsets: Mapping[str, int], now: int
    ) -> tuple[Path, str, str]:
        number = models.next_number(self._settings.models)
        if self.last is not None:
            number = max(number, models.number_of(self.last.version) + 1)
        manifest = models.Manifest(
            model=self._settings.model_name,
            version=models.version_name(number, candidate.step),
            step=candidate.step,
            config=dict(candidate.config),
            encoder=candidate.versions["encoder"],
            quantiser=candidate.versions["quantiser"],
            source_offsets=dict(offsets),
            newest_event_ts=candidate.newest_event_ts,
            published_at=now,
            metrics=dict(figures),
        )
        directory, checksum = models.write(self._settings.models, manifest, candidate.weights, candidate.ids)
        return directory, checksum, manifest.version

    def _announce(self, update: ModelUpdate) -> None:
        topic, key, value = full_name(self._kafka, _TOPIC), update.model.encode(), encode(update)
        check_size(self._kafka, topic, key, value)
        self._producer.send(topic, key=key, value=value).get(timeout=_SEND_TIMEOUT_SECONDS)

    def _announced(self) -> ModelUpdate | None:
        """The last announcement of this model's name that is on the log."""
        found: list[ModelUpdate] = []

        def keep(record: Any) -> None:
            if record.key == self._settings.model_name.encode():
                found[:] = [decode(ModelUpdate, record.value)] if record.value is not None else []

        view = LogView(self._kafka, {_TOPIC: keep})
        try:
            view.warm_up()
        finally:
            view.close()
        return found[0] if found else None

    def _retain(self) -> None:
        # By number, newest first; what was announced last is always among them.
        for path in models.versions(self._settings.models)[self._settings.keep_models :]:
            shutil.rmtree(path, ignore_errors=True)
