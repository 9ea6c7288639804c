"""One run of ``gpl replay``: replay, write, compare, and answer what was asked of other settings."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streams.labels.code import code_version
from streams.replay.compare import Comparison, compare
from streams.replay.log import Log
from streams.replay.output import Output
from streams.replay.refreshes import refreshes
from streams.replay.report import comparison_document, selection_document
from streams.replay.run import Replay, Setup
from streams.replay.select import Selection
from streams.replay.training import Spool, trained
from streams.replay.whatif import WhatIf
from streams.settings import Settings


@dataclass(frozen=True)
class Run:
    """What a run came to. ``document``: JSON-ready; ``comparison``: None without one."""

    document: dict[str, Any]
    comparison: Comparison | None

    @property
    def empty(self) -> bool:
        """Whether neither a recall nor a recorded label was of the selection."""
        recorded = self.comparison is not None and bool(self.comparison.only_recorded.reasons)
        return not recorded and not any(self.document["requests"].values())


def execute(
    log: Log,
    selection: Selection,
    settings: Settings,
    asked: WhatIf,
    outputs: Sequence[Output],
    compared: bool,
    ahead_ms: int | None,
    top: int,
) -> Run:
    """Replay the selection as asked. ``settings``: those in force, which recorded labels may name."""
    started = time.monotonic()
    setup, beside = Setup.of(asked.settings, log.frame), []
    if asked.labels:
        beside = [Setup.of(settings, log.frame)]
    replay = Replay(log, selection, setup, *beside, ahead_ms=ahead_ms)
    loaded = time.monotonic()
    spool = Spool() if asked.trainer else None
    output = _All([*outputs, *([spool] if spool is not None else [])])
    comparison = None
    if compared:
        comparison = compare(replay, output, top)
    else:
        for result in replay:
            output.write(result)
    about = _about(replay, selection, asked)
    output.finish(about)
    changes = {"labels": asked.labels, "trainer": asked.trainer, "profiles": asked.profiles}
    document: dict[str, Any] = {
        **about,
        "set": {f"{section}.{name}": value for section, some in changes.items() for name, value in some.items()},
    }
    document["written_to"] = [one.name for one in outputs]
    document["rate"] = _rate(replay, loaded - started, time.monotonic() - started)
    document["comparison"] = None if comparison is None else comparison_document(comparison)
    document["training"] = document["refreshes"] = None
    items = replay.items.catalogue
    if spool is not None:
        try:
            document["training"] = trained(spool, log.frame, items, settings.trainer, asked.settings.trainer)
        finally:
            spool.close()
    if asked.profiles:

        def vector_of(item: str) -> NDArray[np.float32] | None:
            known, vectors = items.lookup([item])
            return vectors[0] if known else None

        document["refreshes"] = refreshes(log, selection, settings, asked.settings, vector_of)
    return Run(document, comparison)


class _All:
    """Several outputs as one."""

    name = "all"

    def __init__(self, outputs: Sequence[Output]) -> None:
        self._outputs = outputs

    def write(self, result: Any) -> None:
        for output in self._outputs:
            output.write(result)

    def finish(self, about: Any) -> None:
        for output in self._outputs:
            output.finish(about)


def _about(replay: Replay, selection: Selection, asked: WhatIf) -> dict[str, Any]:
    """What is the same whenever, and from wherever, the same is replayed."""
    progress, frame = replay.progress, replay.log.frame
    return {
        "selection": selection_document(selection),
        "labels": asked.settings.labels.model_dump(mode="json"),
        "versions": {
            "encoder": frame.encoder,
            "quantiser": frame.quantiser,
            "config": asked.settings.fingerprint(),
            "code": code_version(),
        },
        "requests": {name: progress.requests[name] for name in ("labelled", "no_anchors", "not_replayable")},
        "item_labels": {name: progress.labels[name] for name in ("exposed", "unexposed")},
        "warnings": _warnings(replay),
    }


def _warnings(replay: Replay) -> list[str]:
    found = []
    if replay.calibrations.incomplete:
        found.append(
            "calibrations were compacted: a version that was published again under the same name is in force from its "
            "newest time only"
        )
    if replay.items.foreign:
        found.append(f"{replay.items.foreign} item vectors are of another space than the artefacts' and were left out")
    return found


def _rate(replay: Replay, loading: float, seconds: float) -> dict[str, Any]:
    """Speed: events are the recalls and feedback read; event time is what the chosen recalls span."""
    progress = replay.progress
    low, high = progress.event_ms or (0, 0)
    events, replaying = sum(progress.read.values()), max(seconds - loading, 1e-9)
    requests = sum(progress.requests.values())
    return {
        "seconds": round(seconds, 3),
        "loading_seconds": round(loading, 3),
        "events": events,
        "events_per_second": round(events / replaying, 1),
        "requests_per_second": round(requests / replaying, 1),
        "bytes": sum(progress.bytes.values()),
        "refused": dict(progress.refused),
        "event_seconds": (high - low) / 1000,
        "times_real_time": round((high - low) / 1000 / max(seconds, 1e-9), 1),
    }
