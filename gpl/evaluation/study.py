"""A study: data sets x methods x seeds, each combination computed once and kept on disk.

For each data set, settings are chosen on the validation users of the first few seeds' worlds; then every method is
trained on every seed's log and judged once on the test users. What is on disk is keyed by all that it depends on (data,
seed, settings, the sources that computed it), so a study goes on where it was stopped, and computes anew what changed.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import multiprocessing
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gpl.evaluation.bench import Bench, code_digest, file_name, sources, written_atomically
from gpl.evaluation.dataset import Dataset
from gpl.evaluation.embed import embedded_world
from gpl.evaluation.judge import Outcome
from gpl.evaluation.methods import BY_NAME, Method
from gpl.evaluation.reliability import reliability
from gpl.evaluation.sources import open_dataset
from gpl.evaluation.training import TrainConfig, one_thread
from gpl.evaluation.upstream import UpstreamConfig
from gpl.space import SentenceEncoder


@dataclass(frozen=True)
class StudyConfig:
    """``datasets``: as `open_dataset` takes them. ``truth``: in place of the directory's own, if there is but
    one set. ``dim``: as of `embed`. ``cache``: where vectors, anchors and results are kept. ``tuning``: how many of the
    first seeds settings are chosen with, by the mean; one alone left more to chance than settings differ by
    (docs/evaluation.md)."""

    datasets: tuple[str | Path, ...]
    methods: tuple[str, ...]
    cache: Path
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    tuning: int = 3
    truth: Path | None = None
    encoder: str = "all-MiniLM-L6-v2"
    dim: int | None = None
    jobs: int = 1
    train: TrainConfig = field(default_factory=TrainConfig)
    upstream: UpstreamConfig = field(default_factory=UpstreamConfig)


@dataclass(frozen=True)
class MethodResult:
    """One method on one data set. ``per_user`` maps a metric to (S, U), NaN where undefined or not judged; ``world`` a
    figure to (S,); ``curve`` (S, 10, 2): hits at 10 and relevant items by popularity, the most popular tenth of the
    items first. ``reliability``: bins of the labels' confidence, of GPL alone."""

    method: Method
    settings: dict[str, Any]
    seconds: npt.NDArray[np.float64]
    per_user: dict[str, npt.NDArray[np.float64]]
    world: dict[str, npt.NDArray[np.float64]]
    curve: npt.NDArray[np.float64]
    reliability: list[dict[str, float]] | None


@dataclass(frozen=True)
class SetResult:
    """All methods of one data set. ``facts``: what its first world looks like."""

    name: str
    description: str
    facts: dict[str, Any]
    methods: dict[str, MethodResult]


Say = Callable[[str], None]


def run(config: StudyConfig, say: Say) -> list[SetResult]:
    """Compute what is missing and gather all. Raises what `open_dataset` raises, ValueError for an unknown method."""
    for method in config.methods:
        if method not in BY_NAME:
            raise ValueError(f"method {method!r} is unknown; there are {', '.join(BY_NAME)}")
    if not config.seeds or not config.datasets:
        raise ValueError("a study needs at least one data set and one seed")
    if config.tuning < 1:
        raise ValueError(f"tuning: {config.tuning}, expected at least 1")
    if config.truth is not None and len(config.datasets) != 1:
        raise ValueError(f"--truth belongs to one data set, {len(config.datasets)} are given")
    for name in config.datasets:  # encoded once, before processes share the work
        dataset = open_dataset(name, config.truth)
        say(dataset.describe())
        embedded_world(dataset, _encoder(config, say), config.seeds[0], config.upstream, config.dim)
    first = [(name, config.seeds[0]) for name in config.datasets]
    rest = [(name, seed) for name in config.datasets for seed in config.seeds[1:]]
    for tasks in (first, rest):
        with closing(_computed(config, tasks)) as lines:
            for line in lines:
                say(line)
    return [_gathered(config, name) for name in config.datasets]


def _computed(config: StudyConfig, tasks: Sequence[tuple[str | Path, int]]) -> Generator[str]:
    if config.jobs <= 1:
        for name, seed in tasks:
            yield from _Work(config, name, seed).run()
        return
    others = multiprocessing.active_children()
    with ProcessPoolExecutor(config.jobs, multiprocessing.get_context("spawn")) as pool:
        with _interrupts_ignored():  # workers inherit it and so are deaf to Ctrl-C from their start; all start now
            waited = [pool.submit(_lines, config, name, seed) for name, seed in tasks]
        workers = [process for process in multiprocessing.active_children() if process not in others]
        try:
            for done in as_completed(waited):
                yield from done.result()
        except (KeyboardInterrupt, GeneratorExit):
            for worker in workers:  # else all that was asked for would be waited for; what is written is kept
                worker.terminate()
            raise


