"""The centring that is fitted once, frozen and versioned."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from gpl.space.encoder import Encoder

_MANIFEST = "space.json"
_WEIGHTS = "space.safetensors"
# Rows this much shorter than what they were subtracted from are float32 rounding, not a direction.
_NOISE = 1e-6


@dataclass(frozen=True, eq=False)
class Space:
    """``e = (x - mean) / |x - mean|`` for a raw vector x of ``encoder``: centred on the catalogue it was fitted on.

    Centring is ours (method.md: it matters as much as the generator). Cosines of raw sentence vectors are
    squeezed into a narrow positive band; about the mean they spread over [-1, 1].
    """

    encoder: str
    """Name of the text encoder, or "precomputed": the vectors come with the items."""
    dim: int
    mean: npt.NDArray[np.float32]
    """(dim,)"""
    version: str
    """Hash of encoder and mean: vectors compare only within one version."""
    identity: str | None = None
    """`Encoder.identity` where that says more than its name: of a local directory, whose contents may change."""

    @classmethod
    def fit(cls, encoder: str, raw: npt.ArrayLike, identity: str | None = None) -> Space:
        """Centre on the mean of ``raw`` (n, dim). Rows that are all the same (or a single one) leave nothing to
        centre on: the mean is then zero. ``identity``: the encoder's. Raises ValueError on a wrong shape, no rows, or
        values not finite.
        """
        rows = _checked(raw, dim=None)
        if not len(rows):
            raise ValueError("raw: no rows to fit the space on")
        mean = np.zeros(rows.shape[1], np.float32)
        if (rows != rows[0]).any():
            mean[:] = rows.mean(axis=0, dtype=np.float64)
        identity = None if identity == encoder else identity
        return cls(encoder, rows.shape[1], mean, _version(identity or encoder, mean), identity)

    def check_encoder(self, encoder: Encoder | None) -> None:
        """Raise ValueError where the weights of ``encoder`` are not those that the space was fitted with, as far as
        the space knows them.
        """
        # Behind the "@" stands what the weights are: a directory may have moved, or be named in another way.
        known = None if self.identity is None else self.identity.rpartition("@")[2]
        if encoder is not None and known is not None and encoder.identity.rpartition("@")[2] != known:
            raise ValueError(
                f"encoder {encoder.name!r} is now {encoder.identity}, the space was fitted with {self.identity}: "
                "vectors of the two do not compare; put its files back, or fit anew"
            )

    def project(self, raw: npt.ArrayLike, item_ids: Sequence[str] | None = None) -> npt.NDArray[np.float32]:
        """Unit float32 vectors (n, dim) of raw ones (n, dim); a row's result does not depend on the others.

        Raises ValueError naming the row (by its id where there are ``item_ids``) that equals the mean, for it has no
        direction; also on a wrong shape or values not finite.
        """
        rows = _checked(raw, self.dim)
        centred = rows.astype(np.float64) - self.mean
        length = np.sqrt(np.square(centred).sum(axis=1))
        scale = np.sqrt(np.square(rows, dtype=np.float64).sum(axis=1)) + np.linalg.norm(self.mean.astype(np.float64))
        none = np.flatnonzero(length <= _NOISE * scale)
        if len(none):
            row = f"raw[{none[0]}]" if item_ids is None else f"item {item_ids[none[0]]!r}: its raw vector"
            raise ValueError(f"{row} equals the mean of the catalogue, so it has no direction")
        unit: npt.NDArray[np.float32] = (centred / length[:, None]).astype(np.float32)
        return unit

    def save(self, directory: Path) -> None:
        """Write ``space.json`` and ``space.safetensors`` into ``directory``, which is made if need be."""
        directory.mkdir(parents=True, exist_ok=True)
        save_file({"mean": self.mean}, directory / _WEIGHTS)
        manifest = {"encoder": self.encoder, "dim": self.dim, "version": self.version}
        if self.identity is not None:
            manifest["identity"] = self.identity
        (directory / _MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")

    @classmethod
    def load(cls, directory: Path) -> Space:
        """What ``save`` wrote. Raises FileNotFoundError, or ValueError when the version does not fit the weights."""
        manifest = json.loads((directory / _MANIFEST).read_text())
        try:
            mean = load_file(directory / _WEIGHTS)["mean"]
        except (KeyError, SafetensorError) as error:
            raise ValueError(f"{directory / _WEIGHTS}: {error}") from error
        identity = manifest.get("identity")  # not there where it is the name, and in what older releases wrote
        version = _version(identity or manifest["encoder"], mean)
        if version != manifest["version"] or mean.shape != (manifest["dim"],):
            raise ValueError(
                f"{directory / _MANIFEST}: version {manifest['version']}, dim {manifest['dim']}; "
                f"the weights beside it are version {version}, shape {mean.shape}"
            )
        return cls(manifest["encoder"], manifest["dim"], mean, version, identity)


def _version(encoder: str, mean: npt.NDArray[np.float32]) -> str:
    content = encoder.encode() + b"\0" + mean.astype("<f4").tobytes()
    return hashlib.sha256(content).hexdigest()[:12]


def _checked(raw: npt.ArrayLike, dim: int | None) -> npt.NDArray[np.float32]:
    rows = np.asarray(raw, np.float32)
    if rows.ndim != 2 or (dim is not None and rows.shape[1] != dim) or rows.shape[1] == 0:
        raise ValueError(f"raw: shape {rows.shape}, expected (n, {'dim' if dim is None else dim})")
    finite = np.isfinite(rows).all(axis=1)
    if not finite.all():
        raise ValueError(f"raw[{int(np.flatnonzero(~finite)[0])}]: has a value that is not finite")
    return rows
