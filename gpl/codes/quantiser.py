"""Vectors -> semantic ids (SIDs): what every quantiser can do, how well one serves, and how large it should be."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Protocol, TypedDict

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int32]

MANIFEST = "quantiser.json"
WEIGHTS = "quantiser.safetensors"
_SMALLEST, _LARGEST = 8, 1024


class Quantiser(Protocol):
    """A fitted quantiser, frozen: new items are coded without refitting. ``kind`` names it in its JSON."""

    @property
    def kind(self) -> str: ...

    @property
    def version(self) -> str:
        """Hash of everything that codes depend on: SIDs compare only within one version."""
        ...

    @property
    def levels(self) -> int: ...

    @property
    def codebook_size(self) -> int: ...

    @property
    def dim(self) -> int: ...

    @property
    def used(self) -> tuple[int, ...]:
        """Codes at each level, numbered from 0; at most ``codebook_size``."""
        ...

    def encode(self, vectors: Floats) -> Ints:
        """Codes (n, levels) of vectors (n, dim). Raises ValueError on a wrong shape or values not finite."""
        ...

    def decode(self, codes: npt.NDArray[np.integer]) -> Floats:
        """Vectors (n, dim) that codes (n, levels) stand for, not unit length. Raises ValueError on a wrong shape or a
        code out of range.
        """
        ...

    def report(self, vectors: Floats) -> Report:
        """See `report`."""
        ...

    def save(self, directory: Path) -> None:
        """Write ``quantiser.json`` and ``quantiser.safetensors`` into ``directory``, which is made if need be."""
        ...


class Report(TypedDict):
    """How well a quantiser serves a set of n vectors; lists hold one value a level."""

    items: int
    used_codes: list[int]
    """Codes that occur."""
    perplexity: list[float]
    """exp(entropy) of the codes: as many equally used ones would be as diverse."""
    collision_rate: float
    """Share of items whose whole SID another item has too."""
    relative_error: float
    """Mean squared reconstruction error over the vectors' variance about their mean; 0 is lossless, 1 is no code."""


def report(quantiser: Quantiser, vectors: Floats) -> Report:
    """Measure ``quantiser`` on vectors (n, dim), n >= 1: those fitted on, or others."""
    vectors = checked(vectors, quantiser.dim)
    if not len(vectors):
        raise ValueError("vectors: no rows to report on")
    codes = quantiser.encode(vectors)
    counts = [np.unique(codes[:, level], return_counts=True)[1] for level in range(quantiser.levels)]
    _, sid_counts = np.unique(codes, axis=0, return_counts=True)
    error = float(np.square(vectors - quantiser.decode(codes), dtype=np.float64).sum(axis=1).mean())
    variance = float(np.square(vectors - vectors.mean(axis=0), dtype=np.float64).sum(axis=1).mean())
    return Report(
        items=len(vectors),
        used_codes=[len(count) for count in counts],
        perplexity=[_perplexity(count) for count in counts],
        collision_rate=float(sid_counts[sid_counts > 1].sum() / len(vectors)),
        relative_error=error / variance if variance > 0 else 0.0,
    )


def suggest_codebook_size(n_items: int) -> int:
    """Codebook size for a catalogue of ``n_items``, at 3 levels: the power of two at or above sqrt(n), 8 to 1024.

    Ours. About sqrt(n) codes put about sqrt(n) items under each first-level code, so the generator sees each often
    enough to learn it; two levels then have room for every item, and the third keeps apart what is close. Share of
    items that share their SID with another, at the suggested size: 3.9% of MovieLens-100K titles (1,682 items, 64;
    16.9% at 32, 2.5% at 128, 2.1% have the same text), 4.0% of MIND headlines (2,000, 64), 32% and 39% of two shop
    catalogues full of variants of one product (3,259 and 3,459, 64). Sharing among variants is harmless: their mean
    is the anchor. Where it is not, set a larger size.
    """
    if n_items < 1:
        raise ValueError(f"n_items: {n_items}, must be at least 1")
    root = 1 << max(0, (n_items - 1).bit_length() + 1) // 2
    return min(_LARGEST, max(_SMALLEST, root))