@contextmanager
def _interrupts_ignored() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # others may not set it
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _lines(config: StudyConfig, name: str | Path, seed: int) -> list[str]:
    return list(_Work(config, name, seed).run())


class _Work:
    """One data set under one seed; the world is built when something is missing."""

    def __init__(self, config: StudyConfig, name: str | Path, seed: int) -> None:
        one_thread()
        self.config, self.name, self.seed = config, name, seed
        self.dataset = open_dataset(name, config.truth)
        self._fingerprint = dataset_digest(self.dataset)
        self._encoder = _encoder(config, lambda _: None)
        self._bench: Bench | None = None

    @property
    def bench(self) -> Bench:
        if self._bench is None:
            world = embedded_world(self.dataset, self._encoder, self.seed, self.config.upstream, self.config.dim)
            self._bench = Bench(world, self.config.cache / "anchors", self.config.train)
        return self._bench

    def run(self) -> Iterator[str]:
        """Computes what is missing, a line for each result."""
        for name in self.config.methods:
            method, settings = BY_NAME[name], self.settings(BY_NAME[name])
            path = self.path(method, settings)
            if path.is_file():
                continue
            started = time.monotonic()
            outcome = self.bench.test.judge(method.run(self.bench, **settings))
            seconds = time.monotonic() - started
            bins = reliability(self.bench, settings) if method.name == "gpl" else None
            _write(path, outcome, settings, seconds, bins)
            hits, tail = outcome.mean("hr@10"), outcome.mean("tail_hr@10")
            yield f"{self.dataset.name} seed {self.seed} {name}: HR@10 {hits:.4f} tail {tail:.4f} ({seconds:.0f} s)"

    def settings(self, method: Method) -> dict[str, Any]:
        """The settings chosen on the validation users, by the mean of `Judge.goal` over the tuning seeds."""
        base = self.settings(BY_NAME[method.like]) if method.like is not None else {}
        if not method.grid:
            return {**base, **method.settings}
        searched = [method.name, base, method.starts, method.grid, method.settings, inspect.getsource(Method)]
        grid = json.dumps(searched, default=str)  # the order matters
        key = _digest(grid, self._common(method), str(self.config.seeds[: self.config.tuning]))
        path = self.config.cache / "settings" / f"{file_name(self.dataset.name)}-{method.name}-{key}.json"
        if path.is_file():
            stored: dict[str, Any] = json.loads(path.read_text())
            return stored
        if self.seed != self.config.seeds[0]:
            raise RuntimeError(f"{path}: missing; settings are chosen by the work of the first seed")
        chosen = method.tuned(base, lambda s: float(np.mean([work.validated(method, s) for work in self._tuning])))
        path.parent.mkdir(parents=True, exist_ok=True)
        written_atomically(path, lambda target: target.write_text(json.dumps(chosen)))
        return chosen

    def validated(self, method: Method, settings: dict[str, Any]) -> float:
        """`Judge.goal` of the validation users of this seed."""
        return self.bench.validation.goal(method.run(self.bench, **settings))

    @cached_property
    def _tuning(self) -> list[_Work]:
        others = self.config.seeds[1 : self.config.tuning]
        return [self, *(_Work(self.config, self.name, seed) for seed in others)]

    def path(self, method: Method, settings: dict[str, Any]) -> Path:
        key = _digest(json.dumps(settings, sort_keys=True), self._common(method), str(self.seed))
        return self.config.cache / "results" / f"{file_name(self.dataset.name)}-{self.seed}-{method.name}-{key}.npz"

    def _common(self, method: Method) -> str:
        """What any figure of a method depends on. Methods are where `run` is defined: `methods` imports all of them."""
        modules = ["gpl.evaluation.embed", "gpl.evaluation.bench", method.run.__module__]
        if method.name == "gpl":
            modules.append("gpl.evaluation.reliability")
        config = self.config
        parts = (self._fingerprint, self._encoder.identity, repr(config.dim), repr(config.train), repr(config.upstream))
        return _digest(*parts, code_digest(*sources(*modules)))


