"""``Scorer``: the served model, the catalogue's vectors and the users' anchors in memory, and ``score``.

All three come from compacted topics, which one thread follows. A request takes the model as one immutable snapshot,
so it never sees two versions; a model that fails its checks is refused and the old one stays in service.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import msgspec
import numpy as np
import structlog

from gpl.catalogue import Catalogue
from gpl.labels import labeller
from gpl.labels.labeller import PreparedAnchors
from gpl.preranker.ids import IdTable
from gpl.preranker.model import PreRanker
from streams import metrics, models
from streams.contracts import ModelUpdate, UserAnchors, decode
from streams.frame import Frame
from streams.log_view import Handler, LogView
from streams.settings import LabelSettings, Settings
from streams.views import CatalogueView, labeller_config, prepared_anchors

log = structlog.get_logger()


class NotReadyError(RuntimeError):
    """No model is in service yet."""


@dataclass(frozen=True)
class Scored:
    """Candidates ranked best first. ``scores``: the model's logits, parallel to ``items``.

    ``unknown``: candidates without a vector in the catalogue; they are the last of ``items``, in the order in which
    they came, with null for a score.
    """

    model_version: str
    items: list[str]
    scores: list[float | None]
    unknown: list[str]


@dataclass(frozen=True)
class _Served:
    version: str
    network: PreRanker
    users: IdTable
    items: IdTable


class AnchorCache:
    """Handler for ``user-anchors``: the newest anchors of each user, ready to match as the labels role matches them."""

    def __init__(self, settings: LabelSettings, frame: Frame) -> None:
        self._config = labeller_config(settings)
        self._frame = frame
        self._by_user: dict[str, tuple[int, PreparedAnchors]] = {}

    def __call__(self, record: Any) -> None:
        if record.value is None:
            self._by_user.pop(record.key.decode(), None)
            return
        anchors = decode(UserAnchors, record.value)
        if (anchors.encoder, anchors.quantiser) != (self._frame.encoder, self._frame.quantiser):
            return
        held = self._by_user.get(anchors.user_id)
        if held is not None and held[0] > anchors.ts:
            return
        if not anchors.logprob:
            self._by_user.pop(anchors.user_id, None)
            return
        prepared = prepared_anchors(anchors, self._frame.dim, self._frame.levels, self._config)
        self._by_user[anchors.user_id] = (anchors.ts, prepared)

    def of(self, user_id: str) -> PreparedAnchors | None:
        held = self._by_user.get(user_id)
        return None if held is None else held[1]


class Scorer:
    """Scores requests from memory. ``start`` follows the log until ``close``; also a context manager.

    ``score`` may be called from any thread. ``frame``: the space that is served, by default that of the artefacts.
    """

    def __init__(self, settings: Settings, frame: Frame | None = None, health: metrics.Health | None = None) -> None:
        frame = frame or Frame.load(settings.artefacts)
        self._settings = settings
        self._frame = frame
        self._health = health or metrics.Health()
        self._catalogue = Catalogue(frame.dim, frame.levels)
        self._anchors = AnchorCache(settings.labels, frame)
        self._announced: ModelUpdate | None = None
        self._served: _Served | None = None
        self._lock = threading.Lock()  # the catalogue and the anchors; never held while a model is read or run
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._health.wait_for("model")
        catalogue = CatalogueView(self._catalogue, frame.dim, frame.encoder, frame.quantiser)
        self.handlers: Mapping[str, Handler] = {
            "item-vectors": self._guarded(catalogue),
            "user-anchors": self._guarded(self._anchors),
            "model-updates": self._guarded(self._announce),
        }

    @property
    def model_version(self) -> str | None:
        """Version in service, None before the first."""
        served = self._served
        return None if served is None else served.version

    def start(self) -> None:
        """Follow the topics in a thread. Raises ValueError when one of them does not exist."""
        view = LogView(self._settings.kafka, self.handlers)
        self._health.wait_for("views")
        self._thread = threading.Thread(target=self._follow, args=(view,), name="scorer-views", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop following; what was loaded can still be scored with."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def __enter__(self) -> Scorer:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def score(self, user_id: str, candidates: Sequence[str]) -> Scored:
        """Rank ``candidates`` for a user. A user without id or anchors in the model falls back to the default user.

        Raises NotReadyError before the first model is in service.
        """
        served = self._served
        if served is None:
            raise NotReadyError("no model is in service yet")
        started = time.perf_counter()
        with self._lock:
            rows = self._catalogue.rows(candidates)
            vectors = self._catalogue.vectors[rows[rows >= 0]]
            anchors = self._anchors.of(user_id)
        known = [candidates[i] for i in np.flatnonzero(rows >= 0).tolist()]
        unknown = [candidates[i] for i in np.flatnonzero(rows < 0).tolist()]
        cross = None if anchors is None else labeller.score(anchors, vectors)[0]
        logits = served.network.score(served.users.row(user_id), served.items.rows(known), vectors, cross)
        order = np.argsort(-logits, kind="stable")
        metrics.SCORE_SECONDS.observe(time.perf_counter() - started)
        return Scored(
            model_version=served.version,
            items=[known[i] for i in order] + unknown,
            scores=[*logits[order].tolist(), *([None] * len(unknown))],
            unknown=unknown,
        )

    def refresh(self) -> None:
        """Take the model that was announced last into service, unless it is there already. Refuses a bad one."""
        update = self._announced
        if update is None:
            return
        self._announced = None
        try:
            served = self._load(update)
        except (models.ModelError, ValueError) as error:
            metrics.MODELS_REFUSED.inc()
            log.error("model_refused", version=update.version, why=str(error), in_service=self.model_version)
            return
        self._served = served
        metrics.MODEL_RELOADS.inc()
        self._health.done("model")
        log.info("model_in_service", version=served.version)

    def _load(self, update: ModelUpdate) -> _Served:
        published = models.read(update.uri, update.checksum)
        manifest = published.manifest
        space = (manifest.encoder, manifest.quantiser)
        if space != (self._frame.encoder, self._frame.quantiser):
            raise models.ModelError(f"encoder, quantiser: {space}, this scorer serves another space")
        network = PreRanker(self._frame.dim, int(manifest.config["dim"]), seed=0)
        network.load_state_tensors(published.weights)
        users, items = IdTable.from_list(published.ids.users), IdTable.from_list(published.ids.items)
        if (len(users) + 1, len(items) + 1) != (network.n_users, network.n_items):
            raise models.ModelError(
                f"ids: {len(users)} users and {len(items)} items for tables of {network.n_users} and "
                f"{network.n_items} rows"
            )
        return _Served(manifest.version, network, users, items)

    def _announce(self, record: Any) -> None:
        if record.key == self._settings.trainer.model_name.encode() and record.value is not None:
            self._announced = decode(ModelUpdate, record.value)

    def _guarded(self, handler: Handler) -> Handler:
        def apply(record: Any) -> None:
            try:
                with self._lock:
                    handler(record)
            except (msgspec.DecodeError, UnicodeDecodeError, ValueError) as error:
                # State topics have one writer; a record that it should not have written must not stop serving.
                log.error("state_record_skipped", topic=record.topic, offset=record.offset, why=str(error))

        return apply

    def _follow(self, view: LogView) -> None:
        try:
            while not self._stop.is_set():
                view.apply(view.fetch(0.2))
                if view.caught_up():
                    self.refresh()
                    self._health.done("views")
                self._health.beat("scorer")
        except Exception:
            log.exception("scorer_views_stopped")  # the heartbeat stops with it, so /health tells
            raise
        finally:
            view.close()
