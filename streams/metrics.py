"""Every Prometheus metric of the system, declared once, and the small HTTP server that each process answers on.

Base units, ``gpl_`` prefix, no user or item ids as labels. Liveness (``/health``) is progress: a loop that has not
beaten for ``stalled_after`` seconds makes the process unhealthy. Readiness (``/ready``): recovery and warm-up are done.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterable
from socketserver import ThreadingMixIn
from typing import TYPE_CHECKING, Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import Counter, Gauge, Histogram, make_wsgi_app

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIEnvironment


def _from_zero(counter: Counter, *values: str) -> Counter:
    """The counter with its series at 0 from the start: of one that begins at 1, an increase does not see the first."""
    for value in values:
        counter.labels(value)
    return counter


_ANCHOR_REASONS = ("cold", "drift", "stale", "version")
_DELAYS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)

# Every consumer.
EVENTS = Counter("gpl_events_total", "Records read and processed", ["topic"])
DEAD_LETTERS = Counter("gpl_dead_letters_total", "Records written to the dead letters", ["topic", "reason"])
HALTED = Gauge("gpl_halted", "1: the consumer has halted because too many records were refused", ["loop"])
STATE_RECORDS_SKIPPED = Counter(
    "gpl_state_records_skipped_total", "Records of state topics that could not be used", ["topic"]
)
HEARTBEAT = Gauge(
    "gpl_heartbeat_timestamp_seconds",
    "When a processing loop last made progress",
    ["loop"],
    multiprocess_mode="livemin",
)
CONSUMER_LAG = Gauge("gpl_consumer_lag", "Records behind the end of a partition", ["topic", "partition"])

# Profiles and anchors.
ANCHOR_REQUESTS = _from_zero(
    Counter("gpl_anchor_requests_total", "Anchor refreshes asked for", ["reason"]), *_ANCHOR_REASONS
)
ANCHORS_REFRESHED = _from_zero(
    Counter("gpl_anchors_refreshed_total", "Anchor refreshes published", ["reason"]), *_ANCHOR_REASONS
)
ANCHOR_SECONDS = Histogram("gpl_anchor_generation_seconds", "Generating one batch of anchors", buckets=_DELAYS)
ANCHOR_REQUESTS_WAITING = Gauge("gpl_anchor_requests_waiting", "Anchor requests that wait for the generator")
ANCHOR_REQUEST_OLDEST = Gauge("gpl_anchor_request_oldest_seconds", "How long the longest waiting request has waited")
ANCHOR_REQUESTS_DEFERRED = Counter(
    "gpl_anchor_requests_deferred_total", "Anchor requests that found the budget spent or the breaker open", ["why"]
)
ANCHOR_REQUESTS_DROPPED = Counter(
    "gpl_anchor_requests_dropped_total", "Anchor requests that needed no answer of their own", ["why"]
)
ANCHOR_FAILURES = Counter("gpl_anchor_failures_total", "Batches that the generator failed or was slow with", ["kind"])
ANCHOR_BREAKER = Gauge(
    "gpl_anchor_breaker_state", "Circuit breaker around the generator: 0 closed, 1 half open, 2 open"
)
ANCHOR_AGE = Histogram(
    "gpl_anchor_age_seconds",
    "Event time from a user's anchors to the request that they label",
    buckets=(60, 600, 3600, 4 * 3600, 12 * 3600, 86400, 3 * 86400, 7 * 86400, 14 * 86400, 30 * 86400),
)
LATE_POSITIVES = Counter("gpl_late_positives_total", "Clicks behind the profile's cursor, not applied")

# Labels.
CATALOGUE_ITEMS = Gauge(
    "gpl_catalogue_items", "Items with a vector in this worker or scorer", multiprocess_mode="livemin"
)
INDEX_UNAVAILABLE = Counter("gpl_index_unavailable_total", "Calls that the index server did not answer, tried again")
OPEN_REQUESTS = Gauge("gpl_open_requests", "Requests whose window is not over")
RETAINED_REQUESTS = Gauge("gpl_retained_requests", "Requests held, open and correctable")
RETAINED_BYTES = Gauge("gpl_retained_bytes", "Estimated memory of requests and feedback held")
OVER_CAP = Gauge("gpl_over_cap", "1 while more is held than the caps of the labels role allow")
PAUSED_PARTITIONS = Gauge("gpl_paused_partitions", "Partitions not read because memory is at its cap", ["topic"])
PAUSES = Counter("gpl_pauses_total", "Times that a partition was paused because memory was at its cap", ["topic"])
LATE_RECALLS = Counter("gpl_late_recalls_total", "Recalls that came after their window and retention were over")
LABEL_STAGE_SECONDS = Counter("gpl_label_stage_seconds_total", "Processor time of the labels role by stage", ["stage"])
REQUESTS_CLOSED = _from_zero(
    Counter("gpl_requests_closed_total", "Requests labelled, first revisions", ["outcome"]), "labelled", "no_anchors"
)
LABELS = Counter("gpl_labels_total", "Labels published, first revisions and corrections", ["kind"])
LABEL_DELAY = Histogram(
    "gpl_label_delay_seconds",
    "From the Kafka time of the record that closed a request to its label's acknowledgement",
    buckets=_DELAYS,
)
CORRECTIONS = Counter("gpl_corrections_total", "Label revisions above 0", ["cause"])
ANCHORS_LOST = Counter(
    "gpl_anchors_lost_total", "Labels left as they were because the anchors that made them are compacted away"
)
LATE_FEEDBACK = Counter("gpl_late_feedback_total", "Feedback that arrived after its request had closed")
ORPHAN_FEEDBACK = Counter("gpl_orphan_feedback_total", "Feedback that joined no request")
DUPLICATES = Counter("gpl_duplicate_records_total", "Redelivered or repeated records, dropped", ["topic"])
CANDIDATES = Counter("gpl_candidates_total", "Candidates of labelled requests, at corrections again")
UNKNOWN_CANDIDATES = Counter("gpl_unknown_candidates_total", "Those of them without a vector, left out")

# Trainer.
TRAINER_STEPS = Counter("gpl_trainer_steps_total", "Optimizer steps")
TRAINER_RECORDS = Counter("gpl_trainer_records_total", "Label records trained on")
TRAINER_SKIPPED = Counter(
    "gpl_trainer_skipped_total",
    "Not trained on: items without a vector; records of another space; corrections behind the dedup window",
    ["reason"],
)
TRAINER_LAG_SECONDS = Gauge("gpl_trainer_lag_seconds", "Age, when it was trained on, of the newest label record")
IDS = Gauge("gpl_ids", "Ids in the pre-ranker's tables", ["table"])
IDS_FORGOTTEN = Counter("gpl_ids_forgotten_total", "Ids let go of: not seen for long, or over the cap", ["table"])
PSEUDO_LABEL_GAIN = Gauge(
    "gpl_pseudo_label_gain",
    "Progressive figures of the model less those of its twin on exposed labels only",
    ["metric"],
)
LABEL_EVIDENCE_WEIGHT = Gauge(
    "gpl_label_evidence_weight", "What evidence lets through of lambda: 0 trains without pseudo-labels, 1 as configured"
)
LABEL_EVIDENCE_EFFECT = Gauge(
    "gpl_label_evidence_effect",
    "Standard deviations of anchor score by which clicked items stand above others, and its lower confidence bound",
    ["bound"],
)
PROGRESSIVE_SLICE = Gauge(
    "gpl_progressive_slice",
    "Progressive validation by slice: all, head, tail, new, known; pseudo: against the pseudo-labels",
    ["metric", "model", "slice", "window"],
)
PROGRESSIVE = Gauge("gpl_progressive", "Progressive validation over the sliding window", ["metric", "model"])
CHECKPOINT_TIME = Gauge("gpl_checkpoint_timestamp_seconds", "When the last checkpoint was written")
MODELS_PUBLISHED = Counter("gpl_models_published_total", "Models published")
MODELS_PINNED = Gauge("gpl_models_pinned", "1 while a version is pinned, so that models are made and not announced")
PUBLICATIONS_REFUSED = _from_zero(
    Counter("gpl_publications_refused_total", "Models that the gate refused", ["reason"]),
    *("not_finite", "few_records", "one_class", "click_rate", "one_user", "regression", "drift"),
)
PUBLICATION_BLOCKED = Gauge("gpl_publication_blocked", "1 while the last attempt to publish was refused")
MODEL_AGE = Gauge("gpl_model_age_seconds", "Age, at publication, of the newest event in the published model")

# Scorer. With several processes behind one port a scrape adds them up; of a time it takes the oldest.
SCORE_SECONDS = Histogram(
    "gpl_score_seconds", "One score call", buckets=(0.0005, 0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5)
)
SCORE_REQUESTS = Counter("gpl_score_requests_total", "Score requests over HTTP", ["status"])
SCORE_CANDIDATES = Counter("gpl_score_candidates_total", "Candidates of score calls")
SCORE_UNKNOWN = Counter(
    "gpl_score_unknown_total", "Candidates without a vector; calls whose user the model, or the anchors, lack", ["what"]
)
MODEL_RELOADS = Counter("gpl_model_reloads_total", "Models taken into service")
MODEL_RELOAD_SECONDS = Histogram(
    "gpl_model_reload_seconds", "Reading a model and laying it out, while the one before serves", buckets=_DELAYS
)
MODELS_REFUSED = Counter("gpl_models_refused_total", "Announced models that the scorer could not take into service")
SERVED_MODEL_TIME = Gauge(
    "gpl_served_model_timestamp_seconds",
    "When the model in service was published",
    multiprocess_mode="livemin",
)


class AddressError(OSError):
    """An address that cannot be listened on; the message names the settings."""


class Health:
    """What ``/health`` and ``/ready`` answer from. Thread-safe."""

    def __init__(self, stalled_after: float = 60.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._stalled_after = stalled_after
        self._clock = clock
        self._beats: dict[str, float] = {}
        self._waiting: set[str] = set()
        self._halted: dict[str, str] = {}
        self._lock = threading.Lock()

    def beat(self, loop: str) -> None:
        """The named loop made a full round."""
        now = self._clock()
        with self._lock:
            self._beats[loop] = now
        HEARTBEAT.labels(loop).set_to_current_time()

    def wait_for(self, part: str) -> None:
        """The named part is warming up: not ready until ``done(part)``."""
        with self._lock:
            self._waiting.add(part)

    def done(self, part: str) -> None:
        with self._lock:
            self._waiting.discard(part)

    def halt(self, loop: str, reason: str) -> None:
        """The named loop works no more, on purpose, until the process is started again."""
        with self._lock:
            self._halted[loop] = reason
            self._beats.pop(loop, None)
        HALTED.labels(loop).set(1)

    def halted(self) -> dict[str, str]:
        """Loops that have halted, and why."""
        with self._lock:
            return dict(self._halted)

    def stalled(self) -> list[str]:
        """Loops that have not beaten for ``stalled_after`` seconds."""
        now = self._clock()
        with self._lock:
            return sorted(loop for loop, beat in self._beats.items() if now - beat > self._stalled_after)

    def waiting(self) -> list[str]:
        """Parts that are still warming up."""
        with self._lock:
            return sorted(self._waiting)


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True


class _QuietHandler(WSGIRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


def serve(host: str, port: int, health: Health) -> tuple[int, Callable[[], None]]:
    """Answer /metrics, /health and /ready in a daemon thread.

    Returns the port in use and a function that stops the server. Raises AddressError when the port is taken.
    """
    metrics_app = make_wsgi_app()

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        path = environ.get("PATH_INFO", "/")
        if path == "/metrics":
            result: Iterable[bytes] = metrics_app(environ, start_response)
            return result
        if path == "/health":
            problem: dict[str, Any] = {"stalled": health.stalled(), "halted": health.halted()}
        elif path == "/ready":
            problem = {"waiting": health.waiting()}
        else:
            start_response("404 Not Found", [("Content-Type", "text/plain")])
            return [b"/metrics, /health or /ready\n"]
        ok = not any(problem.values())
        status = "200 OK" if ok else "503 Service Unavailable"
        start_response(status, [("Content-Type", "application/json")])
        return [json.dumps({"ok": ok, **problem}).encode()]

    try:
        server = make_server(host, port, app, server_class=_Server, handler_class=_QuietHandler)
    except OSError as error:
        raise AddressError(f"metrics.host, metrics.port: {host}:{port}: {error.strerror}") from error
    thread = threading.Thread(target=server.serve_forever, name="metrics", daemon=True)
    thread.start()

    def stop() -> None:
        server.shutdown()
        server.server_close()

    return server.server_port, stop
