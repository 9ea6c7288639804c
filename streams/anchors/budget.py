"""What the generator may cost: refreshes a minute, and no calls at all while it fails."""

from __future__ import annotations

from typing import Literal

State = Literal["closed", "half_open", "open"]


class Budget:
    """A token bucket of refreshes: ``per_minute`` flow in evenly, after a pause at most ``burst`` are at hand.

    So in any minute at most ``per_minute + burst``. ``per_minute`` 0: no bound.
    """

    def __init__(self, per_minute: int, burst: int) -> None:
        self._rate = per_minute / 60
        self._burst = float(burst)
        self._tokens = float(burst)
        self._at: float | None = None

    def available(self, now: float) -> int | None:
        """Refreshes that may be made now; None: any number. ``now``: monotonic seconds."""
        if not self._rate:
            return None
        elapsed = 0.0 if self._at is None else max(0.0, now - self._at)
        self._tokens, self._at = min(self._burst, self._tokens + elapsed * self._rate), now
        return int(self._tokens)

    def spend(self, n: int) -> None:
        """``n`` refreshes, not more than ``available``, were tried."""
        if self._rate:
            self._tokens -= n


class CircuitBreaker:
    """Closed: calls pass. ``failures`` in a row open it: no calls for ``open_seconds``. Then it is half open: the
    outcome of the next call closes it or opens it again (Nygard 2007, Release It!).
    """

    def __init__(self, failures: int, open_seconds: float) -> None:
        self._limit = failures
        self._open_seconds = open_seconds
        self._failures = 0
        self._opened: float | None = None

    def state(self, now: float) -> State:
        """``now``: monotonic seconds."""
        if self._opened is None:
            return "closed"
        return "half_open" if now - self._opened >= self._open_seconds else "open"

    def succeeded(self) -> None:
        """A call came back, in time."""
        self._failures, self._opened = 0, None

    def failed(self, now: float) -> None:
        """A call raised or took too long."""
        self._failures += 1
        if self._opened is not None or self._failures >= self._limit:
            self._opened = now
