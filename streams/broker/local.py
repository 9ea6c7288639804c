"""A broker that this machine runs for itself: the life that Apache Kafka and noida-db share."""

from __future__ import annotations

import signal
from abc import ABC, abstractmethod
from pathlib import Path
from typing import ClassVar, Self

from streams.broker.process import (
    LOOPBACK,
    BrokerError,
    Child,
    accepts,
    free_ports,
    serves_metadata,
    tail,
    wait_until,
)

_ATTEMPTS = 3


class LocalBroker(ABC):
    """One broker on loopback with everything it keeps under ``directory``. ``port`` 0 takes free ports.

    A context manager: started on entry, stopped on exit. What it prints goes to ``directory/broker.log``.
    """

    kind: ClassVar[str]
    port_count: ClassVar[int] = 1

    def __init__(self, directory: Path, port: int = 0) -> None:
        self.directory = directory.absolute()
        self.log = self.directory / "broker.log"
        self._wanted_port = port
        self._ports: list[int] = []
        self._child: Child | None = None

    @abstractmethod
    def _prepare(self) -> list[str]:
        """Write what the broker needs for its ports and return its command line, which names ``directory``."""

    @property
    def bootstrap(self) -> str:
        """host:port for clients. Raises BrokerError before the first start."""
        if not self._ports:
            raise BrokerError(f"the {self.kind} broker in {self.directory} was never started")
        return f"{LOOPBACK}:{self._ports[0]}"

    @property
    def pid(self) -> int:
        """Of the running broker. Raises BrokerError when it does not run."""
        if self._child is None:
            raise BrokerError(f"the {self.kind} broker in {self.directory} is not running")
        return self._child.pid

    def start(self, timeout: float = 60.0, detached: bool = False) -> str:
        """Start it and wait until it serves metadata; the bootstrap string. ``detached``: it outlives this process.

        A second start keeps ports and data. Raises BrokerError with the end of the log.
        """
        if self._child is not None:
            raise BrokerError(f"the {self.kind} broker in {self.directory} is running already")
        self.directory.mkdir(parents=True, exist_ok=True)
        may_move = not self._ports and self._wanted_port == 0
        for attempt in range(1, _ATTEMPTS + 1):
            if not self._ports:
                self._ports = self._choose_ports()
            elif accepts(self._ports[0]):
                raise BrokerError(f"port {self._ports[0]} is taken by another program")
            offset = self.log.stat().st_size if self.log.exists() else 0
            self._child = Child(self._prepare(), self.directory, self.log, detached)
            if self._wait_serving(timeout):
                return self.bootstrap
            died = not self._child.alive()
            self._child.close()
            self._child = None
            written = self.log.read_bytes()[offset:].decode(errors="replace")
            if may_move:
                self._ports = []
                if died and attempt < _ATTEMPTS and "in use" in written.lower():
                    continue  # somebody took the port between the look and the start
            what = "ended at once" if died else f"did not serve within {timeout:.0f} s"
            raise BrokerError(f"the {self.kind} broker {what}; the end of {self.log}:\n{tail(self.log)}")
        raise AssertionError("unreachable")

    def _choose_ports(self) -> list[int]:
        if self._wanted_port == 0:
            return free_ports(self.port_count)
        if accepts(self._wanted_port):
            raise BrokerError(f"port {self._wanted_port} is taken by another program; name a free one")
        return [self._wanted_port, *free_ports(self.port_count - 1)]

    def _wait_serving(self, timeout: float) -> bool:
        child = self._child
        assert child is not None
        # Look for the listener first: it is cheap, and the client would log each refused connection.
        listening = wait_until(lambda: not child.alive() or accepts(self._ports[0]), timeout)
        options = {"bootstrap_servers": [self.bootstrap]}
        wait_until(lambda: not child.alive() or serves_metadata(options), timeout if listening else 0.0)
        return child.alive() and serves_metadata(options)

    def stop(self, grace: float = 30.0) -> None:
        """End it in order (SIGTERM), by force after ``grace`` seconds. Not running is fine."""
        self._end(signal.SIGTERM, grace)

    def kill(self) -> None:
        """End it as a crash would (SIGKILL)."""
        self._end(signal.SIGKILL, 10.0)

    def _end(self, number: signal.Signals, grace: float) -> None:
        child, self._child = self._child, None
        if child is not None:
            child.signal(number)
            child.wait(grace)
            child.close()

    def restart(self, timeout: float = 60.0) -> str:
        """Stop, then start on the same ports and data."""
        self.stop()
        return self.start(timeout)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()
