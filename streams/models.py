"""Published pre-rankers in storage: what the trainer writes, the scorer reads and ``gpl models`` shows.

``<models>/<version>/`` holds ``model.safetensors`` (weights only), ``ids.json`` (row order of users and items),
``probe.json`` (pairs with the scores that this model gave them) and ``manifest.json`` with the checksum of each. The
checksum of the manifest travels in the ModelUpdate, so a reader knows that it has, bit for bit, what was announced.
Written once, never changed. Beside them stand ``pin.json`` and ``refusals.json``.
"""

from __future__ import annotations

import re
import time
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

from streams.durable import sha256_hex
from streams.storage import Storage, open_storage, split_uri

FORMAT = 1
_MANIFEST, _WEIGHTS, _IDS, _PROBE = "manifest.json", "model.safetensors", "ids.json", "probe.json"
_PIN, _REFUSALS, _ACCEPT = "pin.json", "refusals.json", "accept-next.json"
_VERSION = re.compile(r"v(\d{6,})-\d+")
_REFUSALS_KEPT = 100


class ModelError(ValueError):
    """A published model that is damaged, incomplete, missing or of another kind, or such a pin; the message says it."""


class UnreadableError(ModelError):
    """A file that storage does not give, for another reason than that it is not there: it may come back."""


class OtherSoftwareError(ModelError):
    """A manifest that is whole, and says what this software cannot read."""


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """About a published model. ``config``: of the network, enough to build it; ``published_at``: wall milliseconds.

    ``run``, ``step``: place in the batch journal, from which ``gpl models rebuild`` makes the weights again.
    ``records``: label records trained on.
    """

    format: int = FORMAT
    model: str
    version: str
    step: int
    run: int = 0
    records: int = 0
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


