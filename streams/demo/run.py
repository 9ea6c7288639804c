"""The demo's driver: real parts as processes, the data through the real topics, and a report at the end.

In the order of events: broker and topics, workers and trainer (``processes``), items, then recalls and
feedback at their pace (``stream``), while what comes out is followed (``follow``), watched (``monitor``) and shown
(``live``). Every wait ends by a condition or a deadline, and whatever was started is stopped.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from streams import topics
from streams.broker.local import LocalBroker
from streams.broker.select import choose, open_broker
from streams.contracts import Item
from streams.data.reader import records
from streams.demo import figures, report
from streams.demo.config import Place, install
from streams.demo.follow import FILES, Follower, Outcome, Recorder
from streams.demo.live import LiveView, readable
from streams.demo.monitor import Monitor
from streams.demo.processes import Parts
from streams.demo.ready import DemoError, Options, Ready, ensure_fitted, get_ready
from streams.demo.stream import Pacer, Sender, send_items
from streams.demo.summary import Run

_START_SECONDS = 120.0
_ITEMS_PER_SECOND = 50  # the slowest encoding of new texts that is waited for
_STALL_SECONDS = 120.0
_QUIET_SECONDS = 2.0
_HOLD_AT = 4_000  # records that the workers may be behind before the producer waits for them


def run(options: Options, console: Console) -> dict[str, Any]:
    """The whole demo; the document of ``report.json``.

    Raises DemoError, BrokerError, DatasetMissingError, ProcessEndedError.
    """
    started, started_at = time.monotonic(), datetime.now(UTC)
    view = LiveView(console)
    choice = choose(options.broker)
    ready = get_ready(options, view.say)
    # Own names on the broker, so that runs on one broker do not meet.
    place = Place(options.directory.absolute(), f"gpl-demo-{started_at:%Y%m%d-%H%M%S}")
    broker = open_broker(choice, ready.settings.kafka, place.directory / "broker")
    if choice.kind == "external":
        broker.start()  # it answers, or minutes of fitting are for nothing
    ensure_fitted(options, ready)
    prepared = time.monotonic()
    _clear(place.directory)
    view.say(f"broker: {choice.description}, {choice.reason}")
    with ExitStack() as stack:
        stack.enter_context(broker)
        settings = install(place, ready.document, ready.fit, broker.bootstrap)
        topics.create(settings.kafka)
        recorder = Recorder(place.directory, settings.kafka.prefix)
        stack.callback(recorder.close)
        parts = stack.enter_context(Parts(place.directory / "logs"))
        parts.start("worker", "worker", "all")
        parts.start("trainer", "train")
        follower = Follower(settings.kafka, recorder)
        stack.callback(follower.close)
        sender = Sender(settings.kafka)
        stack.callback(sender.close)
        stage = _Stage(ready, view, parts, follower, recorder.outcome, sender, started)
        stage.fill_catalogue(settings.kafka.max_record_bytes)
        monitor = Monitor(parts, broker.pid if isinstance(broker, LocalBroker) else None)
        stream_seconds, held_seconds = stage.stream(monitor)
        stage.finish()
    outcome = recorder.outcome
    known = Run(
        source="MovieLens-100K" if options.data is None else str(options.data),
        simulated=options.data is None,
        started_at=started_at.isoformat(timespec="seconds"),
        broker=choice.description,
        broker_reason=choice.reason,
        sent=sender.sent,
        refused=sender.refused,
        items=len(outcome.vectors),
        requests=len(ready.timeline.requests),
        speed=ready.speed,
        window_seconds=settings.labels.window_seconds,
        train_fraction=options.train_fraction,
        versions=outcome.versions,
        seconds={
            "prepare": prepared - started,
            "first_label": _since(started, outcome.first_label_at),
            "first_pseudo_label": _since(started, outcome.first_pseudo_label_at),
            "stream": stream_seconds,
            "held_back": held_seconds,
            "total": time.monotonic() - started,
        },
        peak_memory_mib=monitor.peak_memory_mib,
        series=monitor.series,
    )
    document = report.write(place.directory, known, outcome, figures.read(place.journal))
    console.print(report.table(document))
    console.print(Text(f"\nreport: {options.directory / 'report.html'} and report.json beside it"))
    return document


def _clear(directory: Path) -> None:
    """Take away what the run before left, by name; what was prepared stays, and so does whatever is not a demo's."""
    for name in ("state", "models", "logs", "broker"):
        shutil.rmtree(directory / name, ignore_errors=True)
    for name in (Place(directory, "").journal.name, *FILES.values()):
        (directory / name).unlink(missing_ok=True)


