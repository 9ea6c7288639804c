"""``Scorer``: the served model, the catalogue's vectors and the users' anchors in memory, and ``score``.

All three come from compacted topics, which one thread follows. A request takes the model as one snapshot, so it never
sees two versions; a model that fails its checks is refused and the old one stays in service.

Who or what the model does not know:

- a user that it was not trained on is scored as its default user, with the user's own anchors where there are any;
- a user without anchors is scored without the cross input, by the weight that the model learnt for such users, and
  without a history, which comes with the anchors;
- an item that it was not trained on is scored from its content, from the moment the catalogue has its vector;
- an item that the catalogue does not know has nothing to be scored by: it comes last, with null for a score.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np
import structlog

from gpl.catalogue import Catalogue
from gpl.labels.labeller import PreparedAnchors
from gpl.labels.matching import Floats, Ints
from streams import metrics, models
from streams.contracts import ItemVector, ModelUpdate, decode
from streams.frame import Frame
from streams.log_view import Handler, LogView
from streams.scoring.anchors import AnchorCache, anchor_scores
from streams.scoring.memo import AnchorScores
from streams.scoring.served import Served
from streams.settings import Settings
from streams.views import CatalogueView, labeller_config

log = structlog.get_logger()

RETRY_SECONDS = 5.0
"""Until a model that could not be read is tried again."""
READ_SECONDS = 300.0
"""That a model may take to be read before it is asked for again, or a newer one in its place."""
WARM_UP_CALLS = 20
"""Scored before readiness, so that no request pays for first touches of memory and libraries."""


# Bound once: a look-up by label takes a lock.
_UNKNOWN_CANDIDATES = metrics.SCORE_UNKNOWN.labels("candidate")
_UNKNOWN_USERS = metrics.SCORE_UNKNOWN.labels("user")
_UNKNOWN_ANCHORS = metrics.SCORE_UNKNOWN.labels("anchors")


class NotReadyError(RuntimeError):
    """No model is in service yet."""


@dataclass(frozen=True)
class Scored:
    """Candidates ranked best first; equal scores in the order of the request.

    ``scores``: the model's logits, parallel to ``items``. ``unknown``: candidates without a vector in the catalogue;
    they are the last of ``items``, in the order in which they came, with null for a score.
    ``known_user``: false when the model scored its default user. ``anchors``: whether the user's anchors were used.
    """

    model_version: str
    items: list[str]
    scores: list[float | None]
    unknown: list[str]
    known_user: bool
    anchors: bool


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
        self._anchor_scores = AnchorScores(settings.serve.memo_mb << 20)
        self._announced: ModelUpdate | None = None
        self._retry_at = 0.0
        self._reading: tuple[ModelUpdate, float, Future[models.Published]] | None = None
        self._served: Served | None = None
        self._lock = threading.Lock()  # of all state below scores; never held while a model is read
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._health.wait_for("model")
        catalogue = CatalogueView(self._catalogue, frame.dim, frame.encoder, frame.quantiser, self._item_changed)
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
        for part in ("views", "warm-up"):
            self._health.wait_for(part)
        self._health.beat("scorer")  # or a thread that ends in its first round would never be missed
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
        """Rank ``candidates`` for a user. Raises NotReadyError before the first model is in service."""
        started = time.perf_counter()
        # One lock for the version, the rows and what stands in them: nothing can move in between.
        with self._lock:
            served = self._served
            if served is None:
                raise NotReadyError("no model is in service yet")
            rows = self._catalogue.rows(candidates)
            unknown: list[str] = []
            known = candidates
            if len(rows) and rows.min() < 0:
                known = [candidates[i] for i in np.flatnonzero(rows >= 0).tolist()]
                unknown = [candidates[i] for i in np.flatnonzero(rows < 0).tolist()]
                rows = rows[rows >= 0]
            anchors = self._anchors.of(user_id)
            towers = served.towers(user_id, () if anchors is None else anchors.history, rows)
            cross = None
            if anchors is not None:
                cross = self._anchor_scores.of(user_id, anchors.prepared, self._catalogue, rows)
        logits = served.logits(towers, cross)
        order = best_first(logits)
        known_user = served.knows(user_id)
        metrics.SCORE_SECONDS.observe(time.perf_counter() - started)
        metrics.SCORE_CANDIDATES.inc(len(candidates))
        _UNKNOWN_CANDIDATES.inc(len(unknown))
        _UNKNOWN_USERS.inc(not known_user)
        _UNKNOWN_ANCHORS.inc(anchors is None)
        return Scored(
            model_version=served.version,
            items=np.array(known, object)[order].tolist() + unknown,
            scores=logits[order].tolist() + [None] * len(unknown),
            unknown=unknown,
            known_user=known_user,
            anchors=anchors is not None,
        )

    def refresh(self, wait: bool = True) -> None:
        """Take the model that was announced last into service, unless it is there already. Refuses a bad one.

        Storage is read beside, one model at a time; not to ``wait`` for it is to call again later. To be called by the
        thread that feeds the handlers: the catalogue must not change while a model is laid out.
        """
        if self._reading is None:
            update = self._announced
            if update is None or time.monotonic() < self._retry_at:
                return
            self._announced = None
            if update.version == self.model_version:
                return
            self._reading = update, time.perf_counter(), _read(update)
        update, started, reading = self._reading
        if not wait and not reading.done():
            if time.perf_counter() - started > READ_SECONDS:
                self._reading = None
                self._announced = self._announced or update
                metrics.MODELS_REFUSED.inc()
                log.error("model_read_given_up", version=update.version, in_service=self.model_version)
            return
        self._reading = None
        try:
            served = Served.of(reading.result(), self._frame, self._catalogue)
        except (models.ModelError, ValueError) as error:
            # A storage that is away comes back; what is in it stays.
            if isinstance(error.__cause__, OSError) and self._announced is None:
                self._announced, self._retry_at = update, time.monotonic() + RETRY_SECONDS
            metrics.MODELS_REFUSED.inc()
            log.error("model_refused", version=update.version, why=str(error), in_service=self.model_version)
            return
        with self._lock:
            self._served = served
        metrics.MODEL_RELOADS.inc()
        metrics.MODEL_RELOAD_SECONDS.observe(time.perf_counter() - started)
        metrics.SERVED_MODEL_TIME.set(served.published_at / 1000)
        self._health.done("model")
        log.info("model_in_service", version=served.version)

    def warm_up(self) -> None:
        """Score what the catalogue holds, without counting it, so that the first request is as fast as any."""
        served, ids = self._served, self._catalogue.ids()[: self._settings.serve.max_candidates]
        if served is None or not ids:
            return
        vectors = self._catalogue.vectors
        some = vectors[self._catalogue.rows(ids[:10])]
        ones = np.ones(len(some), np.float32)
        config = labeller_config(self._settings.labels)
        anchors = PreparedAnchors.build(some, -ones, ones, self._frame.levels, config)
        for _ in range(WARM_UP_CALLS):
            rows = self._catalogue.rows(ids)
            best_first(served.logits(served.towers("", ids[:10], rows), anchor_scores(anchors, vectors, rows)))

    def _item_changed(self, item_id: str, item: ItemVector | None) -> None:
        if self._served is not None and item is not None:
            row = int(self._catalogue.rows([item_id])[0])
            self._served.put(item_id, row, self._catalogue.vectors[row])

    def _announce(self, record: Any) -> None:
        if record.key == self._settings.trainer.model_name.encode() and record.value is not None:
            self._announced, self._retry_at = decode(ModelUpdate, record.value), 0.0

    def _guarded(self, handler: Handler) -> Handler:
        def apply(record: Any) -> None:
            try:
                with self._lock:
                    handler(record)
            except (ValueError, OverflowError) as error:  # msgspec's errors of decoding are ValueErrors too
                # State topics have one writer; a record that it should not have written must not stop serving.
                log.error("state_record_skipped", topic=record.topic, offset=record.offset, why=str(error))

        return apply

    def _follow(self, view: LogView) -> None:
        try:
            while not self._stop.is_set():
                view.apply(view.fetch(0.2))
                metrics.CATALOGUE_ITEMS.set(len(self._catalogue))
                if view.caught_up():
                    self.refresh(wait=False)
                    self._health.done("views")
                    if self._served is not None and "warm-up" in self._health.waiting():
                        self.warm_up()
                        self._health.done("warm-up")
                self._health.beat("scorer")
        except Exception:
            log.exception("scorer_views_stopped")  # the heartbeat stops with it, so /health tells
            raise
        finally:
            view.close()


def _read(update: ModelUpdate) -> Future[models.Published]:
    """An announced model, read in a thread of its own: of a storage that is slow or hangs, the catalogue must not wait.

    A daemon's thread, unlike an executor's, keeps no process from ending.
    """
    found: Future[models.Published] = Future()

    def read() -> None:
        try:
            found.set_result(models.read(update.uri, update.checksum))
        except BaseException as error:
            found.set_exception(error)

    threading.Thread(target=read, name="model-reading", daemon=True).start()
    return found


def best_first(logits: Floats) -> Ints:
    """``np.argsort(-logits, kind="stable")`` (n,) of finite float32 logits in half the time, by one sort of integers.

    Upper half of each: the bits of the negated logit, made to sort as their floats do. Lower half: its place.
    """
    bits = (np.float32(0.0) - logits).view(np.int32)  # not -logits: the zeros of either sign must tie
    keys = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).astype(np.int64)
    keys <<= 32
    keys |= np.arange(len(keys))
    keys.sort()
    return keys & 0xFFFFFFFF
