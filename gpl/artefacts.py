"""What labelling needs and never learns online: space, quantiser, generator and calibration, on disk as one."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpl.anchors.base import AnchorGenerator, Beams, History, load_generator
from gpl.codes.quantiser import Quantiser, load_quantiser
from gpl.labels.calibration import Fitted, calibration_from_dict
from gpl.space import Space

if TYPE_CHECKING:
    from gpl.codes.trie import SidTrie

MANIFEST = "manifest.json"
_PARTS = ("space", "quantiser", "generator")


class ArtefactsError(ValueError):
    """The artefacts on disk are missing a part, damaged, or do not belong together."""


@dataclass(frozen=True)
class NotLoaded:
    """Stands for a generator that was left on disk: it has a version, and refuses to work."""

    version: str

    def generate(self, histories: Sequence[History], trie: SidTrie, beams: int) -> list[Beams]:
        raise RuntimeError(f"generator {self.version} was not loaded")

    def save(self, directory: Path) -> None:
        raise RuntimeError(f"generator {self.version} was not loaded")


@dataclass(frozen=True)
class Artefacts:
    """The fitted parts. ``report``: what fitting found (sizes, code use, losses, warnings), for people."""

    space: Space
    quantiser: Quantiser
    generator: AnchorGenerator
    calibration: Fitted
    report: dict[str, Any] = field(default_factory=dict)

    def save(self, directory: Path) -> None:
        """Write everything, aside first and renamed at the end: ``directory`` is whole or absent.

        Raises FileExistsError when ``directory`` exists: artefacts are never changed in place.
        """
        if directory.exists():
            raise FileExistsError(f"{directory} exists; artefacts are written to a new directory")
        directory.parent.mkdir(parents=True, exist_ok=True)
        aside = directory.with_name(f".{directory.name}.{os.getpid()}")
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        try:
            self.space.save(aside / "space")
            self.quantiser.save(aside / "quantiser")
            self.generator.save(aside / "generator")
            manifest = {
                "versions": {part: getattr(self, part).version for part in _PARTS},
                "calibration": self.calibration.to_dict(),
                "report": self.report,
                "sha256": _checksums(aside),
            }
            (aside / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
            for path in aside.rglob("*"):
                _sync(path)
            _sync(aside)
            aside.rename(directory)
            _sync(directory.parent)
        finally:
            shutil.rmtree(aside, ignore_errors=True)

    @classmethod
    def load(cls, directory: Path, with_generator: bool = True) -> Artefacts:
        """Read and verify. ``with_generator`` False: only its version is read, for who generates no anchors; a large
        language model then need be neither loaded nor installed.

        Raises FileNotFoundError when there are none, or what the generator needs is not installed; ArtefactsError when
        they are damaged.
        """
        path = directory / MANIFEST
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no artefacts there; `gpl fit` makes them")
        try:
            manifest = json.loads(path.read_text())
            expected, versions, report = dict(manifest["sha256"]), dict(manifest["versions"]), dict(manifest["report"])
            calibration = calibration_from_dict(manifest["calibration"])
        except (ValueError, KeyError, TypeError) as error:
            raise ArtefactsError(f"{path}: not a manifest of artefacts: {error!r}") from error
        found = _checksums(directory)
        for name in sorted(expected.keys() | found.keys()):
            if found.get(name) != expected.get(name):
                what = "is missing" if name not in found else "is not of it" if name not in expected else "is damaged"
                raise ArtefactsError(f"{directory / name} {what}")
        loaded = cls(
            space=Space.load(directory / "space"),
            quantiser=load_quantiser(directory / "quantiser"),
            generator=load_generator(directory / "generator") if with_generator else NotLoaded(versions["generator"]),
            calibration=calibration,
            report=report,
        )
        for part in _PARTS:
            actual = getattr(loaded, part).version
            if actual != versions.get(part):
                raise ArtefactsError(
                    f"{directory / part}: version {actual!r}, the manifest says {versions.get(part)!r}"
                )
        return loaded


def _checksums(directory: Path) -> dict[str, str]:
    """SHA-256 of every file but the manifest, by its path inside ``directory``."""
    return {
        path.relative_to(directory).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
