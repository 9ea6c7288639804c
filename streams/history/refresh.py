"""When a user's anchors are made anew: by drift, as the profiles role decides it, or on a timetable."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import msgspec

from streams.contracts import AnchorRequest, Feedback
from streams.profiles.state import AnchorsInForce, Positive, Profile, VectorOf, advance, answered, apply_positive
from streams.settings import ProfileSettings


class Refresh(Protocol):
    """Asks for anchors. Each request is answered before the next call."""

    def clicked(self, click: Feedback) -> Iterator[AnchorRequest]:
        """One click, in event-time order."""
        ...

    def passed(self, ts: int) -> Iterator[AnchorRequest]:
        """Event time has come to ``ts``: what falls due up to then."""
        ...

    def answer(self, user_id: str, anchors: AnchorsInForce) -> None:
        """The answer to the user's newest request."""
        ...

    def profiles(self) -> Iterator[Profile]:
        """The users' profiles now."""
        ...


class DriftRefresh:
    """The fold of the profiles role: cold, drift, stale, version. ``history``: positives that a request carries."""

    def __init__(
        self, settings: ProfileSettings, versions: tuple[str, str, str], vector_of: VectorOf, history: int
    ) -> None:
        self._settings = settings
        self._versions = versions
        self._vector_of = vector_of
        self._history = history
        self._profiles: dict[str, Profile] = {}
        self._anchors: dict[str, AnchorsInForce] = {}

    def clicked(self, click: Feedback) -> Iterator[AnchorRequest]:
        user = click.user_id
        profile = _applied(self._profiles.get(user) or Profile(user), click, self._settings)
        while True:
            profile, request = advance(
                profile, self._anchors.get(user), self._versions, self._vector_of, self._settings, self._history
            )
            self._profiles[user] = profile
            if request is None:
                return
            yield request
            profile = answered(profile, self._anchors[user])

    def passed(self, ts: int) -> Iterator[AnchorRequest]:
        yield from ()

    def answer(self, user_id: str, anchors: AnchorsInForce) -> None:
        self._anchors[user_id] = anchors

    def profiles(self) -> Iterator[Profile]:
        yield from self._profiles.values()


class TimetableRefresh:
    """Every ``period_ms`` of event time, all users with new positives since their last refresh (batch, as the paper).

    A request's reason is "stale", or "cold" for a user's first.
    """

    def __init__(self, settings: ProfileSettings, period_ms: int, history: int) -> None:
        self._settings = settings
        self._period = period_ms
        self._history = history
        self._profiles: dict[str, Profile] = {}
        self._changed: dict[str, None] = {}
        self._next: int | None = None

    def clicked(self, click: Feedback) -> Iterator[AnchorRequest]:
        user = click.user_id
        self._profiles[user] = _applied(self._profiles.get(user) or Profile(user), click, self._settings)
        self._changed[user] = None
        yield from ()

    def passed(self, ts: int) -> Iterator[AnchorRequest]:
        if self._next is None:
            self._next = (ts // self._period + 1) * self._period
        while ts >= self._next:
            due, self._changed = self._changed, {}
            for user in due:
                profile = self._profiles[user]
                if len(profile.positives) < self._settings.min_positives:
                    self._changed[user] = None
                    continue
                profile = msgspec.structs.replace(profile, sequence=profile.sequence + 1)
                self._profiles[user] = profile
                yield AnchorRequest(
                    user_id=user,
                    ts=self._next,
                    sequence=profile.sequence,
                    reason="cold" if profile.sequence == 1 else "stale",
                    positives=[p.item_id for p in profile.positives[-self._history :]],
                )
            # Periods in which nothing can have changed are passed over.
            self._next = max(self._next + self._period, ts // self._period * self._period)

    def answer(self, user_id: str, anchors: AnchorsInForce) -> None:
        pass

    def profiles(self) -> Iterator[Profile]:
        yield from self._profiles.values()


def _applied(profile: Profile, click: Feedback, settings: ProfileSettings) -> Profile:
    positive = Positive(click.ts, click.event_id, click.item_id)
    return apply_positive(profile, positive, settings.max_positives) or profile