class Probe(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Requests with the scores that the published model gave them, to compare later models with.

    Parallel by request: ``users``, ``history`` (items they had liked), ``items``, ``score`` (raw anchor score, null
    where there is none), ``logits``.
    """

    users: list[str]
    history: list[list[str]]
    items: list[list[str]]
    score: list[list[float | None]]
    logits: list[list[float]]


NO_PROBE = Probe([], [], [], [], [])


class Pin(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The version that stays in service whatever the trainer publishes. ``at``: wall milliseconds."""

    version: str
    at: int


class Refused(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A publication that the gate refused, and how often in a row for the same reason. Times: wall milliseconds."""

    reason: str
    why: str
    step: int
    first_at: int
    last_at: int
    times: int


@dataclass(frozen=True)
class Published:
    """A model as read back, checked against its checksums."""

    manifest: Manifest
    weights: Mapping[str, Tensor]
    ids: Ids
    probe: Probe


class ModelStore:
    """The published models in one location, the pin and the refusals."""

    def __init__(self, location: Path | str | Storage) -> None:
        """Raises ValueError for a location that no storage serves."""
        self.storage = open_storage(location) if isinstance(location, (Path, str)) else location

    def write(
        self, manifest: Manifest, weights: Mapping[str, Tensor], ids: Ids, probe: Probe = NO_PROBE
    ) -> tuple[str, str]:
        """Write a model durably. Returns its URI and checksum. Raises FileExistsError for a version that exists."""
        if manifest.version in self.storage.names():
            raise FileExistsError(f"version: {manifest.version} exists; a published model is never changed")
        files = {
            _WEIGHTS: save_tensors(dict(weights)),
            _IDS: msgspec.json.encode(ids),
            _PROBE: msgspec.json.encode(probe),
        }
        sealed = msgspec.structs.replace(manifest, files={name: sha256_hex(data) for name, data in files.items()})
        document = msgspec.json.format(msgspec.json.encode(sealed), indent=2)
        uri = self.storage.write(manifest.version, {**files, _MANIFEST: document}, last=_MANIFEST)
        return uri, sha256_hex(document)

    def manifest(self, version: str) -> tuple[Manifest, str]:
        """A version's manifest and its checksum. Raises ModelError."""
        document = _bytes(self.storage, version, _MANIFEST)
        return _manifest(document), sha256_hex(document)

    def read(self, version: str, checksum: str | None = None) -> Published:
        """Read and verify; against ``checksum`` where the manifest itself is in doubt. Raises ModelError when anything
        is missing or differs."""
        document = _bytes(self.storage, version, _MANIFEST)
        if checksum is not None and sha256_hex(document) != checksum:
            raise ModelError(f"checksum: {version}/{_MANIFEST} is not the one that was announced ({checksum})")
        manifest = _manifest(document)
        contents = {name: _bytes(self.storage, version, name) for name in manifest.files}
        for name, data in contents.items():
            if sha256_hex(data) != manifest.files[name]:
                raise ModelError(f"{version}/{name} does not match the checksum in {_MANIFEST}")
        try:
            ids = msgspec.json.decode(contents[_IDS], type=Ids)
            probe = msgspec.json.decode(contents[_PROBE], type=Probe) if _PROBE in contents else NO_PROBE
            weights = load_tensors(contents[_WEIGHTS])
        except KeyError as error:
            raise ModelError(f"{version}/{_MANIFEST} names no {error.args[0]}") from error
        except (ValueError, SafetensorError) as error:
            raise ModelError(f"{version}: {error}") from error
        return Published(manifest, weights, ids, probe)

    def versions(self) -> list[str]:
        """All versions, newest first, whatever state they are in."""
        found = (name for name in self.storage.names() if number_of(name))
        return sorted(found, key=number_of, reverse=True)

    def remove(self, version: str) -> None:
        self.storage.remove(version, last=_MANIFEST)

    def uri(self, version: str) -> str:
        return self.storage.uri(version)

    # What stands beside the models

    def pinned(self) -> Pin | None:
        """Raises ModelError when the pin cannot be read: better no publication than one over a pin."""
        try:
            return msgspec.json.decode(self.storage.read(_PIN), type=Pin)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise UnreadableError(f"{_PIN}: {error}") from error
        except ValueError as error:
            raise ModelError(f"{_PIN}: {error}; `gpl models pin` and `unpin` put that right") from error

    def pin(self, version: str) -> None:
        self.storage.put(_PIN, msgspec.json.encode(Pin(version, int(time.time() * 1000))))

    def unpin(self) -> None:
        self.storage.remove(_PIN)

    def accept(self) -> None:
        """Let the next publication pass without comparison with the last model: the world has changed, not the feed."""
        self.storage.put(_ACCEPT, b"{}")

    def accepted(self) -> bool:
        """Whether ``accept`` was called and no model has passed since."""
        return _ACCEPT in self.storage.names()

    def clear_acceptance(self) -> None:
        self.storage.remove(_ACCEPT)

    def refusals(self) -> list[Refused]:
        """The newest refusals, oldest first."""
        try:
            return msgspec.json.decode(self.storage.read(_REFUSALS), type=list[Refused])
        except (FileNotFoundError, ValueError):
            return []

    def refuse(self, reason: str, why: str, step: int, at: int) -> None:
        """Remember a refusal; the same reason again counts up the last one."""
        known = self.refusals()
        if known and known[-1].reason == reason:
            last = known.pop()
            known.append(Refused(reason, why, step, last.first_at, at, last.times + 1))
        else:
            known.append(Refused(reason, why, step, at, at, 1))
        self.storage.put(_REFUSALS, msgspec.json.encode(known[-_REFUSALS_KEPT:]))


def read(location: Path | str, checksum: str) -> Published:
    """A model by its directory or URI. Raises ModelError when it is not, bit for bit, what was announced."""
    try:
        storage, version = split_uri(location.resolve().as_uri() if isinstance(location, Path) else location)
    except (ValueError, ImportError) as error:
        raise ModelError(str(error)) from error
    return ModelStore(storage).read(version, checksum)


def version_name(number: int, step: int) -> str:
    """Version of a model: the count of publications, then the step. Sorts by number as text."""
    return f"v{number:06d}-{step:08d}"


def number_of(version: str) -> int:
    """The count in a version's name; 0 for a name of another form."""
    found = _VERSION.fullmatch(version)
    return int(found[1]) if found else 0


def path_of(uri: str) -> Path:
    """Directory that a file URI names. Raises ModelError for any other."""
    parts = urlsplit(uri)
    if parts.scheme != "file" or parts.netloc not in ("", "localhost"):
        raise ModelError(f"uri: {uri!r}, a file:// URI of this host expected")
    return Path(url2pathname(parts.path))


def _bytes(storage: Storage, version: str, name: str) -> bytes:
    try:
        return storage.read(f"{version}/{name}")
    except OSError as error:
        missing = isinstance(error, (FileNotFoundError, NotADirectoryError))
        kind = ModelError if missing else UnreadableError
        raise kind(f"{storage.uri(version)}/{name}: {error.strerror or 'not found'}") from error


def _manifest(document: bytes) -> Manifest:
    try:
        manifest = msgspec.json.decode(document, type=Manifest)
    except msgspec.ValidationError as error:
        raise OtherSoftwareError(f"{_MANIFEST}: {error}") from error
    except ValueError as error:
        raise ModelError(f"{_MANIFEST}: {error}") from error
    if manifest.format != FORMAT:
        raise OtherSoftwareError(f"format: {manifest.format}, this version reads {FORMAT}")
    return manifest