class _Stage:
    """What happens between the start of the processes and their end. ``started``: monotonic, of the command."""

    def __init__(
        self,
        ready: Ready,
        view: LiveView,
        parts: Parts,
        follower: Follower,
        outcome: Outcome,
        sender: Sender,
        started: float,
    ) -> None:
        self._ready = ready
        self._view = view
        self._parts = parts
        self._follower = follower
        self._outcome = outcome
        self._sender = sender
        self._started = started
        self._to_show = ["first_label", "first_pseudo_label"]

    def fill_catalogue(self, max_bytes: int) -> None:
        """Send the items; wait until each item has a vector or is a dead letter, and all is ready."""
        ids = send_items(self._sender, self._ready.data / "items.jsonl", max_bytes)
        outcome = self._outcome
        limit = _START_SECONDS + len(ids) / _ITEMS_PER_SECOND
        self._wait("vectors of all items", lambda: ids <= outcome.vectors | outcome.dead_items, limit)
        self._view.say(f"catalogue: {len(outcome.vectors):,} items in the frozen space")
        self._wait(
            "readiness of workers and trainer",
            lambda: all(part.ready() for part in self._parts.running.values()),
            _START_SECONDS,
        )

    def _wait(self, what: str, condition: Callable[[], bool], seconds: float) -> None:
        """Follow the topics until the condition holds. Raises DemoError with the ends of the logs when it does not."""
        deadline = time.monotonic() + seconds
        while not condition():
            self._follower.poll(0.1)
            self._parts.check()
            if time.monotonic() > deadline:
                raise DemoError(f"{what}: not within {seconds:.0f} s\n{self._parts.logs()}")

    def stream(self, monitor: Monitor) -> tuple[float, float]:
        """Recalls and feedback at their pace, until every request has its label and the trainer has read them all.

        When the workers fall behind, the producer waits: a delay then tells of the system, not of the speed-up.
        Returns how long the sending took, and how much of that it was held back, in seconds.
        """
        timeline, outcome = self._ready.timeline, self._outcome
        self._view.say(
            f"streaming {timeline.recalls:,} recalls and {timeline.feedback:,} feedback events, "
            f"{self._ready.speed:,.0f} event seconds a second"
        )
        pacer = Pacer(self._sender, timeline, self._ready.speed)
        started = time.monotonic()
        sent_at: float | None = None
        pacer.start()
        try:
            with self._view:
                while sent_at is None or not self._over(monitor):
                    self._follower.poll(0.2)
                    self._parts.check()
                    if pacer.error is not None:
                        raise DemoError(f"the producer failed: {pacer.error!r}") from pacer.error
                    self._show_firsts()
                    if monitor.sample(self._sender, outcome):
                        behind = monitor.lag or 0.0
                        pacer.held = behind > (_HOLD_AT / 2 if pacer.held else _HOLD_AT)
                        self._view.update(monitor.progress(timeline, self._sender, pacer, outcome))
                    if sent_at is None and not pacer.is_alive():
                        sent_at = time.monotonic()
                    self._check_progress(sent_at is not None or pacer.held, sent_at or started)
        finally:
            pacer.stop()
            pacer.join(10)
        return sent_at - started, pacer.held_seconds

    def _check_progress(self, waiting: bool, since: float) -> None:
        """Raise DemoError when we wait for the system and nothing has come out of it for too long."""
        labels = self._ready.settings.labels
        idle = labels.idle_timeout_wall_seconds or labels.window_seconds + labels.allowed_lateness_seconds
        limit = _STALL_SECONDS + idle
        if not waiting or time.monotonic() - max(since, self._follower.newest_at) < limit:
            return
        requests = self._ready.timeline.requests
        missing = sorted(requests - self._outcome.requests.keys() - self._outcome.dead_requests)
        raise DemoError(
            f"nothing came out for {limit:.0f} s; {len(missing)} of {len(requests)} requests have no label, among them "
            f"{missing[:3]}; {self._outcome.label_records} label records are on the log\n{self._parts.logs()}"
        )

    def _over(self, monitor: Monitor) -> bool:
        """Every request has its answer, nothing more comes, and the trainer has read every label."""
        requests = self._ready.timeline.requests
        return (
            time.monotonic() - self._follower.newest_at > _QUIET_SECONDS
            and self._outcome.answered(requests) == len(requests)
            and monitor.labels_trained() >= self._outcome.label_records
        )

    def _show_firsts(self) -> None:
        """Say when the first label came, and show the first that has pseudo-labels."""
        outcome = self._outcome
        if "first_label" in self._to_show and outcome.first_label_at is not None:
            self._to_show.remove("first_label")
            self._view.say(f"first label after {outcome.first_label_at - self._started:.1f} s")
        label = outcome.first_pseudo_label
        if "first_pseudo_label" in self._to_show and label is not None and outcome.first_pseudo_label_at is not None:
            self._to_show.remove("first_pseudo_label")
            shown = {*label.exposed.item, *label.unexposed.item}
            items = records(self._ready.data / "items.jsonl", Item, self._ready.settings.kafka.max_record_bytes)
            texts = {item.item_id: item.text for item in items if item.item_id in shown and item.text.strip()}
            after = outcome.first_pseudo_label_at - self._started
            self._view.say(f"first pseudo-labels after {after:.1f} s: {readable(label, texts)}")

    def finish(self) -> None:
        """End the trainer in order (final checkpoint, last publication), then the workers; read what they left."""
        for name in ("trainer", "worker"):
            if not self._parts.stop(name, grace=60.0):
                self._view.say(f"the {name} had to be killed; its log is {name}.log in logs")
        self._follower.catch_up()


def _since(start: float, moment: float | None) -> float | None:
    return None if moment is None else moment - start
