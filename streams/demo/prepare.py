"""What a demo can do before it starts, once: convert MovieLens, embed, fit. Kept by the hash of what went in."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import msgspec

import gpl
from streams.contracts import Item, encode
from streams.data.reader import FILES, records
from streams.demo import movielens
from streams.demo.timeline import Split
from streams.demo.upstream import UpstreamConfig, simulate
from streams.settings import Settings
from streams.views import labeller_config

Say = Callable[[str], None]

_CONVERTERS = ("movielens.py", "upstream.py")


def movielens_directory(root: Path, seed: int, say: Say) -> Path:
    """MovieLens-100K as a data directory under ``root``, with the simulated upstream; made if it is not there.

    Raises DatasetMissingError.
    """
    folder = movielens.locate()
    config = UpstreamConfig(seed=seed)
    sources = [Path(__file__).with_name(name).read_bytes() for name in _CONVERTERS]
    version = importlib.metadata.version("recbole").encode()
    target = root / f"movielens-{_digest(msgspec.json.encode(asdict(config)), version, *sources)}"
    if target.is_dir():
        return target
    say("converting MovieLens-100K and simulating its upstream")
    items = movielens.items(folder)
    with _aside(target) as aside:
        (aside / "items.jsonl").write_bytes(b"".join(encode(item) + b"\n" for item in items))
        with (aside / "recalls.jsonl").open("wb") as recalls, (aside / "feedback.jsonl").open("wb") as feedback:
            for recall, events in simulate(movielens.ratings(folder), [item.item_id for item in items], config):
                recalls.write(encode(recall) + b"\n")
                feedback.writelines(encode(event) + b"\n" for event in events)
    return target


def place_of_fit(root: Path, data: Path, fraction: float, seed: int, settings: Settings) -> Path:
    """Where the fit of these data under these settings is, or would be: named by the hash of all that it depends on."""
    sections = [part.model_dump() for part in (settings.codes, settings.generator, settings.calibration)]
    space = settings.space.model_dump(include={"encoder", "dim"})
    parts = [space, *sections, asdict(labeller_config(settings.labels)), fraction, seed]
    code = [*sorted(Path(gpl.__file__).parent.rglob("*.py")), Path(__file__).parents[1] / "fitting.py"]
    return root / f"fitted-{_digest(msgspec.json.encode(parts), *_contents(data), *(p.read_bytes() for p in code))}"


def is_fitted(artefacts: Path) -> bool:
    """Whether the fit is there; it is written whole or not at all."""
    return (artefacts / "manifest.json").is_file()


def carries_embeddings(data: Path, max_bytes: int) -> bool:
    """Whether the first valid item brings its vector; then all must, and no text is encoded."""
    first = next(records(data / "items.jsonl", Item, max_bytes), None)
    return first is not None and first.embedding is not None


def fit(data: Path, split: Split, settings: Settings, seed: int, target: Path, say: Say) -> None:
    """Fit space, quantiser, generator and calibration on the first part, into the new directory ``target``.

    Raises ValueError when the data do not suffice.
    """
    # torch and what is built on it: only where something is fitted.
    from streams.fitting import fit_records, usable

    cap = settings.kafka.max_record_bytes
    items = usable(records(data / "items.jsonl", Item, cap), say)
    fit_records(items, split.training(data, cap), settings, seed, say).save(target)


@contextmanager
def _aside(target: Path) -> Iterator[Path]:
    """A directory that becomes ``target`` when the block ends well, so that what is there is whole."""
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_name(f".{target.name}.{os.getpid()}")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        yield aside
        shutil.rmtree(target, ignore_errors=True)
        aside.rename(target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _contents(directory: Path) -> Iterator[bytes]:
    for name in FILES:
        with (directory / name).open("rb") as handle:
            yield hashlib.file_digest(handle, "sha256").digest()


def _digest(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()[:12]
