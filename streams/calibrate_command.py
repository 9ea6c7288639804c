"""``gpl calibrate``: the calibration of a running system, fitted anew on its own labels."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from rich.text import Text

from streams.cli_options import ConfigOption
from streams.contracts import Label, Recall
from streams.replay.command import FromOption, LastOption, ToOption, clear_errors, open_log, wanted_range

if TYPE_CHECKING:  # what reading the log needs takes a second to import
    from gpl.labels.calibration import Fitted
    from streams.replay.log import Log
    from streams.replay.select import Selection
    from streams.settings import Settings

_out = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)

Source = tuple[str, str, str | None, str]
"""Encoder, quantiser, generator and configuration: scores of two sources are on two scales."""


@dataclass(frozen=True)
class Request:
    """The exposed items with a score of one request: ``score`` and ``clicked`` (n,)."""

    revision: int
    user_id: str
    ts: int
    source: Source
    score: NDArray[np.float64]
    clicked: NDArray[np.float64]


@dataclass(frozen=True)
class Exposures:
    """Raw scores and clicks (n,) of exposed items."""

    score: NDArray[np.float64]
    clicked: NDArray[np.float64]

    @classmethod
    def of(cls, requests: list[Request]) -> Exposures:
        empty = np.zeros(0)
        return cls(
            np.concatenate([empty, *(r.score for r in requests)]),
            np.concatenate([empty, *(r.clicked for r in requests)]),
        )

    def check(self, which: str) -> None:
        """Raises LogError when there is too little to fit on, or to judge by: what `gpl fit` asks for."""
        from gpl.fit import MIN_CALIBRATION
        from streams.replay.log import LogError

        clicks = int(self.clicked.sum())
        fewest = min(clicks, len(self.clicked) - clicks)
        if len(self.clicked) < MIN_CALIBRATION or fewest < MIN_CALIBRATION // 10:
            raise LogError(
                f"{which}: {len(self.clicked)} exposed items with a score, {fewest} of the rarer kind (clicked, or "
                f"not); at least {MIN_CALIBRATION} and {MIN_CALIBRATION // 10} are needed"
            )


def calibrate(
    from_: FromOption = None,
    to: ToOption = None,
    last: LastOption = None,
    method: Annotated[
        Literal["platt", "isotonic", "none"] | None, typer.Option(help="default: the setting calibration.kind")
    ] = None,
    publish: Annotated[
        bool, typer.Option("--publish", help="put it in force, for recalls newer than the newest one")
    ] = False,
    config: ConfigOption = None,
) -> None:
    """Fit the calibration anew on the labels of a running system, and compare it with the one in force."""
    from gpl.artefacts import Artefacts
    from gpl.labels.calibration import fit_calibration
    from streams import calibrations
    from streams.contracts import calibration_record
    from streams.replay.log import LogError
    from streams.replay.select import newest_recall, resolve, time_text
    from streams.views import calibration_of

    wanted = wanted_range(from_, to, last)
    with clear_errors(), open_log(config, None) as (log, settings, _):
        selection = resolve(log, wanted, settings.labels)
        found = list(labelled(log, selection, settings))
        requests = [request for request in found if len(request.score)]
        if not requests:
            raise LogError(
                f"recalls of the range: {recalls(log, selection, settings):,}, labels: {len(found):,}, exposed items "
                f"with a score: 0; windows may be open (labels.window_seconds: {settings.labels.window_seconds:g}), "
                "and users without anchors have no scores"
            )
        # A new space, generator or configuration begins anew, and what is published is for that of now.
        fitted = Artefacts.load(settings.artefacts, with_generator=False)
        versions = (fitted.space.version, fitted.quantiser.version, fitted.generator.version)
        kept = [r for r in requests if r.source == (*versions, settings.fingerprint())]
        if not kept:
            raise LogError(
                f"none of {len(requests):,} requests was labelled by what {settings.artefacts} and the settings in "
                "force say; after a refit users have anchors from their next click on"
            )
        held = [r for r in kept if held_out(r.user_id)]
        fitted_on, judged_on = Exposures.of([r for r in kept if not held_out(r.user_id)]), Exposures.of(held)
        fitted_on.check("to fit on")
        judged_on.check("held out, of a fifth of the users")
        # In force from the next recall on: what has been asked for keeps the calibration that it was labelled with.
        now = newest_recall(log, settings.labels) + 1
        before = calibrations.in_force(settings.kafka, now)
        after = fit_calibration(method or settings.calibration.kind, fitted_on.score, fitted_on.clicked)
        oldest, newest = min(r.ts for r in kept), max(r.ts for r in kept)
        record = calibration_record(after.to_dict(), now)
        left_out = len(requests) - len(kept)
        _out.print(
            f"{len(kept):,} requests from {time_text(oldest)} to {time_text(newest)}"
            + (f"; {left_out:,} of another space, generator or configuration left out" if left_out else "")
        )
        _out.print(f"fitted on {_said(fitted_on)}")
        _out.print(f"held out  {_said(judged_on)}: of a fifth of the users, by a hash of their id")
        table = Table("on what was held out", "kind", "version", "log loss", "ECE", box=None)
        version = "" if before is None else before.version
        now_loss = _row(table, "in force", calibration_of(before), version, judged_on)
        loss = _row(table, "fitted", after, record.version, judged_on)
        _out.print(table)
        if before is not None and before.version == record.version:
            _out.print("Nothing was published: it is in force already.")
            return
        if not publish:
            _out.print("Nothing was published. --publish puts the fitted one in force.")
            return
        # `none` is chosen, not fitted: no click can have misled it.
        if record.kind != "none" and loss > now_loss:
            raise LogError(
                f"nothing was published: the fitted one has the log loss {loss:.4f} on what was held out, the one in "
                f"force {now_loss:.4f}; fit on another range or with another --method"
            )
        calibrations.publish(settings.kafka, after, now)
        _out.print(Text(f"published {record.version}, in force for recalls from {time_text(now)} on"))


def held_out(user_id: str) -> bool:
    """Whether a user is of the fifth that is not fitted on: a user's clicks are never on both sides."""
    return int.from_bytes(hashlib.blake2b(user_id.encode(), digest_size=8).digest()) % 5 == 0