def dataset_digest(dataset: Dataset) -> str:
    """Hash of all that a data set says."""
    digest = hashlib.sha256(dataset.name.encode())
    for item in dataset.items:
        digest.update(repr((item.item_id, item.text, item.embedding)).encode())
    digest.update(repr(dataset.users).encode())
    log = dataset.log
    arrays: list[Any] = [dataset.popularity]
    for part in (dataset.truth, dataset.events):
        arrays += list(vars(part).values()) if part is not None else []
    if log is not None:
        arrays += [log.user, log.exposed.offsets, log.exposed.values, log.clicked]
        arrays += [log.recalled.offsets, log.recalled.values]
    for array in arrays:
        digest.update(b"-" if array is None else np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:16]


def _gathered(config: StudyConfig, name: str | Path) -> SetResult:
    works = [_Work(config, name, seed) for seed in config.seeds]
    dataset = works[0].dataset
    methods: dict[str, MethodResult] = {}
    for wanted in config.methods:
        method = BY_NAME[wanted]
        settings = works[0].settings(method)
        stored = [_read(work.path(method, settings)) for work in works]
        methods[wanted] = MethodResult(
            method,
            settings,
            np.array([s["seconds"] for s in stored], dtype=np.float64),
            {m: _aligned(stored, m, len(dataset.users)) for m in _metrics(stored[0], "user:")},
            {m: np.array([float(s[f"world:{m}"]) for s in stored]) for m in _metrics(stored[0], "world:")},
            np.stack([s["curve"] for s in stored]),
            json.loads(str(stored[0]["reliability"])),
        )
    return SetResult(dataset.name, dataset.describe(), _facts(works[0]), methods)


def _facts(work: _Work) -> dict[str, Any]:
    world, judged = work.bench.world, work.bench.test.users
    relevant = np.concatenate([world.relevant[user] for user in judged.tolist()])
    return {
        "kind": world.kind,
        "requests": len(world.log),
        "impressions": len(world.log.exposed.values),
        "click_rate": float(world.log.clicked.mean()) if len(world.log.clicked) else None,
        "recalled_unexposed": len(world.log.recalled.values),
        "validation_users": len(work.bench.validation.users),
        "test_users": len(judged),
        "relevant_per_user": len(relevant) / len(judged),
        "relevant_in_tail": float(world.tail[relevant].mean()),
    }


def _write(
    path: Path, outcome: Outcome, settings: dict[str, Any], seconds: float, bins: list[dict[str, float]] | None
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays: dict[str, Any] = {"users": outcome.users, "curve": outcome.curve, "seconds": seconds}
    arrays |= {f"user:{name}": values for name, values in outcome.per_user.items()}
    arrays |= {f"world:{name}": value for name, value in outcome.world.items()}
    arrays["settings"], arrays["reliability"] = json.dumps(settings), json.dumps(bins)
    written_atomically(path, lambda target: np.savez_compressed(target, **arrays))


def _read(path: Path) -> dict[str, npt.NDArray[Any]]:
    with np.load(path, allow_pickle=False) as stored:
        return dict(stored)


def _metrics(stored: dict[str, npt.NDArray[Any]], prefix: str) -> list[str]:
    return [name.removeprefix(prefix) for name in stored if name.startswith(prefix)]


def _aligned(stored: list[dict[str, npt.NDArray[Any]]], metric: str, n_users: int) -> npt.NDArray[np.float64]:
    """(S, U) by user index; users that no seed judges are left out."""
    matrix = np.full((len(stored), n_users), np.nan)
    for row, one in zip(matrix, stored, strict=True):
        row[one["users"]] = one[f"user:{metric}"]
    judged = np.unique(np.concatenate([one["users"] for one in stored]))
    return matrix[:, judged]


def _encoder(config: StudyConfig, say: Say) -> SentenceEncoder:
    def progress(done: int, total: int) -> None:
        say(f"encoded {done:,} of {total:,} texts")

    return SentenceEncoder(config.encoder, config.cache / "vectors", 64, progress)


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def settings_of(config: StudyConfig) -> dict[str, Any]:
    """For the record: everything that a study was told."""
    return {
        "datasets": [str(name) for name in config.datasets],
        "methods": list(config.methods),
        "seeds": list(config.seeds),
        "tuning": min(config.tuning, len(config.seeds)),
        "encoder": config.encoder,
        "dim": config.dim,
        "train": asdict(config.train),
        "upstream": asdict(config.upstream),
    }
