"""Semantic ids by residual k-means."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from gpl.codes import kmeans
from gpl.codes.quantiser import (
    MANIFEST,
    WEIGHTS,
    Floats,
    Ints,
    Report,
    checked,
    checked_fit,
    digest,
    report,
    sum_of_codes,
)

# Squared distances up to this share of the vectors' mean squared length are float32 rounding: the same value.
SAME = 1e-9


@dataclass(frozen=True, eq=False)
class ResidualKMeans:
    """Codebooks fitted level by level, each on what the levels before left over. (RQ-VAE in the paper; this is
    ours.) Frozen once fitted: new items are encoded without refitting.
    """

    codebooks: Floats
    """(levels, codebook_size, dim); rows that a level does not use are zero."""
    used: tuple[int, ...]
    """Codes in use at each level. Below codebook_size only where the data had fewer distinct values."""
    version: str
    """Hash of the codebooks: SIDs compare only within one version."""

    kind: ClassVar[str] = "rq-kmeans"

    @property
    def levels(self) -> int:
        return int(self.codebooks.shape[0])

    @property
    def codebook_size(self) -> int:
        return int(self.codebooks.shape[1])

    @property
    def dim(self) -> int:
        return int(self.codebooks.shape[2])

    @classmethod
    def fit(cls, vectors: npt.ArrayLike, levels: int, codebook_size: int, seed: int) -> ResidualKMeans:
        """Fit on vectors (n, dim), n >= 1. Duplicates and n < codebook_size are fine: a level then uses fewer codes.

        The same arguments give the same codebooks (on one machine: BLAS may round otherwise on another).
        Raises ValueError on a wrong shape, no rows, values not finite, or levels or codebook_size below 1.
        """
        rows = checked_fit(vectors, levels, codebook_size)
        codebooks, used = fit_codebooks(rows, levels, codebook_size, np.random.default_rng(seed))
        return cls(codebooks, used, digest(used, codebooks=codebooks))

    def encode(self, vectors: npt.ArrayLike) -> Ints:
        """Codes (n, levels) of vectors (n, dim). Raises ValueError on a wrong shape or values not finite."""
        return nearest_codes(checked(vectors, self.dim), self.codebooks, self.used)

    def decode(self, codes: npt.NDArray[np.integer]) -> Floats:
        """Vectors (n, dim) that codes (n, levels) stand for: the sum of the levels' centroids (not unit length).

        Raises ValueError on a wrong shape or a code out of range.
        """
        return sum_of_codes(self.codebooks, self.used, codes)

    def report(self, vectors: Floats) -> Report:
        """Measure on vectors (n, dim), n >= 1: those fitted on, or others."""
        return report(self, vectors)

    def save(self, directory: Path) -> None:
        """Write ``quantiser.json`` and ``quantiser.safetensors`` into ``directory``, which is made if need be."""
        directory.mkdir(parents=True, exist_ok=True)
        save_file({"codebooks": self.codebooks}, directory / WEIGHTS)
        manifest = {"kind": self.kind, "used": list(self.used), "version": self.version}
        (directory / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")

    @classmethod
    def load(cls, directory: Path) -> ResidualKMeans:
        """What ``save`` wrote. Raises FileNotFoundError, or ValueError when the version does not fit the weights."""
        path = directory / MANIFEST
        manifest = json.loads(path.read_text())
        try:
            codebooks, used = load_file(directory / WEIGHTS)["codebooks"], tuple(manifest["used"])
        except (KeyError, TypeError, SafetensorError) as error:
            raise ValueError(f"{path}: does not fit the weights beside it: {error!r}") from error
        version = digest(used, codebooks=codebooks)
        if version != manifest.get("version"):
            raise ValueError(f"{path}: version {manifest.get('version')}, the weights beside it are {version}")
        return cls(codebooks, used, version)


def fit_codebooks(
    rows: Floats, levels: int, codebook_size: int, rng: np.random.Generator
) -> tuple[Floats, tuple[int, ...]]:
    """Codebooks (levels, codebook_size, width) of rows (n, width), n >= 1, and the codes in use at each level."""
    residual = rows.copy()
    same = SAME * float(np.square(residual, dtype=np.float64).sum(axis=1).mean())
    codebooks = np.zeros((levels, codebook_size, residual.shape[1]), np.float32)
    used = []
    for level in range(levels):
        centroids = kmeans.fit(residual, codebook_size, rng, same)
        codebooks[level, : len(centroids)] = centroids
        used.append(len(centroids))
        codes, _ = kmeans.assign(residual, centroids)
        residual -= centroids[codes]
    return codebooks, tuple(used)


def nearest_codes(rows: Floats, codebooks: Floats, used: tuple[int, ...]) -> Ints:
    """Codes (n, levels): at each level the centroid nearest to what the levels before left of the row."""
    residual = rows.copy()
    codes = np.empty((len(residual), len(used)), np.int32)
    for level, count in enumerate(used):
        centroids = codebooks[level, :count]
        codes[:, level], _ = kmeans.assign(residual, centroids)
        residual -= centroids[codes[:, level]]
    return codes
