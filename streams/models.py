"""A published pre-ranker on disk: what the trainer writes and the scorer reads.

``<models>/<version>/`` holds ``model.safetensors`` (weights only), ``ids.json`` (row order of users and items) and
``manifest.json`` with the checksum of both. The checksum of the manifest travels in the ModelUpdate, so a
reader knows that it has, bit for bit, what was announced. Written once, never changed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

import msgspec
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from streams.durable import sha256_hex, write_directory

FORMAT = 1
_MANIFEST, _WEIGHTS, _IDS = "manifest.json", "model.safetensors", "ids.json"
_VERSION = re.compile(r"v(\d{6,})-\d+")


class ModelError(ValueError):
    """A published model that is damaged, incomplete or of another kind; the message says how."""


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """About a published model. ``config``: of the network, enough to build it; ``published_at``: wall milliseconds."""

    format: int = FORMAT
    model: str
    version: str
    step: int
    config: dict[str, float | int | str | bool]
    encoder: str
    quantiser: str
    source_offsets: dict[str, int]
    newest_event_ts: int
    published_at: int
    metrics: dict[str, float]
    files: dict[str, str] = {}


class Ids(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Ids in row order, row 0 (unknown) left out."""

    users: list[str]
    items: list[str]


@dataclass(frozen=True)
class Published:
    """A model as read back, checked against its checksums."""

    manifest: Manifest
    weights: Mapping[str, Tensor]
    ids: Ids


def write(models: Path, manifest: Manifest, weights: Mapping[str, Tensor], ids: Ids) -> tuple[Path, str]:
    """Write a model durably. Returns its directory and checksum. Raises FileExistsError for a version that exists."""
    target = models / manifest.version
    if target.exists():
        raise FileExistsError(f"version: {target} exists; a published model is never changed")
    files = {_WEIGHTS: save_tensors(dict(weights)), _IDS: msgspec.json.encode(ids)}
    sealed = msgspec.structs.replace(manifest, files={name: sha256_hex(data) for name, data in files.items()})
    document = msgspec.json.format(msgspec.json.encode(sealed), indent=2)
    write_directory(target, {**files, _MANIFEST: document})
    return target, sha256_hex(document)


def read(directory: Path, checksum: str) -> Published:
    """Read and verify. Raises ModelError when anything is missing or differs from what was announced."""
    document = _bytes(directory, _MANIFEST)
    if sha256_hex(document) != checksum:
        raise ModelError(f"checksum: {directory / _MANIFEST} is not the one that was announced ({checksum})")
    manifest = _manifest(document)
    contents = {name: _bytes(directory, name) for name in (_WEIGHTS, _IDS)}
    for name, data in contents.items():
        if sha256_hex(data) != manifest.files.get(name):
            raise ModelError(f"{directory / name} does not match the checksum in {_MANIFEST}")
    try:
        ids = msgspec.json.decode(contents[_IDS], type=Ids)
        weights = load_tensors(contents[_WEIGHTS])
    except (msgspec.DecodeError, SafetensorError) as error:
        raise ModelError(f"{directory}: {error}") from error
    return Published(manifest, weights, ids)


def version_name(number: int, step: int) -> str:
    """Version of a model: the count of publications, then the step. Sorts by number as text."""
    return f"v{number:06d}-{step:08d}"


def number_of(version: str) -> int:
    """The count in a version's name; 0 for a name of another form."""
    found = _VERSION.fullmatch(version)
    return int(found[1]) if found else 0


def versions(models: Path) -> list[Path]:
    """Directories of all versions, newest first, whatever state they are in."""
    return sorted((path for path in models.glob("v*") if number_of(path.name)), key=_number, reverse=True)


def next_number(models: Path) -> int:
    """One above the highest number on disk."""
    return 1 + max(map(_number, versions(models)), default=0)


def path_of(uri: str) -> Path:
    """Directory that a ModelUpdate's uri names. Raises ModelError for anything but a file URI."""
    parts = urlsplit(uri)
    if parts.scheme != "file" or parts.netloc not in ("", "localhost"):
        raise ModelError(f"uri: {uri!r}, a file:// URI of this host expected")
    return Path(url2pathname(parts.path))


def _number(path: Path) -> int:
    return number_of(path.name)


def _bytes(directory: Path, name: str) -> bytes:
    try:
        return (directory / name).read_bytes()
    except OSError as error:
        raise ModelError(f"{directory / name}: {error.strerror}") from error


def _manifest(document: bytes) -> Manifest:
    try:
        manifest = msgspec.json.decode(document, type=Manifest)
    except msgspec.DecodeError as error:
        raise ModelError(f"{_MANIFEST}: {error}") from error
    if manifest.format != FORMAT:
        raise ModelError(f"format: {manifest.format}, this version reads {FORMAT}")
    return manifest
