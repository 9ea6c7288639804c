"""A user's profile: recent positives, and whether the anchors still explain them. Pure: a fold over the log.

Clicks are applied in the order of (ts, event_id), each at most once: what is at or below the cursor was applied before
(or came too late). While an anchor request is unanswered its user's clicks wait in ``positives`` untested, and are
tested once the answer is there. So which refreshes are asked for does not depend on how fast the generator is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from streams.contracts import AnchorRequest, Record
from streams.profiles.drift import PageHinkley
from streams.settings import ProfileSettings

Vector = NDArray[np.float32]
VectorOf = Callable[[str], Vector | None]

MIN_DRIFT_VALUES = 5
"""Clicks since the last refresh below which drift is not judged."""


# Millions of these are held and none can be in a cycle: ``gc=False`` spares the garbage collector the walk.
class Positive(Record, frozen=True, array_like=True, gc=False):
    """One click, in the order of its fields."""

    ts: int
    event_id: str
    item_id: str


class Profile(Record, frozen=True, gc=False):
    """State of one user, ``gpl.profiles`` (compacted).

    ``positives``: oldest first; the first ``tested`` of them have been looked at for drift. ``cursor``: (ts, event_id)
    of the newest click applied. ``sequence``: anchor requests so far; ``pending``: the newest is unanswered.
    """

    user_id: str
    cursor: tuple[int, str] = (-1, "")
    positives: tuple[Positive, ...] = ()
    tested: int = 0
    sequence: int = 0
    pending: bool = False
    requested_ts: int | None = None
    drift: PageHinkley = PageHinkley()


class AnchorsInForce(msgspec.Struct, frozen=True, gc=False):
    """What the fold needs of a user's newest anchors. ``vectors``: (K, dim), K may be 0."""

    version: int
    ts: int
    versions: tuple[str, str, str]
    vectors: Vector


def further(one: Profile | None, other: Profile) -> Profile:
    """Of two states of a user the one that has come further, whichever was written last.

    What a worker sent before it died or was cut off may be appended after its successor's states: on the wire, the
    last word is not the newest.
    """

    def how_far(profile: Profile) -> tuple[tuple[int, str], int, int, bool]:
        return profile.cursor, profile.sequence, profile.tested, not profile.pending

    return other if one is None or how_far(other) >= how_far(one) else one


def apply_positive(profile: Profile, positive: Positive, max_positives: int) -> Profile | None:
    """The profile with one more click; None when it is at or below the cursor."""
    cursor = (positive.ts, positive.event_id)
    if cursor <= profile.cursor:
        return None
    positives = (*profile.positives, positive)
    dropped = max(0, len(positives) - max_positives)
    return msgspec.structs.replace(
        profile, cursor=cursor, positives=positives[dropped:], tested=max(0, profile.tested - dropped)
    )


def answered(profile: Profile, anchors: AnchorsInForce) -> Profile:
    """The profile once the request that ``anchors`` answer is; the same profile when it knows that already.

    A profile that has not made that request yet is one whose newest states were lost, in a crash after the request.
    What they said of it follows from the answer, whose ``ts`` is that of the click that asked.
    """
    if anchors.version < profile.sequence or (anchors.version == profile.sequence and not profile.pending):
        return profile
    return msgspec.structs.replace(
        profile, sequence=anchors.version, requested_ts=anchors.ts, pending=False, drift=PageHinkley()
    )


def advance(
    profile: Profile,
    anchors: AnchorsInForce | None,
    versions: tuple[str, str, str],
    vector_of: VectorOf,
    settings: ProfileSettings,
    history: int,
) -> tuple[Profile, AnchorRequest | None]:
    """Test the clicks that are not tested yet, up to the first that asks for a refresh; the same profile without any.

    ``anchors``: the answer to the newest request, None before the first. ``versions``: generator, quantiser and
    encoder of this process. ``history``: positives that a request carries.
    """
    drift, tested = profile.drift, profile.tested
    while tested < len(profile.positives) and not profile.pending:
        positive = profile.positives[tested]
        tested += 1
        if profile.requested_ts is not None and positive.ts <= profile.requested_ts:
            # Of the same millisecond as the click that asked; or read again after a crash (see `answered`).
            continue
        miss = _miss(anchors, vector_of(positive.item_id))
        if miss is not None:
            drift = drift.update(miss, settings.drift_delta)
        reason = _reason(profile, positive.ts, tested, anchors, versions, drift, settings)
        if reason is not None:
            sequence = profile.sequence + 1
            request = AnchorRequest(
                user_id=profile.user_id,
                ts=positive.ts,
                sequence=sequence,
                reason=reason,
                positives=[p.item_id for p in profile.positives[max(0, tested - history) : tested]],
                miss=_mean_miss(profile.positives[max(0, tested - MIN_DRIFT_VALUES) : tested], anchors, vector_of),
            )
            profile = msgspec.structs.replace(
                profile, drift=drift, tested=tested, sequence=sequence, pending=True, requested_ts=positive.ts
            )
            return profile, request
    if tested == profile.tested:
        return profile, None
    return msgspec.structs.replace(profile, drift=drift, tested=tested), None


def _miss(anchors: AnchorsInForce | None, click: Vector | None) -> float | None:
    """The anchor miss of a click: 1 - max_k cos(click, a_k), in [0, 2]."""
    if anchors is None or click is None or len(anchors.vectors) == 0:
        return None
    return 1.0 - float((anchors.vectors @ click).max())


def _mean_miss(positives: tuple[Positive, ...], anchors: AnchorsInForce | None, vector_of: VectorOf) -> float | None:
    misses = [miss for p in positives if (miss := _miss(anchors, vector_of(p.item_id))) is not None]
    return round(sum(misses) / len(misses), 6) if misses else None


def _reason(
    profile: Profile,
    ts: int,
    positives: int,
    anchors: AnchorsInForce | None,
    versions: tuple[str, str, str],
    drift: PageHinkley,
    settings: ProfileSettings,
) -> Literal["cold", "drift", "stale", "version"] | None:
    if profile.requested_ts is not None and ts - profile.requested_ts < settings.min_interval_seconds * 1000:
        return None
    if anchors is None or len(anchors.vectors) == 0:
        return "cold" if positives >= settings.min_positives else None
    if anchors.versions != versions:
        return "version"
    if ts - anchors.ts > settings.max_age_seconds * 1000:
        return "stale"
    if drift.alarm(settings.drift_threshold, MIN_DRIFT_VALUES):
        return "drift"
    return None