def suggest_levels(n_items: int, codebook_size: int) -> int:
    """Levels for a catalogue: room for every item, and one level more to keep apart what is close; 2 at least.

    Ours. That is 3 with the suggested codebook size up to a million items, and follows when the size is set by hand.
    """
    if codebook_size < 2:
        raise ValueError(f"codebook_size: {codebook_size}, must be at least 2")
    levels, room = 1, codebook_size
    while room < n_items:
        levels, room = levels + 1, room * codebook_size
    return levels + 1


def load_quantiser(directory: Path) -> Quantiser:
    """What a quantiser's ``save`` wrote; ``kind`` in its JSON says which one it is.

    Raises FileNotFoundError, or ValueError for an unknown kind, a damaged file, or a version that does not fit the
    weights.
    """
    # Imported here: implementations import this module.
    from gpl.codes.rq_kmeans import ResidualKMeans
    from gpl.codes.rq_vae import ResidualVAE

    path = directory / MANIFEST
    try:
        kind = json.loads(path.read_text())["kind"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a quantiser description: {error!r}") from error
    if kind == ResidualKMeans.kind:
        return ResidualKMeans.load(directory)
    if kind == ResidualVAE.kind:
        return ResidualVAE.load(directory)
    raise ValueError(f'{path}: kind {kind!r} is unknown; it must be "{ResidualKMeans.kind}" or "{ResidualVAE.kind}"')


def checked(vectors: npt.ArrayLike, dim: int | None) -> Floats:
    """``vectors`` as float32 (n, dim), any dim where it is None. Raises ValueError naming what is wrong."""
    rows = np.asarray(vectors, np.float32)
    if rows.ndim != 2 or rows.shape[1] == 0 or (dim is not None and rows.shape[1] != dim):
        raise ValueError(f"vectors: shape {rows.shape}, expected (n, {'dim' if dim is None else dim})")
    finite = np.isfinite(rows).all(axis=1)
    if not finite.all():
        raise ValueError(f"vectors[{int(np.flatnonzero(~finite)[0])}]: has a value that is not finite")
    return rows


def checked_fit(vectors: npt.ArrayLike, levels: int, codebook_size: int) -> Floats:
    """The arguments of a fit, checked as ``fit`` says."""
    if levels < 1:
        raise ValueError(f"levels: {levels}, must be at least 1")
    if codebook_size < 1:
        raise ValueError(f"codebook_size: {codebook_size}, must be at least 1")
    rows = checked(vectors, dim=None)
    if not len(rows):
        raise ValueError("vectors: no rows to fit codebooks on")
    return rows


def sum_of_codes(codebooks: Floats, used: tuple[int, ...], codes: npt.NDArray[np.integer]) -> Floats:
    """Sum (n, width) of the rows that codes (n, levels) name in codebooks (levels, codebook_size, width).

    Raises ValueError on a wrong shape or a code out of range.
    """
    codes = np.asarray(codes)
    if codes.ndim != 2 or codes.shape[1] != len(used):
        raise ValueError(f"codes: shape {codes.shape}, expected (n, {len(used)})")
    wrong = (codes < 0) | (codes >= np.asarray(used))
    if wrong.any():
        row, level = np.argwhere(wrong)[0]
        raise ValueError(f"codes[{row}][{level}]: {codes[row, level]}, the level has codes 0 to {used[level] - 1}")
    total = np.zeros((len(codes), codebooks.shape[2]), np.float32)
    for level in range(len(used)):
        total += codebooks[level, codes[:, level]]
    return total


def digest(used: tuple[int, ...], **tensors: npt.NDArray[np.float32]) -> str:
    """Hash that names a quantiser's weights."""
    content = hashlib.sha256(repr(used).encode())
    for name, tensor in sorted(tensors.items()):
        content.update(repr((name, tensor.shape)).encode() + tensor.astype("<f4").tobytes())
    return content.hexdigest()[:12]


def _perplexity(counts: npt.NDArray[np.int64]) -> float:
    share = counts / counts.sum()
    return float(np.exp(-(share * np.log(share)).sum()))
