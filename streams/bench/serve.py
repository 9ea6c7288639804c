"""The scorer measured: calls of the library in one thread, and HTTP requests to real processes over a real log."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import socket
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import msgspec
import numpy as np

from streams import topics
from streams.bench.http_load import Outcome, drive
from streams.bench.synthetic import SyntheticState
from streams.contracts import Record, encode
from streams.kafka import producer
from streams.scoring import processes
from streams.scoring.scorer import Scorer
from streams.settings import KafkaSettings, ServeSettings, Settings, TrainerSettings

WIDTH = 64
"""Of the pre-ranker's towers."""
SCORE_BYTES = 12
"""Of the memo, a pair of user and item (`AnchorScores`)."""
_SPAWN = multiprocessing.get_context("spawn")


@dataclass(frozen=True)
class _Message:
    key: bytes
    value: bytes
    topic: str = "state"
    partition: int = 0
    offset: int = 0


def loaded_scorer(state: SyntheticState, directory: Path, remembered: int) -> Scorer:
    """A scorer of its own with the state in it, without a log, whose memo holds so many ``remembered`` scores."""
    memo_mb = remembered * SCORE_BYTES // 2**20 + 1
    settings = Settings(trainer=TrainerSettings(models=directory), serve=ServeSettings(memo_mb=memo_mb))
    scorer = Scorer(settings, state.frame)
    update = state.publish(directory, settings.trainer.model_name, WIDTH, 1)
    for topic, key, record in itertools.chain(state.records(), [("model-updates", update.model, update)]):
        scorer.handlers[topic](_Message(key.encode(), encode(record)))
    scorer.refresh()
    return scorer


def library(scorer: Scorer, state: SyntheticState, candidates: int, users: Sequence[str]) -> list[float]:
    """Seconds of a call for each of ``users``, after a sixth of them to warm up.

    The same users are asked for the same candidates each time. Ids are new strings each time, as from a request.
    """
    rng = np.random.default_rng(1)
    seconds = []
    for user_id in users:
        wanted = [f"item-{i}" for i in rng.choice(len(state.items), candidates, replace=candidates > len(state.items))]
        started = time.perf_counter()
        scorer.score(user_id, wanted)
        seconds.append(time.perf_counter() - started)
    return seconds[len(users) // 6 :]


def bodies(state: SyntheticState, candidates: int, count: int, seed: int = 2) -> list[bytes]:
    """Request bodies of random users and items."""
    rng = np.random.default_rng(seed)
    return [
        msgspec.json.encode(
            {
                "user_id": state.users[int(rng.integers(len(state.users)))],
                "candidates": [
                    state.items[i] for i in rng.choice(len(state.items), candidates, candidates > len(state.items))
                ],
            }
        )
        for _ in range(count)
    ]


class ServedSystem:
    """`gpl serve` as processes of its own over a log that holds the state; a context manager. Topics are made anew.

    ``memo_mb``: without a memo of scores each request costs what a user's first one does.
    Raises TimeoutError when it does not become ready.
    """

    def __init__(
        self, kafka: KafkaSettings, state: SyntheticState, directory: Path, workers: int, memo_mb: int = 0
    ) -> None:
        self._state = state
        self._models = directory / "models"
        with closing(socket.create_server(("127.0.0.1", 0))) as free:
            self.port: int = free.getsockname()[1]
        self.settings = Settings(
            kafka=kafka,
            trainer=TrainerSettings(models=self._models),
            serve=ServeSettings(port=self.port, workers=workers, memo_mb=memo_mb),
        )
        self._published = 0
        self._producer: Any = None
        self._process = _SPAWN.Process(target=processes.run, args=(self.settings, state.frame), name="gpl-serve")

    def __enter__(self) -> ServedSystem:
        topics.create(self.settings.kafka)
        self._producer = producer(self.settings.kafka)
        for topic, key, record in self._state.records():
            self._send(topic, key, record)
        self.publish()
        self._process.start()
        try:
            self.wait_until_ready()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._process.terminate()
        self._process.join(60)
        self._producer.close()

    @property
    def pid(self) -> int | None:
        """Of the process that was started: the server, or the supervisor of several."""
        return self._process.pid

    def publish(self) -> str:
        """Publish and announce the next version, and wait until it is on the log. Returns its name."""
        self._published += 1
        name = self.settings.trainer.model_name
        update = self._state.publish(self._models, name, WIDTH, self._published)
        self._send("model-updates", update.model, update)
        self._producer.flush()
        return update.version

    def get(self, path: str) -> str:
        """Body of a GET. Raises URLError (or HTTPError, for a status that is none of success)."""
        with urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=10) as answer:
            text: str = answer.read().decode()
        return text

    def load(
        self,
        bodies: Sequence[bytes],
        rate: float,
        seconds: float,
        connections: int,
        reload_every: float | None,
        keep: bool = False,
    ) -> Outcome:
        """Requests from a process of its own, while a new version is published every ``reload_every`` seconds.

        ``keep``: the outcome holds the answers.
        """
        with ProcessPoolExecutor(1, _SPAWN) as pool:
            running = pool.submit(drive, "127.0.0.1", self.port, bodies, rate, seconds, connections, keep)
            while reload_every is not None and not running.done():
                self.publish()
                time.sleep(reload_every)
            return running.result()

    def cpu_seconds(self) -> float:
        """Processor time of the serving processes so far (Linux)."""
        ticks = 0
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with suppress(OSError):
                fields = stat.read_text().rpartition(")")[2].split()
                if self.pid in (int(stat.parent.name), int(fields[1])):
                    ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK")

    def _send(self, topic: str, key: str, record: Record) -> None:
        self._producer.send(topics.full_name(self.settings.kafka, topic), key=key.encode(), value=encode(record))

    def wait_until_ready(self, timeout: float = 300.0) -> None:
        """Raises TimeoutError, also when the serving process has ended."""
        # Each connection meets some process, so several good answers in a row are asked for.
        deadline, good = time.monotonic() + timeout, 0
        while good < 8 * self.settings.serve.workers:
            if time.monotonic() > deadline or not self._process.is_alive():
                raise TimeoutError(f"not ready within {timeout:.0f} s, or ended (exit code {self._process.exitcode})")
            try:
                self.get("/ready")
                good += 1
            except (URLError, OSError):
                good = 0
                time.sleep(0.1)