def labelled(log: Log, selection: Selection, settings: Settings) -> Iterator[Request]:
    """The requests of the selection that have a label, each as its newest one on the log says.

    The caller holds them: some 0.5 KB a request of the range.
    """
    from streams.replay.recorded import CLOCK_SKEW_MS, label_of

    # A recall may be ahead of its Kafka time by so much, and its label comes after it.
    since = selection.from_ms - int(settings.labels.max_ahead_seconds * 1000) - CLOCK_SKEW_MS
    for partition in log.partitions("labels"):
        newest: dict[str, Request] = {}
        for entry in log.read("labels", partition, log.offset_at("labels", partition, since)):
            label = label_of(entry)
            if label is None or not selection.label(label):
                continue
            known = newest.get(label.request_id)
            if known is None or label.revision > known.revision:
                newest[label.request_id] = _request(label)
        yield from newest.values()


def recalls(log: Log, selection: Selection, settings: Settings) -> int:
    """How many recalls of the selection the labels role takes."""
    from streams.replay.log import taken

    ahead = settings.labels.max_ahead_seconds
    since, count = selection.from_ms - int(ahead * 1000), 0
    for partition in log.partitions("recalls"):
        for entry in log.read("recalls", partition, log.offset_at("recalls", partition, since)):
            recall = taken(entry, Recall, ahead)
            count += recall is not None and selection.recall(partition, entry.offset, recall)
    return count


def _request(label: Label) -> Request:
    exposed, made_by = label.exposed, label.provenance
    pairs = [(s, c) for s, c in zip(exposed.score, exposed.clicked, strict=True) if s is not None]
    columns = np.array(pairs, np.float64).reshape(-1, 2)
    source = (made_by.encoder, made_by.quantiser, made_by.generator, made_by.config)
    return Request(label.revision, label.user_id, label.ts, source, columns[:, 0], columns[:, 1])


def _said(exposures: Exposures) -> str:
    return f"{len(exposures.clicked):,} exposed items, {exposures.clicked.mean():.1%} clicked"


def _row(table: Table, name: str, calibration: Fitted, version: str, judged_on: Exposures) -> float:
    """Adds the row; its log loss."""
    from gpl.evaluation.metrics import calibration_error, log_loss

    labels = calibration.apply(judged_on.score.astype(np.float32))
    loss, error = (float(of(judged_on.clicked, labels)) for of in (log_loss, calibration_error))
    table.add_row(name, calibration.to_dict()["kind"], version, f"{loss:.4f}", f"{error:.4f}")
    return loss
