"""``gpl train --ranks N``: the ranks of a group as processes on this machine, over torch's own launcher.

As with one trainer, a supervisor restarts the command when it fails: a rank that ends by itself ends the others and
the command. ``torchrun`` serves as well; it restarts groups itself.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import tempfile
import threading
from pathlib import Path

import structlog
from torch.multiprocessing.spawn import ProcessException, start_processes

from streams.parent import end_with_parent
from streams.settings import Settings
from streams.trainer import loop
from streams.trainer.group import Processes, RankGoneError

log = structlog.get_logger()

END_SECONDS = 5
"""How long ranks may take to end after one has failed."""


class RankFailedError(RuntimeError):
    """A rank has ended by itself, and the group with it."""


def run(settings: Settings, ranks: int, start_from: str = "latest", skip_to: str | None = None) -> None:
    """Train with ``ranks`` processes until SIGTERM or SIGINT. Raises RankFailedError."""
    # Torch's default is a thread a core, for each rank.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
    loopback = [name for _, name in socket.if_nameindex() if name.startswith("lo")]
    if loopback:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback[0])
    with tempfile.TemporaryDirectory(prefix="gpl-ranks-") as name:
        meet = (Path(name) / "meet").as_uri()
        arguments = (ranks, meet, settings, start_from, skip_to)
        context = start_processes(_rank, arguments, ranks, join=False, start_method="spawn")  # type: ignore[no-untyped-call]

        def stop(*_: object) -> None:
            for process in context.processes:
                process.terminate()

        before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
        log.info("ranks_started", pids=context.pids())
        try:
            while not context.join(timeout=1, grace_period=END_SECONDS):
                pass
        except ProcessException as error:
            raise RankFailedError(f"rank {error.error_index} has ended: {error}") from error
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _rank(rank: int, ranks: int, meet: str, settings: Settings, start_from: str, skip_to: str | None) -> None:
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    # Torch asks the kernel for SIGINT at the parent's end, but only after the imports, when it may be gone already.
    end_with_parent()
    try:
        with Processes(rank, ranks, meet) as group:
            loop.serve(settings, stop, start_from, skip_to, group)
    except RankGoneError as error:
        log.error("rank_without_the_others", rank=rank, why=str(error))
        sys.exit(1)
    except loop.CLEAR as error:
        log.error("rank_ended", rank=rank, why=str(error))
        sys.exit(f"error: {error}" if rank == 0 else 1)  # one says it, without a traceback
