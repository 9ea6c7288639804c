"""``gpl serve``: the HTTP scorer in one process or in several behind one port.

Each process binds the port for itself (SO_REUSEPORT: the kernel spreads connections), follows the log and reloads on
its own; one that dies is started again. Their figures meet in a directory of prometheus_client, so a scrape of the
port is of all of them.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import time
from multiprocessing.connection import wait
from multiprocessing.context import SpawnProcess

import structlog
import torch
import uvicorn
from prometheus_client.multiprocess import mark_process_dead
from threadpoolctl import threadpool_limits

from streams.frame import Frame
from streams.liveness import health_of
from streams.metrics import AddressError
from streams.parent import end_with_parent
from streams.scoring.scorer import Scorer
from streams.scoring.server import MULTIPROCESS, create_app
from streams.settings import Settings

log = structlog.get_logger()

GRACE_SECONDS = 10
"""For requests in flight at the end."""
KEEP_ALIVE_SECONDS = 75
"""Longer than clients keep an idle connection, which would otherwise be closed under their next request."""
RESTART_SECONDS = 1.0
"""Between starts of a process that keeps dying."""
SWITCH_SECONDS = 0.0005
"""How long the thread that follows the log may keep the interpreter from a request; Python's default is 0.005."""


def run(settings: Settings, frame: Frame | None = None) -> None:
    """Serve until SIGTERM or SIGINT; requests in flight are answered. ``frame`` as of ``Scorer``.

    Raises AddressError when the port is taken.
    """
    frame = frame or Frame.load(settings.artefacts)
    if settings.serve.workers == 1:
        _serve(settings, frame)
        return
    if settings.serve.port:
        _bound(settings, shared=False).close()  # shared, it could be bound beside another server's
    with _bound(settings, shared=True) as first, tempfile.TemporaryDirectory(prefix="gpl-metrics-") as figures:
        # Bound but not listening: it holds the port, and gets no connection.
        settings = settings.model_copy(
            update={"serve": settings.serve.model_copy(update={"port": first.getsockname()[1]})}
        )
        os.environ[MULTIPROCESS] = figures
        _supervise(settings, frame)


def _serve(settings: Settings, frame: Frame) -> None:
    end_with_parent(signal.SIGTERM)  # requests in flight are answered; its successor shall have the port for itself
    sys.setswitchinterval(SWITCH_SECONDS)
    # Products of a request are small: threads that wait for each other cost more than they bring.
    threadpool_limits(1)
    torch.set_num_threads(1)
    health = health_of(settings.metrics)
    app = create_app(Scorer(settings, frame, health), settings.serve, health)
    config = uvicorn.Config(
        app,
        loop="uvloop",
        http="httptools",
        log_level="warning",
        access_log=False,
        limit_concurrency=settings.serve.max_concurrency,
        timeout_graceful_shutdown=GRACE_SECONDS,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
    )
    with _bound(settings, shared=settings.serve.workers > 1) as listener:
        uvicorn.Server(config).run(sockets=[listener])


def _bound(settings: Settings, shared: bool) -> socket.socket:
    serve = settings.serve
    family = socket.AF_INET6 if ":" in serve.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if shared:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind((serve.host, serve.port))
    except OSError as error:
        listener.close()
        raise AddressError(f"serve.host, serve.port: {serve.host}:{serve.port}: {error.strerror}") from error
    return listener


def _supervise(settings: Settings, frame: Frame) -> None:
    context = multiprocessing.get_context("spawn")
    stopping = False

    def stop(*_: object) -> None:
        nonlocal stopping
        stopping = True

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)

    def start() -> SpawnProcess:
        process = context.Process(target=_serve, args=(settings, frame), name="gpl-serve")
        process.start()
        return process

    processes = [start() for _ in range(settings.serve.workers)]
    while not stopping:
        wait([process.sentinel for process in processes], timeout=0.2)
        for i, process in enumerate(processes):
            if not stopping and not process.is_alive():
                mark_process_dead(process.pid)  # type: ignore[no-untyped-call]
                log.error("serve_process_ended", pid=process.pid, exitcode=process.exitcode)
                time.sleep(RESTART_SECONDS)
                processes[i] = start()
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + GRACE_SECONDS + 5
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
        if process.is_alive():
            process.kill()
            process.join()
