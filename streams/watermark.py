"""Event-time progress of one partition that several topics share."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

NEVER = -1
"""Before every event."""
END = 2**62
"""After every event: all sources are idle."""


class Watermark:
    """No event older than this is expected: the least, over the sources, of the largest event time seen less the
    allowed lateness. A source that has been idle stops counting; when all are idle everything is due.

    It never falls: a source that wakes up with older events delivers late ones.
    """

    def __init__(self, sources: Iterable[str], lateness_ms: int) -> None:
        self._lateness = lateness_ms
        self._newest: dict[str, int] = dict.fromkeys(sources, NEVER)
        self._idle: set[str] = set()
        self._value = NEVER

    def observe(self, source: str, ts: int) -> None:
        """An event of ``source`` with event time ``ts`` was read."""
        self._idle.discard(source)
        self._newest[source] = max(self._newest[source], ts)

    def idle(self, source: str) -> None:
        """The source is at its end and has been quiet for the idle timeout."""
        self._idle.add(source)

    def newest(self, source: str) -> int:
        """Largest event time read from the source; NEVER before the first."""
        return self._newest[source]

    def is_idle(self, source: str) -> bool:
        """Whether the source does not count at present."""
        return source in self._idle

    @property
    def event_time(self) -> int:
        """The newest value that events alone gave; NEVER before the first."""
        return self._value

    def value(self) -> int:
        """Milliseconds since the epoch; NEVER before the first event, END when every source is idle."""
        active = [ts for source, ts in self._newest.items() if source not in self._idle]
        if not active:
            # What is known is over; events that come later count from what they say themselves.
            return END
        if min(active) != NEVER:
            self._value = max(self._value, min(active) - self._lateness)
        return self._value


class Delayed:
    """The value that something monotone had a while of wall time ago."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._past: deque[tuple[float, int]] = deque()
        self._value = NEVER

    def at(self, now: float, value: int) -> int:
        """Note ``value`` at wall time ``now`` (seconds) and tell what it was; NEVER before that is known."""
        if not self._past or value > self._past[-1][1]:
            self._past.append((now, value))
        while self._past and self._past[0][0] <= now - self._seconds:
            self._value = self._past.popleft()[1]
        return self._value
