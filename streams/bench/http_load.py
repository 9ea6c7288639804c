"""A load generator for the scorer: an open loop of HTTP/1.1 requests over connections that stay open.

Requests leave on a fixed timetable, and a latency counts from the time at which its request was due: a server that
stalls is charged for all that it keeps waiting. To be run in a process of its own.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec
import numpy as np


class _Versioned(msgspec.Struct):
    model_version: str


@dataclass
class Outcome:
    """What came of the requests. ``seconds``: from due time to whole answer, one per answer with status 200.

    ``errors``: connections refused, reset or closed, by name.
    ``answers``, when they are kept: index of the body, and what came back with status 200.
    """

    seconds: list[float] = field(default_factory=list)
    statuses: Counter[int] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    versions: Counter[str] = field(default_factory=Counter)
    duration: float = 0.0
    cpu_seconds: float = 0.0
    answers: list[tuple[int, bytes]] | None = None

    def milliseconds(self, percentile: float) -> float:
        return float(np.percentile(self.seconds, percentile) * 1000) if self.seconds else float("nan")


def drive(
    host: str,
    port: int,
    bodies: Sequence[bytes],
    rate: float,
    seconds: float,
    connections: int,
    keep: bool = False,
) -> Outcome:
    """Send ``rate`` requests a second for ``seconds``, cycling through ``bodies``, over ``connections`` connections."""
    outcome = Outcome(answers=[] if keep else None)
    started = time.process_time()
    with asyncio.Runner(loop_factory=_loop) as runner:
        runner.run(_drive(host, port, bodies, rate, seconds, connections, outcome))
    outcome.cpu_seconds = time.process_time() - started
    return outcome


def _loop() -> asyncio.AbstractEventLoop:
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()


async def _drive(
    host: str, port: int, bodies: Sequence[bytes], rate: float, seconds: float, connections: int, outcome: Outcome
) -> None:
    start = time.perf_counter() + 0.1
    total = int(rate * seconds)

    async def connection(first: int) -> None:
        streams = None
        for n in range(first, total, connections):
            due = start + n / rate
            now = time.perf_counter()
            if now < due:
                await asyncio.sleep(due - now)
            try:
                if streams is None:
                    streams = await asyncio.open_connection(host, port, limit=2**22)
                at = n % len(bodies)
                answer = await _exchange(*streams, bodies[at], due, outcome)
                if answer is not None and outcome.answers is not None:
                    outcome.answers.append((at, answer))
            except (OSError, asyncio.IncompleteReadError) as error:
                outcome.errors[type(error).__name__] += 1
                streams = None
        if streams is not None:
            streams[1].close()

    await asyncio.gather(*(connection(n) for n in range(connections)))
    outcome.duration = time.perf_counter() - start


async def _exchange(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, body: bytes, due: float, outcome: Outcome
) -> bytes | None:
    writer.write(
        b"POST /v1/score HTTP/1.1\r\nhost: scorer\r\ncontent-type: application/json\r\n"
        b"content-length: %d\r\n\r\n" % len(body) + body
    )
    head = await reader.readuntil(b"\r\n\r\n")
    status = int(head[9:12])
    length = next(int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
    answer = await reader.readexactly(length)
    outcome.statuses[status] += 1
    if status != 200:
        return None  # a refusal is quick, and no answer
    outcome.seconds.append(time.perf_counter() - due)
    outcome.versions[msgspec.json.decode(answer, type=_Versioned).model_version] += 1
    return answer
