"""Child processes that listen on loopback ports: started in a group of their own, stopped without leftovers."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from kafka import KafkaAdminClient
from kafka.errors import KafkaError

LOOPBACK = "127.0.0.1"


class BrokerError(RuntimeError):
    """A broker that cannot be found, started, reached or stopped. The message says what to do."""


def free_ports(count: int) -> list[int]:
    """Distinct loopback TCP ports that nothing listens on now.

    They lie below the ephemeral range: a port of that range can become the source port of any connection while its
    server restarts, and a client that redials a dead server there may even connect to itself.
    """
    ports: list[int] = []
    with ExitStack() as stack:
        for port in random.SystemRandom().sample(range(20_000, 32_000), 2_000):
            probe = stack.enter_context(socket.socket())
            try:
                probe.bind((LOOPBACK, port))
            except OSError:
                continue
            ports.append(port)
            if len(ports) == count:
                return ports
    raise BrokerError(f"no {count} free ports between 20000 and 32000 on {LOOPBACK}")


def accepts(port: int) -> bool:
    """Whether something listens on the loopback port."""
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex((LOOPBACK, port)) == 0


def serves_metadata(options: Mapping[str, Any], timeout: float = 2.0) -> bool:
    """Whether a Kafka broker answers a metadata request. ``options``: what a kafka-python client takes."""
    try:
        with KafkaAdminClient(**options, bootstrap_timeout_ms=int(timeout * 1000)) as admin:
            admin.list_topics()
    except (KafkaError, OSError):
        return False
    return True


class Child:
    """A program in a process group of its own, out of reach of Ctrl-C, its output appended to ``log``.

    Attached, it ends when this process ends, kill -9 included; detached, it outlives this process.
    ``env``: its whole environment; None: that of this process.
    """

    def __init__(
        self, argv: Sequence[str], cwd: Path, log: Path, detached: bool, env: Mapping[str, str] | None = None
    ) -> None:
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                argv,
                cwd=cwd,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=detached,
                process_group=None if detached else 0,
            )
        self._guard = None if detached else self._start_guard()

    @property
    def pid(self) -> int:
        """Of the program, and of its process group."""
        return self._process.pid

    def _start_guard(self) -> subprocess.Popen[bytes] | None:
        # A shell that waits on a pipe of ours: its end of file is the end of this process, however that came. In the
        # group itself, so that it ends with the group and keeps the group's id from being given to another.
        try:
            return subprocess.Popen(
                ["/bin/sh", "-c", f"read _; kill -s TERM -- -{self.pid}"],
                stdin=subprocess.PIPE,
                process_group=self.pid,
            )
        except PermissionError:
            return None  # setpgid refused: the program has ended already, which its caller is about to see

    def alive(self) -> bool:
        return self._process.poll() is None

    def signal(self, number: signal.Signals) -> None:
        """To every process of the group."""
        signal_group(self.pid, number)

    def wait(self, timeout: float) -> bool:
        """Whether the program has ended within ``timeout`` seconds."""
        try:
            self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            return False
        return True

    def close(self) -> None:
        """Kill what is left of the group and reap it."""
        self.signal(signal.SIGKILL)
        self._process.wait()
        if self._guard is not None:
            assert self._guard.stdin is not None
            self._guard.stdin.close()
            self._guard.wait()


def is_running(pid: int, marker: str) -> bool:
    """Whether the process lives and its command line holds ``marker``, so that a reused pid is not taken for it."""
    with suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)  # a child of ours that has ended is no zombie afterwards
    if Path("/proc/self/cmdline").exists():
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            return False
    else:
        listing = subprocess.run(["ps", "-o", "command=", "-p", str(pid)], capture_output=True, check=False)
        command = listing.stdout.decode(errors="replace")
    return marker in command


def signal_group(group: int, number: signal.Signals) -> None:
    """Send a signal to every process of the group; none left is fine."""
    with suppress(ProcessLookupError):
        os.killpg(group, number)


def wait_until(condition: Callable[[], bool], timeout: float, interval: float = 0.05) -> bool:
    """Poll until the condition holds (True) or ``timeout`` seconds have passed (False)."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() >= deadline:
            return False
        time.sleep(interval)
    return True


def tail(log: Path, lines: int = 15) -> str:
    """The last lines of a log file, for an error message."""
    if not log.is_file():
        return "(no log)"
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])
