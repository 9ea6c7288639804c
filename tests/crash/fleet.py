"""Worker processes that can be killed at any moment and are started again, as a supervisor would.

They are forked from a server that has imported everything: a start costs a second instead of ten. Otherwise they are
what ``gpl worker`` runs: processes of their own, with their own event loop, sockets and metrics port.
"""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from streams.settings import MetricsSettings, Settings
from tests.integration.pipeline import free_port

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["streams.worker", "gpl.anchors.history", "gpl.index.edge", "gpl.index.server"])


def run_role(settings: Settings, role: str) -> None:
    from streams import worker

    worker.run(settings, role)  # type: ignore[arg-type]


def _main(target: Callable[..., None], arguments: tuple[Any, ...], log: str) -> None:
    out = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(out, 1)
    os.dup2(out, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", 1), os.fdopen(2, "w", 1)
    faulthandler.enable()
    signal.signal(signal.SIGQUIT, _dump)
    try:
        target(*arguments)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def _dump(*_: object) -> None:
    """Where every task and thread stands, into the log: for a test that waits in vain."""
    with contextlib.suppress(RuntimeError):
        for task in asyncio.all_tasks(asyncio.get_running_loop()):
            task.print_stack()
    faulthandler.dump_traceback()


class Worker:
    """One worker and its successors. ``target(settings, role, *more)`` is what the process runs."""

    def __init__(
        self,
        settings: Settings,
        role: str,
        log: Path,
        target: Callable[..., None] = run_role,
        more: tuple[Any, ...] = (),
    ) -> None:
        self.role = role
        self.log = log
        self.failures = 0
        """How often it ended by itself with an error."""
        self._settings = settings
        self._target = target
        self._more = more
        self._process: Any = None

    def start(self) -> None:
        self.port = free_port()
        settings = self._settings.model_copy(
            update={"metrics": self._settings.metrics.model_copy(update={"port": self.port})}
        )
        assert isinstance(settings.metrics, MetricsSettings)
        arguments = (settings, self.role, *self._more)
        self._process = _context.Process(target=_main, args=(self._target, arguments, str(self.log)), daemon=True)
        self._process.start()

    @property
    def pid(self) -> int:
        return int(self._process.pid)

    def ended(self) -> int | None:
        """Exit code; None while it runs."""
        code: int | None = self._process.exitcode
        return code

    def kill(self) -> None:
        self._process.kill()
        self._process.join()

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def stop(self, patience: float = 30.0) -> None:
        if self.ended() is None:
            self.signal(signal.SIGCONT)
            self.signal(signal.SIGTERM)
            self._process.join(patience)
            if self.ended() is None:
                self.kill()

    def get(self, path: str) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=5) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()
        except OSError:
            return 0, ""

    def metric(self, name: str) -> float:
        rows = [row for row in self.get("/metrics")[1].splitlines() if row.startswith(name + " ")]
        return float(rows[0].rsplit(" ", 1)[1]) if rows else 0.0


class Fleet:
    """Workers under a supervisor: one that ends is started again. A context manager."""

    def __init__(self, *workers: Worker) -> None:
        self.workers = list(workers)
        self._held: set[int] = set()
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._supervisor = threading.Thread(target=self._supervise, daemon=True)

    def __enter__(self) -> Fleet:
        for worker in self.workers:
            worker.start()
        self._supervisor.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stopping.set()
        self._supervisor.join()
        if kind is not None:
            for worker in self.workers:
                if worker.ended() is None:
                    worker.signal(signal.SIGQUIT)
            time.sleep(2)
        for worker in self.workers:
            if worker.ended() is None:
                worker.signal(signal.SIGTERM)
        for worker in self.workers:
            worker.stop()
        if kind is not None:
            for worker in self.workers:
                said = worker.log.read_text()[-6000:] if worker.log.exists() else "(no log)"
                print(f"--- {worker.role}: {worker.log}\n{said}")

    def _supervise(self) -> None:
        while not self._stopping.wait(0.1):
            with self._lock:
                for n, worker in enumerate(self.workers):
                    if n not in self._held and worker.ended() is not None:
                        worker.failures += worker.ended() != -signal.SIGKILL
                        worker.start()

    def kill(self, n: int, down: float = 0.0) -> None:
        """SIGKILL a worker; it comes back after ``down`` seconds."""
        with self._lock:
            self._held.add(n)
            self.workers[n].kill()
        time.sleep(down)
        with self._lock:
            self._held.discard(n)

    def keep_down(self, n: int) -> None:
        """SIGKILL a worker for good."""
        with self._lock:
            self._held.add(n)
            self.workers[n].kill()

    def wait_ready(self, timeout: float = 120.0) -> None:
        deadline = time.monotonic() + timeout
        while any(w.get("/ready")[0] != 200 for w in self.workers):
            assert time.monotonic() < deadline, [(w.role, w.get("/ready")) for w in self.workers]
            time.sleep(0.1)
