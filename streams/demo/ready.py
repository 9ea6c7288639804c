"""What stands before anything is started: the data in two parts, the configuration, and the fit, made or found."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streams.data.validate import Problem, problems
from streams.demo import prepare
from streams.demo.config import WRITTEN, Place, install, merged, wanted
from streams.demo.timeline import Split, Timeline
from streams.settings import Settings

Say = Callable[[str], None]

_NO_BROKER = "127.0.0.1:9092"  # preparing talks to none


class DemoError(RuntimeError):
    """The demo could not be run; the message says why."""


@dataclass(frozen=True)
class Options:
    """What the command was asked for. ``speed``: event seconds a second, None: such that it takes ``duration``."""

    directory: Path
    data: Path | None
    broker: str
    speed: float | None
    duration: float
    config: Path | None
    window: float | None
    train_fraction: float
    seed: int

    def arguments(self) -> list[str]:
        """The command's arguments that preparing depends on."""
        named = {"--data": self.data, "--config": self.config, "--window": self.window}
        given = [text for name, value in named.items() if value is not None for text in (name, str(value))]
        fixed = {"--out": self.directory, "--train-fraction": self.train_fraction, "--seed": self.seed}
        return [*given, *(text for name, value in fixed.items() for text in (name, str(value)))]


@dataclass(frozen=True)
class Ready:
    """Everything that is known before a broker is started."""

    data: Path
    split: Split
    timeline: Timeline
    fit: Path
    document: dict[str, Any]
    settings: Settings
    speed: float


def get_ready(options: Options, say: Say) -> Ready:
    """Convert where needed, split, and index; the fit is named, not made. Raises DemoError, DatasetMissingError."""
    root = options.directory.absolute()
    place = Place(root, "gpl-demo")
    _check(place, options.data)
    # Before anything else is written: it marks the directory as a demo's.
    settings = install(place, wanted(place, options.config, options.window), root / "none", _NO_BROKER)
    data = options.data or prepare.movielens_directory(root, options.seed, say)
    cap = settings.kafka.max_record_bytes
    if options.data is not None:
        _look_over(data, settings, say)
    try:
        split = Split.of(data, options.train_fraction, cap)
    except ValueError as error:
        raise DemoError(str(error)) from error
    timeline = Timeline.build(data, split, cap)
    if not timeline.requests:
        raise DemoError(
            f"{data}: no request is left to stream, for the first {options.train_fraction:.0%} of the feedback is "
            "fitted on and no recall is younger; give more data or a smaller --train-fraction"
        )
    speed = options.speed or max(timeline.span_seconds / options.duration, 1.0)
    document = wanted(place, options.config, options.window, speed)
    if prepare.carries_embeddings(data, cap):
        document = merged(document, {"space": {"encoder": "precomputed"}})
    settings = install(place, document, root / "none", _NO_BROKER)
    fit = prepare.place_of_fit(root, data, options.train_fraction, options.seed, settings)
    return Ready(data, split, timeline, fit, document, settings, speed)


def _check(place: Place, data: Path | None) -> None:
    """Raise DemoError unless the directory is new, empty or an earlier demo's: a run clears it."""
    directory = place.directory
    if data is not None and data.resolve() == directory.resolve():
        raise DemoError(f"{directory} holds the data; a run clears its directory, --out must name another")
    if not directory.exists() or not any(directory.iterdir()):
        return
    if not place.config.is_file() or not place.config.read_bytes().startswith(WRITTEN.encode()):
        raise DemoError(
            f"{directory} is not empty and not of an earlier demo; a run clears its directory, --out must name another"
        )


def _look_over(data: Path, settings: Settings, say: Say) -> None:
    """Say what is wrong with the user's data; only what makes a run impossible is an error here."""
    shown: list[Problem] = []
    count = 0
    for problem in problems(data, settings.kafka.max_record_bytes, settings.labels.window_seconds):
        if problem.line == 0:
            raise DemoError(f"{data}: {problem.file}: {problem.reason}")
        count += 1
        if len(shown) < 5:
            shown.append(problem)
    for problem in shown:
        say(f"{problem.severity}: {problem.file}:{problem.line}: {problem.field}: {problem.reason}")
    if count > len(shown):
        say(f"{count - len(shown)} more problems: gpl validate {data}")


def fit(options: Options, say: Say) -> Path:
    """Everything that can be kept: convert, embed, fit. Quick when it is there already. Returns where the fit is."""
    ready = get_ready(options, say)
    if not prepare.is_fitted(ready.fit):
        try:
            prepare.fit(ready.data, ready.split, ready.settings, options.seed, ready.fit, say)
        except ValueError as error:
            raise DemoError(
                f"the first {options.train_fraction:.0%} of the feedback cannot be fitted: {error}"
            ) from error
    say(f"prepared: {ready.fit}")
    return ready.fit


def ensure_fitted(options: Options, ready: Ready) -> None:
    """Make the fit if it is not there, in a process of its own: what fitting needs (torch, an encoder) would stay in
    this one's memory. Raises DemoError.
    """
    if not prepare.is_fitted(ready.fit):
        command = [sys.executable, "-m", "streams.cli", "demo", "--prepare", *options.arguments()]
        if subprocess.run(command, check=False).returncode != 0:
            raise DemoError("preparing failed; the reason stands above")
        if not prepare.is_fitted(ready.fit):
            raise DemoError(f"the fit is not where it should be: {ready.fit}")
