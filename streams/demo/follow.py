"""What comes out of the system, read from its topics: counted for the view and the report, kept as files for anyone
who wants to recompute the labels.
"""

from __future__ import annotations

import base64
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from streams.contracts import AnchorRequest, Calibration, ItemVector, Label, ModelUpdate, UserAnchors, decode
from streams.log_view import LogView
from streams.settings import KafkaSettings

SCORE_EDGES: NDArray[np.float64] = np.linspace(-1.0, 1.0, 81)

FILES = {
    "item-vectors": "catalogue.jsonl",
    "calibrations": "calibrations.jsonl",
    "anchor-requests": "anchor-requests.jsonl",
    "user-anchors": "anchors.jsonl",
    "labels": "labels.jsonl",
    "model-updates": "models.jsonl",
    "dead-letters": "dead-letters.jsonl",
}


@dataclass
class Scores:
    """Counts of raw anchor scores in the bins of ``SCORE_EDGES``, of first revisions."""

    clicked: NDArray[np.int64] = field(default_factory=lambda: np.zeros(len(SCORE_EDGES) - 1, np.int64))
    skipped: NDArray[np.int64] = field(default_factory=lambda: np.zeros(len(SCORE_EDGES) - 1, np.int64))
    unexposed: NDArray[np.int64] = field(default_factory=lambda: np.zeros(len(SCORE_EDGES) - 1, np.int64))

    def add(self, label: Label) -> None:
        exposed = [(s, c) for s, c in zip(label.exposed.score, label.exposed.clicked, strict=True) if s is not None]
        self.clicked += _histogram([score for score, clicked in exposed if clicked])
        self.skipped += _histogram([score for score, clicked in exposed if not clicked])
        self.unexposed += _histogram(label.unexposed.score)


def _histogram(scores: list[float]) -> NDArray[np.int64]:
    return np.histogram(np.clip(scores, -1.0, 1.0), SCORE_EDGES)[0].astype(np.int64)


class Newest(NamedTuple):
    """What the newest label record of a request says."""

    revision: int
    outcome: str
    unexposed: int


@dataclass
class Outcome:
    """Everything counted so far."""

    vectors: set[str] = field(default_factory=set)
    requests: dict[str, Newest] = field(default_factory=dict)
    exposed_labelled: int = 0
    corrections: Counter[str] = field(default_factory=Counter)
    label_records: int = 0
    versions: dict[str, str] = field(default_factory=dict)
    delays: list[float] = field(default_factory=list)
    reasons: dict[tuple[str, int], str] = field(default_factory=dict)
    anchors: set[tuple[str, int]] = field(default_factory=set)
    calibrations: list[Calibration] = field(default_factory=list)
    models: list[ModelUpdate] = field(default_factory=list)
    dead_letters: Counter[tuple[str, str]] = field(default_factory=Counter)
    dead_items: set[str] = field(default_factory=set)
    dead_requests: set[str] = field(default_factory=set)
    scores: Scores = field(default_factory=Scores)
    first_label: Label | None = None
    first_label_at: float | None = None
    first_pseudo_label: Label | None = None
    first_pseudo_label_at: float | None = None

    @property
    def unexposed_labelled(self) -> int:
        return sum(newest.unexposed for newest in self.requests.values())

    def requests_by_outcome(self) -> dict[str, int]:
        """Requests by what their newest label record says."""
        return dict(sorted(Counter(newest.outcome for newest in self.requests.values()).items()))

    def anchors_by_reason(self) -> dict[str, int]:
        """Published anchor refreshes by the reason that their request named."""
        return dict(sorted(Counter(self.reasons.get(key, "unknown") for key in self.anchors).items()))

    def answered(self, requests: frozenset[str]) -> int:
        """How many of these requests have a label, or cannot have one because their recall is a dead letter."""
        return sum(request in self.requests or request in self.dead_requests for request in requests)


