"""The centring, and the reduction if there is one, that are fitted once, frozen and versioned."""

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
    With a ``basis`` B, ``e = B' (x - mean) / |B' (x - mean)|``.

    Centring is ours (method.md: it matters as much as the generator). Cosines of raw sentence vectors are
    squeezed into a narrow positive band; about the mean they spread over [-1, 1].
    """

    encoder: str
    """Name of the text encoder, or "precomputed": the vectors come with the items."""
    mean: npt.NDArray[np.float32]
    """(raw_dim,)"""
    version: str
    """Hash of encoder, mean and basis: vectors compare only within one version."""
    identity: str | None = None
    """`Encoder.identity` where that says more than its name: of a local directory, whose contents may change."""
    basis: npt.NDArray[np.float32] | None = None
    """(raw_dim, dim) orthonormal columns, see `principal_basis`; None: all dimensions are kept."""

    @property
    def raw_dim(self) -> int:
        """Dimension of the encoder's vectors, or of those that come with the items."""
        return len(self.mean)

    @property
    def dim(self) -> int:
        """Dimension of the space."""
        return self.raw_dim if self.basis is None else self.basis.shape[1]

    @classmethod
    def fit(cls, encoder: str, raw: npt.ArrayLike, identity: str | None = None, dim: int | None = None) -> Space:
        """Centre on the mean of ``raw`` (n, raw_dim). Rows that are all the same (or a single one) leave nothing to
        centre on: the mean is then zero. ``identity``: the encoder's. ``dim``: keep this many dimensions, those that
        `principal_basis` finds; None or ``raw_dim``: all. Raises ValueError on a wrong shape, no rows, values not
        finite, or a ``dim`` that ``raw`` is too small for.
        """
        rows = _checked(raw, dim=None)
        if not len(rows):
            raise ValueError("raw: no rows to fit the space on")
        mean = np.zeros(rows.shape[1], np.float32)
        if (rows != rows[0]).any():
            mean[:] = rows.mean(axis=0, dtype=np.float64)
        basis = None
        if dim is not None and dim != rows.shape[1]:
            if not 1 <= dim < min(rows.shape):
                raise ValueError(
                    f"dim: {dim}, expected at most {rows.shape[1]} (the vectors') and below {len(rows)} (items)"
                )
            centred = rows.astype(np.float64) - mean
            length = np.linalg.norm(centred, axis=1, keepdims=True)
            basis = principal_basis(centred / np.maximum(length, np.finfo(np.float64).tiny), dim)
        identity = None if identity == encoder else identity
        return cls(encoder, mean, _version(identity or encoder, mean, basis), identity, basis)

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
        """Unit float32 vectors (n, dim) of raw ones (n, raw_dim); a row's result does not depend on the others.

        Raises ValueError naming the row (by its id where there are ``item_ids``) that equals the mean, or differs from
        it in no dimension that is kept, for it has no direction; also on a wrong shape or values not finite.
        """
        rows = _checked(raw, self.raw_dim)
        centred = rows.astype(np.float64) - self.mean
        if self.basis is not None:
            # A product for each row: in one for all, BLAS takes other kernels for other row counts.
            centred = (centred[:, None] @ self.basis.astype(np.float64))[:, 0]
        length = np.sqrt(np.square(centred).sum(axis=1))
        scale = np.sqrt(np.square(rows, dtype=np.float64).sum(axis=1)) + np.linalg.norm(self.mean.astype(np.float64))
        none = np.flatnonzero(length <= _NOISE * scale)
        if len(none):
            row = f"raw[{none[0]}]" if item_ids is None else f"item {item_ids[none[0]]!r}: its raw vector"
            kept = "" if self.basis is None else f" in the {self.dim} dimensions that are kept"
            raise ValueError(f"{row} equals the mean of the catalogue{kept}, so it has no direction")
        unit: npt.NDArray[np.float32] = (centred / length[:, None]).astype(np.float32)
        return unit

    def save(self, directory: Path) -> None:
        """Write ``space.json`` and ``space.safetensors`` into ``directory``, which is made if need be."""
        directory.mkdir(parents=True, exist_ok=True)
        save_file({"mean": self.mean} | ({} if self.basis is None else {"basis": self.basis}), directory / _WEIGHTS)
        manifest = {"encoder": self.encoder, "dim": self.dim, "version": self.version}
        if self.identity is not None:
            manifest["identity"] = self.identity
        (directory / _MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")

    @classmethod
    def load(cls, directory: Path) -> Space:
        """What ``save`` wrote. Raises FileNotFoundError, or ValueError when the version does not fit the weights."""
        manifest = json.loads((directory / _MANIFEST).read_text())
        try:
            weights = load_file(directory / _WEIGHTS)
            mean, basis = weights["mean"], weights.get("basis")
        except (KeyError, SafetensorError) as error:
            raise ValueError(f"{directory / _WEIGHTS}: {error}") from error
        identity = manifest.get("identity")  # not there where it is the name, and in what older releases wrote
        found = cls(manifest["encoder"], mean, _version(identity or manifest["encoder"], mean, basis), identity, basis)
        if (found.version, found.dim) != (manifest["version"], manifest["dim"]):
            raise ValueError(
                f"{directory / _MANIFEST}: version {manifest['version']}, dim {manifest['dim']}; "
                f"the weights beside it are version {found.version}, dim {found.dim}"
            )
        return found


def principal_basis(unit: npt.NDArray[np.float64], dim: int) -> npt.NDArray[np.float32]:
    """(d, dim) orthonormal: the directions that keep most of the squared cosines of ``unit`` (n, d), centred unit rows.

    They are the first eigenvectors of ``unit' unit`` (Eckart and Young 1936: no other ``dim`` directions leave the
    inner products of the rows closer to what they were).
    """
    _, vectors = np.linalg.eigh(unit.T @ unit)
    return np.ascontiguousarray(vectors[:, ::-1][:, :dim], dtype=np.float32)


def _version(encoder: str, mean: npt.NDArray[np.float32], basis: npt.NDArray[np.float32] | None) -> str:
    content = encoder.encode() + b"\0" + mean.astype("<f4").tobytes()
    if basis is not None:
        content += b"\0" + basis.astype("<f4").tobytes()
    return hashlib.sha256(content).hexdigest()[:12]


def _checked(raw: npt.ArrayLike, dim: int | None) -> npt.NDArray[np.float32]:
    rows = np.asarray(raw, np.float32)
    if rows.ndim != 2 or (dim is not None and rows.shape[1] != dim) or rows.shape[1] == 0:
        raise ValueError(f"raw: shape {rows.shape}, expected (n, {'dim' if dim is None else dim})")
    finite = np.isfinite(rows).all(axis=1)
    if not finite.all():
        raise ValueError(f"raw[{int(np.flatnonzero(~finite)[0])}]: has a value that is not finite")
    return rows
