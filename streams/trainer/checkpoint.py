"""Checkpoints: one directory binds the weights, the optimizer, the positions in the log and everything else of a step.

``step-00001234/`` holds safetensors files, ``state.json``, ``progressive.json`` and ``manifest.json`` with the
checksum of each file. No pickles. A checkpoint that does not match its manifest is skipped with a warning and the one
before it serves. One that cannot be read just now, or that other software made, is not damaged: that is an error, since
going on without it would in the end remove it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import structlog
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from streams.durable import sha256_hex
from streams.storage import Storage, open_storage
from streams.trainer.retention import retained

log = structlog.get_logger()

FORMAT = 2
_PREFIX = "step-"
_MANIFEST = "manifest.json"
_STATE = "state.json"
_FIGURES = "progressive.json"
_TENSORS = ".safetensors"


class CheckpointError(ValueError):
    """A checkpoint that is damaged or incomplete, or does not fit the settings; the message says how."""


class OtherSoftwareError(CheckpointError):
    """A checkpoint whose manifest is whole, and says what this software cannot read."""


@dataclass(frozen=True)
class Checkpoint:
    """All that the trainer is after one step.

    ``run``: of the batch journal, to which the step belongs. ``positions``, ``vectors``: next offset to read, per
    partition, of the labels and of the item vectors. ``tensors``: by file, weights with optimizer, and the tables by
    id. ``state``: JSON of everything else (ids, dedup window, validation window). ``versions``: of the frozen space;
    ``metrics``: progressive validation in short, ``figures`` in full (JSON, for readers); ``newest_event_ts``:
    milliseconds.
    """

    step: int
    run: int
    positions: Mapping[int, int]
    vectors: Mapping[int, int]
    tensors: Mapping[str, Mapping[str, Tensor]]
    state: bytes
    versions: Mapping[str, str]
    metrics: Mapping[str, float]
    newest_event_ts: int
    figures: bytes = field(default=b"{}", compare=False)


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """About a checkpoint. ``written_at``: wall milliseconds; ``files``: checksums of the others, ``checksum``
    of the manifest itself: a flipped bit in a position would go unnoticed without."""

    format: int
    step: int
    run: int
    positions: dict[int, int]
    vectors: dict[int, int]
    versions: dict[str, str]
    metrics: dict[str, float]
    newest_event_ts: int
    written_at: int
    files: dict[str, str]
    checksum: str = ""

    def own_checksum(self) -> str:
        """Of all that it says but ``checksum``."""
        return sha256_hex(msgspec.json.encode(msgspec.structs.replace(self, checksum="")))


class CheckpointStore:
    """The checkpoints of one trainer, in one location. Only the trainer itself saves and discards."""

    def __init__(
        self,
        location: Path | str | Storage,
        keep: int,
        keep_hourly: int = 0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """``keep``: newest ones that stay; ``keep_hourly``: beside them the first of each of that many hours."""
        self._storage = open_storage(location) if isinstance(location, (Path, str)) else location
        self._keep = keep
        self._keep_hourly = keep_hourly
        self._clock = clock
        self._written_at: dict[int, int] = {}

    def save(self, checkpoint: Checkpoint) -> str:
        """Write durably, then let go of what is no longer kept. Returns its URI."""
        files = {f"{name}{_TENSORS}": save_tensors(dict(part)) for name, part in checkpoint.tensors.items()}
        files[_STATE] = checkpoint.state
        files[_FIGURES] = checkpoint.figures
        manifest = Manifest(
            format=FORMAT,
            step=checkpoint.step,
            run=checkpoint.run,
            positions=dict(checkpoint.positions),
            vectors=dict(checkpoint.vectors),
            versions=dict(checkpoint.versions),
            metrics=dict(checkpoint.metrics),
            newest_event_ts=checkpoint.newest_event_ts,
            written_at=int(self._clock() * 1000),
            files={name: sha256_hex(data) for name, data in files.items()},
        )
        sealed = msgspec.structs.replace(manifest, checksum=manifest.own_checksum())
        files[_MANIFEST] = msgspec.json.format(msgspec.json.encode(sealed), indent=2)
        uri = self._storage.write(_name(checkpoint.step), files, last=_MANIFEST)
        self._written_at[checkpoint.step] = manifest.written_at
        self._retain(checkpoint.step)
        return uri

    def load_newest(self) -> Checkpoint | None:
        """The newest valid checkpoint, None when there is none. Raises as ``load_at_most``."""
        return self.load_at_most(None)

    def load_at_most(
        self, step: int | None, wanted: Callable[[Manifest], bool] = lambda manifest: True
    ) -> Checkpoint | None:
        """The newest valid checkpoint up to a step, of those that ``wanted`` says yes to.

        Raises OSError when one cannot be read, and OtherSoftwareError.
        """
        for found in sorted(self.steps(), reverse=True):
            if step is not None and found > step:
                continue
            try:
                if wanted(self.manifest(found)):
                    return self.load(found)
            except OtherSoftwareError:
                raise
            except CheckpointError as error:
                log.warning("checkpoint_skipped", step=found, path=self._storage.uri(_name(found)), why=str(error))
        return None

    def load(self, step: int) -> Checkpoint:
        """The checkpoint of a step. Raises CheckpointError when it is missing or damaged."""
        manifest = self.manifest(step)
        contents = {}
        for name, checksum in manifest.files.items():
            contents[name] = self._read(step, name)
            if sha256_hex(contents[name]) != checksum:
                raise CheckpointError(f"{name} does not match the checksum in {_MANIFEST}")
        state = contents.pop(_STATE, None)
        if state is None:
            raise CheckpointError(f"{_MANIFEST} names no {_STATE}")
        try:
            tensors = {
                name.removesuffix(_TENSORS): load_tensors(data)
                for name, data in contents.items()
                if name.endswith(_TENSORS)
            }
        except SafetensorError as error:
            raise CheckpointError(f"tensors: {error}") from error
        return Checkpoint(
            step=manifest.step,
            run=manifest.run,
            positions=manifest.positions,
            vectors=manifest.vectors,
            tensors=tensors,
            state=state,
            versions=manifest.versions,
            metrics=manifest.metrics,
            newest_event_ts=manifest.newest_event_ts,
            figures=contents.get(_FIGURES, b"{}"),
        )

    def manifest(self, step: int) -> Manifest:
        """What a checkpoint says of itself. Raises CheckpointError when it is missing or damaged."""
        data = self._read(step, _MANIFEST)
        sound = _matches_its_checksum(data)
        try:
            manifest = msgspec.json.decode(data, type=Manifest)
        except ValueError as error:
            raise self._other(step, str(error)) if sound else CheckpointError(f"{_MANIFEST}: {error}") from error
        if not sound or manifest.step != step:
            raise CheckpointError(f"{_MANIFEST} does not match its own checksum")
        if manifest.format != FORMAT:
            raise self._other(step, f"format: {manifest.format}, this trainer reads {FORMAT}")
        return manifest

    def steps(self) -> list[int]:
        """Steps of all checkpoints, whatever state they are in, ascending."""
        found = (name.removeprefix(_PREFIX) for name in self._storage.names() if name.startswith(_PREFIX))
        return sorted(int(number) for number in found if number.isdigit())

    def discard_after(self, step: int) -> None:
        """Let go of all checkpoints of later steps, the newest last: a restart takes it up until it is gone, then that
        of ``step``, and never one between the two."""
        for later in (found for found in self.steps() if found > step):
            self._storage.remove(_name(later), last=_MANIFEST)

    def _retain(self, saved: int) -> None:
        # What lies beyond the step just saved was found damaged at the start, or is what the start goes back behind; it
        # must not crowd out good ones, nor must what a failed save left half-written. It goes in the order of
        # `discard_after`.
        steps = self.steps()
        written: dict[int, int | None] = {}
        kept: set[int] = set()
        for step in (step for step in steps if step <= saved):
            try:
                written[step] = self._when(step)
            except OSError as error:  # not damaged, as far as anyone can tell
                log.warning("checkpoint_unreadable", step=step, path=self._storage.uri(_name(step)), why=str(error))
                kept.add(step)
            except OtherSoftwareError:
                written[step] = None
            except CheckpointError:
                pass  # it goes
        kept |= retained(written, self._keep, self._keep_hourly, self._when(saved))
        for step in steps:
            if step not in kept:
                self._storage.remove(_name(step), last=_MANIFEST)
                self._written_at.pop(step, None)

    def _when(self, step: int) -> int:
        """A checkpoint was written, wall milliseconds. Raises CheckpointError and OSError."""
        if step not in self._written_at:
            self._written_at[step] = self.manifest(step).written_at
        return self._written_at[step]

    def _other(self, step: int, why: str) -> OtherSoftwareError:
        return OtherSoftwareError(
            f"{self._storage.uri(_name(step))}: made by other software: {why}. Start that, or go on without this "
            "checkpoint: --start-from step-N of an older one, or earliest"
        )

    def _read(self, step: int, file: str) -> bytes:
        try:
            return self._storage.read(f"{_name(step)}/{file}")
        except (FileNotFoundError, NotADirectoryError) as error:
            raise CheckpointError(f"{file} is missing") from error


def _matches_its_checksum(manifest: bytes) -> bool:
    """Whatever its fields are: a flipped bit in a name or in the format is not another software's manifest."""
    try:
        said = msgspec.json.decode(manifest, type=dict[str, Any])
    except ValueError:
        return False
    unsealed = msgspec.json.encode({**said, "checksum": ""})
    return bool(said.get("checksum") == sha256_hex(unsealed))


def _name(step: int) -> str:
    return f"{_PREFIX}{step:08d}"