class Recorder:
    """Counts records into ``outcome`` and keeps them as files in ``directory``. Takes kafka ConsumerRecords.

    ``clock`` gives wall seconds, monotonic; ``prefix``: of the topics.
    """

    def __init__(self, directory: Path, prefix: str, clock: Callable[[], float] = time.monotonic) -> None:
        self.outcome = Outcome()
        self._clock = clock
        self._prefix = prefix
        self._files: dict[str, IO[bytes]] = {name: (directory / file).open("wb") for name, file in FILES.items()}
        handlers = {
            "item-vectors": self._item_vector,
            "calibrations": self._calibration,
            "anchor-requests": self._anchor_request,
            "user-anchors": self._anchors,
            "labels": self._label,
            "model-updates": self._model,
        }
        kept = {name: self._keeping(name, handler) for name, handler in handlers.items()}
        self.handlers = {**kept, "dead-letters": self._dead_letter}
        """Topic name without prefix -> what takes its records."""

    def close(self) -> None:
        """Finish the files."""
        for handle in self._files.values():
            handle.close()

    def _keeping(self, name: str, handler: Callable[[Any], None]) -> Callable[[Any], None]:
        file = self._files[name]

        def handle(record: Any) -> None:
            if record.value is not None:
                file.write(record.value + b"\n")
                handler(record)

        return handle

    def _item_vector(self, record: Any) -> None:
        self.outcome.vectors.add(decode(ItemVector, record.value).item_id)

    def _calibration(self, record: Any) -> None:
        self.outcome.calibrations.append(decode(Calibration, record.value))

    def _anchor_request(self, record: Any) -> None:
        request = decode(AnchorRequest, record.value)
        self.outcome.reasons[request.user_id, request.sequence] = request.reason

    def _anchors(self, record: Any) -> None:
        anchors = decode(UserAnchors, record.value)
        self.outcome.anchors.add((anchors.user_id, anchors.version))

    def _label(self, record: Any) -> None:
        label, outcome = decode(Label, record.value), self.outcome
        outcome.label_records += 1
        known = outcome.requests.get(label.request_id)
        if known is not None and known.revision >= label.revision:
            return  # delivered twice
        outcome.requests[label.request_id] = Newest(label.revision, label.outcome, len(label.unexposed.item))
        if label.revision > 0:
            outcome.corrections[label.provenance.correction or "restart"] += 1
            return
        made_with = label.provenance
        for name in ("encoder", "quantiser", "generator", "calibration", "config"):
            if (version := getattr(made_with, name)) is not None:
                outcome.versions[name] = version
        outcome.exposed_labelled += len(label.exposed.item)
        outcome.scores.add(label)
        closed_at = _header(record, "gpl-closed-at")
        if closed_at is not None:
            outcome.delays.append(max(0.0, (record.timestamp - int(closed_at)) / 1000))
        if outcome.first_label is None:
            outcome.first_label, outcome.first_label_at = label, self._clock()
        if outcome.first_pseudo_label is None and label.unexposed.item:
            outcome.first_pseudo_label, outcome.first_pseudo_label_at = label, self._clock()

    def _model(self, record: Any) -> None:
        self.outcome.models.append(decode(ModelUpdate, record.value))

    def _dead_letter(self, record: Any) -> None:
        topic = (_header(record, "gpl-topic") or b"?").decode().removeprefix(self._prefix)
        reason = (_header(record, "gpl-reason") or _header(record, "gpl-error") or b"?").decode()
        self.outcome.dead_letters[topic, reason] += 1
        if topic == "items" and record.key is not None:
            self.outcome.dead_items.add(record.key.decode(errors="replace"))
        if topic == "recalls" and (request_id := _request_id(record.value)) is not None:
            self.outcome.dead_requests.add(request_id)
        document = {
            "headers": {name: (value or b"").decode(errors="replace") for name, value in record.headers or ()},
            "key": None if record.key is None else record.key.decode(errors="replace"),
            "value_base64": base64.b64encode(record.value or b"").decode(),
        }
        self._files["dead-letters"].write(msgspec.json.encode(document) + b"\n")


class Follower:
    """Feeds a Recorder from the topics, outside any group. ``newest_at``: monotonic time of the last record."""

    def __init__(self, kafka: KafkaSettings, recorder: Recorder) -> None:
        self._view = LogView(kafka, recorder.handlers)
        self.newest_at = time.monotonic()

    def poll(self, timeout: float) -> None:
        """Take in what has come, waiting up to ``timeout`` seconds for the first record."""
        records = self._view.fetch(timeout)
        self._view.apply(records)
        if records:
            self.newest_at = time.monotonic()

    def catch_up(self) -> None:
        """Take in everything that is on the topics now."""
        self._view.refresh_goal()
        self._view.warm_up(timeout=30.0)

    def close(self) -> None:
        self._view.close()


def _header(record: Any, name: str) -> bytes | None:
    return next((value for key, value in record.headers or () if key == name), None)


class _Request(msgspec.Struct):
    request_id: str


def _request_id(value: bytes | None) -> str | None:
    try:
        return msgspec.json.decode(value or b"", type=_Request).request_id
    except (msgspec.DecodeError, UnicodeError):
        return None
