"""The processes of a demo, their /metrics and their memory. What was started is always stopped."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.error import URLError
from urllib.request import urlopen

from prometheus_client.parser import text_string_to_metric_families

from streams.broker.process import LOOPBACK, Child, free_ports, tail


class ProcessEndedError(RuntimeError):
    """A part of the demo ended by itself; the message holds the end of its log."""


class Samples:
    """Exported metrics of one process at one moment."""

    def __init__(self, samples: Sequence[Any]) -> None:
        self._samples = samples

    def total(self, name: str, **labels: str) -> float | None:
        """Sum of the samples of that name that carry these labels; None when there is none."""
        found = [s.value for s in self._samples if s.name == name and labels.items() <= s.labels.items()]
        return sum(found) if found else None

    def figures(self) -> dict[str, dict[str, float]]:
        """``gpl_progressive`` as model -> metric -> value."""
        result: dict[str, dict[str, float]] = {}
        for sample in self._samples:
            if sample.name == "gpl_progressive":
                result.setdefault(sample.labels["model"], {})[sample.labels["metric"]] = sample.value
        return result


class Part:
    """``python -m streams.cli ARGUMENTS`` with the configuration of GPL_CONFIG, on a metrics port of its own.

    ``prefix``: a command that runs it, such as taskset with its arguments. ``env``: its environment but for that port;
    None: that of this process.
    """

    def __init__(
        self,
        name: str,
        arguments: list[str],
        log: Path,
        prefix: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.name = name
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        (self._port,) = free_ports(1)
        command = [*prefix, sys.executable, "-m", "streams.cli", *arguments]
        own = {**(os.environ if env is None else env), "GPL_METRICS__PORT": str(self._port)}
        self._child = Child(command, Path.cwd(), log, detached=False, env=own)

    @property
    def pid(self) -> int:
        return self._child.pid

    def check(self) -> None:
        """Raise ProcessEndedError when the process has ended."""
        if not self._child.alive():
            raise ProcessEndedError(f"{self.name} ended; the end of {self.log}:\n{tail(self.log, 25)}")

    def ready(self) -> bool:
        """Whether it says that it has warmed up."""
        try:
            with urlopen(f"http://{LOOPBACK}:{self._port}/ready", timeout=2) as answer:
                return bool(answer.status == 200)
        except (URLError, OSError):
            return False

    def metrics(self) -> Samples:
        """What it exports now; empty while it does not answer."""
        try:
            with urlopen(f"http://{LOOPBACK}:{self._port}/metrics", timeout=2) as answer:
                text = answer.read().decode()
        except (URLError, OSError):
            return Samples([])
        return Samples([sample for family in text_string_to_metric_families(text) for sample in family.samples])

    def stop(self, grace: float) -> bool:
        """SIGTERM to the process, by force after ``grace`` seconds; whether it ended in order."""
        self._child.signal(signal.SIGTERM)
        ended = self._child.wait(grace)
        self._child.close()
        return ended


def without_settings() -> dict[str, str]:
    """The environment of this process less every ``GPL_`` variable: what a process begins with that shall have the
    settings it is given and no others. Their names are read without regard to case."""
    return {name: value for name, value in os.environ.items() if not name.upper().startswith("GPL_")}


class Parts:
    """The parts that run; leaving the context stops what still does, newest first."""

    def __init__(self, logs: Path) -> None:
        self._logs = logs
        self.running: dict[str, Part] = {}

    def start(self, name: str, *arguments: str) -> Part:
        part = Part(name, list(arguments), self._logs / f"{name}.log")
        self.running[name] = part
        return part

    def check(self) -> None:
        """Raise ProcessEndedError when one of them has ended by itself."""
        for part in self.running.values():
            part.check()

    def stop(self, name: str, grace: float) -> bool:
        """Stop one; whether it ended in order."""
        return self.running.pop(name).stop(grace)

    def logs(self) -> str:
        """The ends of all logs, for an error message."""
        return "\n".join(f"--- {path}\n{tail(path, 15)}" for path in sorted(self._logs.glob("*.log")))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for name in reversed(list(self.running)):
            self.stop(name, grace=10.0)


def resident_mib(pids: list[int]) -> float | None:
    """Resident memory of these processes together, MiB; None where /proc does not tell."""
    total = 0.0
    for pid in pids:
        try:
            status = Path(f"/proc/{pid}/status").read_text()
        except OSError:
            return None
        line = next((text for text in status.splitlines() if text.startswith("VmRSS:")), "VmRSS: 0 kB")
        total += int(line.split()[1]) / 1024
    return total
