"""What other drift settings would have done: the profiles' fold run again over the clicks of the log.

Refreshes that were really made are answered with their anchors. One that was never made has no answer in the log; the
fold then goes on with the anchors that were in force. So the first refresh of a user that differs is exact, and what
follows it is an estimate: both are counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np

from streams.contracts import AnchorRequest, Feedback, decode
from streams.profiles.state import AnchorsInForce, Positive, Profile, VectorOf, advance, answered, apply_positive
from streams.replay.log import Log, taken
from streams.replay.select import Selection, time_text
from streams.replay.state import AnchorHistory, Refresh
from streams.settings import ProfileSettings, Settings
from streams.views import vectors_from

_LISTED = 50
_Key = tuple[str, int]


@dataclass
class Asked:
    """Refreshes that a fold asks for in the range: (user, ts) -> reason. ``assumed``: those without an answer in the
    log."""

    reasons: dict[_Key, str] = field(default_factory=dict)
    assumed: set[_Key] = field(default_factory=set)

    def by_reason(self) -> dict[str, int]:
        return dict(sorted(Counter(self.reasons.values()).items()))


def refreshes(
    log: Log, selection: Selection, in_force: Settings, asked: Settings, vector_of: VectorOf
) -> dict[str, Any]:
    """The refreshes under both settings and those on the log, JSON-ready. ``vector_of``: of the catalogue as it is."""
    folds = [(settings.profiles, Asked()) for settings in (in_force, asked)]
    recorded: dict[_Key, str] = {}
    begins = False
    for partition in log.partitions("feedback"):
        oldest = next(log.read("feedback", partition), None)
        begins = begins or (oldest is not None and oldest.offset > 0)
        recorded.update(_recorded(log, partition, selection))
        anchors = AnchorHistory(log, partition, selection.user)
        for user, clicks in _clicks(log, partition, selection, in_force.labels.max_ahead_seconds).items():
            for settings, found in folds:
                made = _fold(user, clicks, anchors, settings, in_force.generator.history, vector_of, log.frame.dim)
                for request, exact in made:
                    if selection.from_ms <= request.ts < selection.to_ms:
                        found.reasons[user, request.ts] = request.reason
                        if not exact:
                            found.assumed.add((user, request.ts))
    now, then = (found for _, found in (folds[1], folds[0]))
    more, fewer = sorted(now.reasons.keys() - then.reasons.keys()), sorted(then.reasons.keys() - now.reasons.keys())
    same = recorded.items() & then.reasons.items()
    return {
        "recorded": dict(sorted(Counter(recorded.values()).items())),
        "in_force": then.by_reason(),
        "asked": now.by_reason(),
        "reproduced": len(same),
        "recorded_total": len(recorded),
        "more": len(more),
        "fewer": len(fewer),
        "estimated": len(now.assumed),
        "users_changed": len({user for user, _ in (*more, *fewer)}),
        "examples": [
            {"user_id": user, "ts": ts, "time": time_text(ts), "reason": source.reasons[user, ts], "change": change}
            for change, keys, source in (("more", more, now), ("fewer", fewer, then))
            for user, ts in keys[:_LISTED]
        ],
        "notes": _notes(begins, selection),
    }


def _notes(begins: bool, selection: Selection) -> list[str]:
    notes = [
        "a refresh that was never made has no anchors in the log: after a user's first one that differs, the fold goes "
        "on with those that were in force",
        "refreshes for a new version of generator, quantiser or encoder are left out",
    ]
    if begins:
        notes.append(
            "older feedback is not in this log (expired, not captured), so profiles start empty where it begins"
        )
    return notes


def _recorded(log: Log, partition: int, selection: Selection) -> Iterator[tuple[_Key, str]]:
    for entry in log.read("anchor-requests", partition):
        try:
            request = decode(AnchorRequest, entry.value or b"")
        except msgspec.DecodeError:
            continue
        wanted = selection.user in (None, request.user_id) and selection.from_ms <= request.ts < selection.to_ms
        if wanted and request.reason != "version":
            yield (request.user_id, request.ts), request.reason


def _clicks(log: Log, partition: int, selection: Selection, max_ahead: float) -> dict[str, list[Positive]]:
    """Each user's clicks before the end of the range, in the order in which they are applied."""
    found: dict[str, dict[tuple[int, str], Positive]] = {}
    for entry in log.read("feedback", partition):
        if entry.event_ms is not None:
            continue
        event = taken(entry, Feedback, max_ahead)
        if event is None or event.kind != "click":
            continue
        if selection.user in (None, event.user_id) and event.ts < selection.to_ms:
            click = Positive(event.ts, event.event_id, event.item_id)
            found.setdefault(event.user_id, {})[event.ts, event.event_id] = click
    return {user: [clicks[at] for at in sorted(clicks)] for user, clicks in sorted(found.items())}


def _fold(
    user: str,
    clicks: list[Positive],
    anchors: AnchorHistory,
    settings: ProfileSettings,
    history: int,
    vector_of: VectorOf,
    dim: int,
) -> Iterator[tuple[AnchorRequest, bool]]:
    """Requests in order, and whether the log has the answer to each."""
    profile, in_force = Profile(user), None
    answers = anchors.of(user)
    for click in clicks:
        after = apply_positive(profile, click, settings.max_positives)
        if after is None:
            continue
        profile = after
        while True:
            versions = in_force.versions if in_force is not None else ("", "", "")
            profile, request = advance(profile, in_force, versions, vector_of, settings, history)
            if request is None:
                break
            known = [refresh for refresh in answers if refresh.record.ts <= request.ts]
            yield request, bool(known) and known[-1].record.ts == request.ts
            in_force = _answer(known[-1] if known else None, request, dim)
            profile = answered(profile, in_force)


def _answer(refresh: Refresh | None, request: AnchorRequest, dim: int) -> AnchorsInForce:
    """The anchors of a refresh as the answer to a request; none where there is no refresh."""
    vectors = np.zeros((0, dim), np.float32) if refresh is None else vectors_from(refresh.record.vectors, dim)
    versions = ("", "", "")
    if refresh is not None:
        versions = (refresh.record.generator, refresh.record.quantiser, refresh.record.encoder)
    return AnchorsInForce(request.sequence, request.ts, versions, vectors)
