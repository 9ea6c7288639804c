"""Checkpoints: one directory binds the weights, the optimizer, the positions in the log and everything else of a step.

``step-00001234/`` holds one safetensors file per model, ``state.json`` and ``manifest.json`` with the checksum of each
file. No pickles. A checkpoint that does not match its manifest is skipped with a warning and the one before it serves.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec
import structlog
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from streams.durable import clear_aside, sha256_hex, write_directory

log = structlog.get_logger()

FORMAT = 1
_PREFIX = "step-"
_MANIFEST = "manifest.json"
_STATE = "state.json"


class CheckpointError(ValueError):
    """A checkpoint that is damaged or incomplete; the message says how."""


@dataclass(frozen=True)
class Checkpoint:
    """All that the trainer is after one step.

    ``positions``: next offset to read, per partition of the labels topic. ``tensors``: by model name, weights and
    optimizer. ``state``: JSON of everything else (ids, dedup window, popularity, validation window).
    ``versions``: of the frozen space; ``metrics``: progressive validation; ``newest_event_ts``: milliseconds.
    """

    step: int
    positions: Mapping[int, int]
    tensors: Mapping[str, Mapping[str, Tensor]]
    state: bytes
    versions: Mapping[str, str]
    metrics: Mapping[str, float]
    newest_event_ts: int


class _Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    format: int
    step: int
    positions: dict[int, int]
    versions: dict[str, str]
    metrics: dict[str, float]
    newest_event_ts: int
    files: dict[str, str]


class CheckpointStore:
    """The checkpoints of one trainer, in one directory of a local or mounted file system."""

    def __init__(self, directory: Path, keep: int) -> None:
        self._directory = directory
        self._keep = keep

    def save(self, checkpoint: Checkpoint) -> Path:
        """Write durably, then let go of all but the ``keep`` newest. Returns its directory."""
        files = {f"{name}.safetensors": save_tensors(dict(part)) for name, part in checkpoint.tensors.items()}
        files[_STATE] = checkpoint.state
        manifest = _Manifest(
            format=FORMAT,
            step=checkpoint.step,
            positions=dict(checkpoint.positions),
            versions=dict(checkpoint.versions),
            metrics=dict(checkpoint.metrics),
            newest_event_ts=checkpoint.newest_event_ts,
            files={name: sha256_hex(data) for name, data in files.items()},
        )
        files[_MANIFEST] = msgspec.json.format(msgspec.json.encode(manifest), indent=2)
        target = self._directory / f"{_PREFIX}{checkpoint.step:08d}"
        write_directory(target, files)
        self._retain(checkpoint.step)
        return target

    def load_newest(self) -> Checkpoint | None:
        """The newest valid checkpoint, None when there is none."""
        clear_aside(self._directory)
        for step, path in sorted(self._all(), reverse=True):
            try:
                return _read(path)
            except (CheckpointError, OSError) as error:
                log.warning("checkpoint_skipped", step=step, path=str(path), why=str(error))
        return None

    def _all(self) -> list[tuple[int, Path]]:
        found = (path for path in self._directory.glob(f"{_PREFIX}*") if path.is_dir())
        return [(int(path.name[len(_PREFIX) :]), path) for path in found if path.name[len(_PREFIX) :].isdigit()]

    def _retain(self, saved: int) -> None:
        # What lies beyond the step just saved was found damaged at the start; it must not crowd out good ones.
        kept = sorted((step for step, _ in self._all() if step <= saved), reverse=True)[: self._keep]
        for step, path in self._all():
            if step not in kept:
                shutil.rmtree(path, ignore_errors=True)


def _read(path: Path) -> Checkpoint:
    try:
        manifest = msgspec.json.decode((path / _MANIFEST).read_bytes(), type=_Manifest)
    except FileNotFoundError as error:
        raise CheckpointError(f"{_MANIFEST} is missing") from error
    except msgspec.DecodeError as error:
        raise CheckpointError(f"{_MANIFEST}: {error}") from error
    if manifest.format != FORMAT:
        raise CheckpointError(f"format: {manifest.format}, this trainer reads {FORMAT}")
    contents = {}
    for name, checksum in manifest.files.items():
        try:
            contents[name] = (path / name).read_bytes()
        except FileNotFoundError as error:
            raise CheckpointError(f"{name} is missing") from error
        if sha256_hex(contents[name]) != checksum:
            raise CheckpointError(f"{name} does not match the checksum in {_MANIFEST}")
    state = contents.pop(_STATE, None)
    if state is None:
        raise CheckpointError(f"{_MANIFEST} names no {_STATE}")
    try:
        tensors = {name.removesuffix(".safetensors"): load_tensors(data) for name, data in contents.items()}
    except SafetensorError as error:
        raise CheckpointError(f"tensors: {error}") from error
    return Checkpoint(
        step=manifest.step,
        positions=manifest.positions,
        tensors=tensors,
        state=state,
        versions=manifest.versions,
        metrics=manifest.metrics,
        newest_event_ts=manifest.newest_event_ts,
    )
