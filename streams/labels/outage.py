"""Calls of the vector index that wait while it cannot be reached: what depends on them stays unacknowledged."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

import structlog

from gpl.index.base import IndexUnavailable
from streams import metrics

log = structlog.get_logger()

T = TypeVar("T")

FIRST_PAUSE, LONGEST_PAUSE = 0.1, 5.0
"""Seconds between attempts, doubled from one to the next."""


async def when_available(call: Callable[[], T], wanted: Callable[[], bool]) -> T | None:
    """The result of ``call``, run in a thread, again and again while it raises IndexUnavailable.

    None as soon as ``wanted`` says that nobody waits for it any more. Other errors are the caller's.
    """
    pause = FIRST_PAUSE
    while wanted():
        try:
            return await asyncio.to_thread(call)
        except IndexUnavailable as error:
            metrics.INDEX_UNAVAILABLE.inc()
            log.warning("index unavailable, trying again", seconds=pause, error=str(error))
        await asyncio.sleep(pause)
        pause = min(LONGEST_PAUSE, 2 * pause)
    return None
