"""Helpers of the integration tests: real processes, and what is on the topics."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from kafka import TopicPartition

from streams import contracts
from streams.kafka import consumer
from streams.settings import KafkaSettings
from streams.topics import full_name

T = TypeVar("T")


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def kafka_section(kafka: KafkaSettings) -> str:
    """What a configuration file says of the broker that a test was given."""
    return f"""[kafka]
bootstrap_servers = "{kafka.bootstrap_servers}"
prefix = "{kafka.prefix}"
group_prefix = "{kafka.group_prefix}"
partitions = {kafka.partitions}"""


def wait_for(what: str, condition: Callable[[], T | None], timeout: float = 240.0) -> T:
    """The first true value of ``condition``; fails naming ``what`` when it stays false."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(0.1)
    raise AssertionError(f"{what}: not within {timeout:.0f} s")


async def until(what: str, holds: Callable[[], bool], timeout: float = 60.0) -> None:
    """Let the event loop run until ``holds``; fails naming ``what`` when it does not."""
    deadline = time.monotonic() + timeout
    while not holds():
        assert time.monotonic() < deadline, f"{what}: not within {timeout:.0f} s"
        await asyncio.sleep(0.02)


class Process:
    """One `gpl` command with its own configuration, its log in a file."""

    def __init__(self, arguments: list[str], config: Path, log: Path, **env: str) -> None:
        self.metrics_port = free_port()
        self.log = log
        environment = {
            **os.environ,
            "GPL_CONFIG": str(config),
            "GPL_METRICS__PORT": str(self.metrics_port),
            "HF_HUB_OFFLINE": "1",
            **env,
        }
        with log.open("ab") as out:
            self.popen = subprocess.Popen(
                [sys.executable, "-m", "streams.cli", *arguments], env=environment, stdout=out, stderr=out
            )

    def get(self, path: str) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics_port}{path}", timeout=5) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()
        except OSError:
            return 0, ""

    def ready(self) -> bool:
        assert self.popen.poll() is None, self.log.read_text()[-4000:]
        return self.get("/ready")[0] == 200

    def metric(self, line: str) -> float:
        """The value of the metric whose line starts with ``line``; 0 when it is not there."""
        for row in self.get("/metrics")[1].splitlines():
            if row.startswith(line + " "):
                return float(row.rsplit(" ", 1)[1])
        return 0.0

    def kill(self) -> None:
        self.popen.kill()
        self.popen.wait()

    def stop(self) -> int:
        if self.popen.poll() is None:
            self.popen.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                return self.popen.wait(timeout=30)
            self.kill()
        return self.popen.returncode


def read_all(kafka: KafkaSettings, topic: str) -> list[Any]:
    """Every record that is on a topic now, partition by partition."""
    reader = consumer(kafka)
    try:
        name = full_name(kafka, topic)
        partitions = [TopicPartition(name, p) for p in sorted(reader.partitions_for_topic(name) or ())]
        reader.assign(partitions)
        reader.seek_to_beginning(*partitions)
        ends = reader.end_offsets(partitions)
        records: list[Any] = []
        while any(reader.position(tp) < end for tp, end in ends.items()):
            for batch in reader.poll(timeout_ms=500).values():
                records += batch
        return records
    finally:
        reader.close()


def final_labels(kafka: KafkaSettings) -> tuple[dict[str, contracts.Label], list[contracts.Label]]:
    """request_id -> label of the highest revision, and every label record."""
    every = [contracts.decode(contracts.Label, record.value) for record in read_all(kafka, "labels")]
    final: dict[str, contracts.Label] = {}
    for label in every:
        if label.request_id not in final or final[label.request_id].revision < label.revision:
            final[label.request_id] = label
    return final, every


@contextlib.contextmanager
def running(*processes: Process) -> Iterator[None]:
    try:
        yield
    finally:
        for process in processes:
            process.stop()
