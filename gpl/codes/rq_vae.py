"""Semantic ids by a residual-quantised variational auto-encoder (RQ-VAE).

Lee et al., "Autoregressive Image Generation using Residual Quantization", CVPR 2022; for item ids Rajput et al.,
"Recommender Systems with Generative Retrieval" (TIGER), NeurIPS 2023. Trained in `gpl.codes.vae_training`; what is
here is the frozen result, in numpy: an encoder network, residual codebooks in its latent space, a decoder network.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

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
from gpl.codes.rq_kmeans import nearest_codes

Layer = tuple[Floats, Floats]
"""Weight (out, in) and bias (out,) of a linear layer."""


@dataclass(frozen=True)
class VAEConfig:
    """Size and training. The defaults take about 20 s on two cores for catalogues of a few thousand items."""

    hidden: tuple[int, ...] = (256, 128)
    """Widths of the encoder's hidden layers; the decoder mirrors them."""
    latent: int = 32
    steps: int = 3000
    batch_size: int = 256
    learning_rate: float = 1e-3
    commitment: float = 0.25
    """Weight of the commitment loss, beta in van den Oord et al. 2017."""
    decay: float = 0.98
    """Of the moving averages that codebooks follow."""

    def __post_init__(self) -> None:
        for name in ("latent", "steps", "batch_size", "learning_rate"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: {getattr(self, name)}, must be positive")
        if any(width < 1 for width in self.hidden):
            raise ValueError(f"hidden: {self.hidden}, every width must be at least 1")
        if not self.commitment >= 0:
            raise ValueError(f"commitment: {self.commitment}, must not be negative")
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay: {self.decay}, must be in [0, 1)")


@dataclass(frozen=True, eq=False)
class ResidualVAE:
    """Frozen once fitted: new items are encoded without refitting."""

    encoder: Sequence[Layer]
    decoder: Sequence[Layer]
    codebooks: Floats
    """(levels, codebook_size, latent); rows that a level does not use are zero."""
    used: tuple[int, ...]
    """Codes in use at each level: those that some item it was fitted on has."""
    version: str
    """Hash of all weights: SIDs compare only within one version."""

    kind: ClassVar[str] = "rq-vae"

    @classmethod
    def of(
        cls, encoder: Sequence[Layer], decoder: Sequence[Layer], codebooks: Floats, used: tuple[int, ...]
    ) -> ResidualVAE:
        """From its weights."""
        return cls(encoder, decoder, codebooks, used, digest(used, **_tensors(encoder, decoder, codebooks)))

    @property
    def levels(self) -> int:
        return int(self.codebooks.shape[0])

    @property
    def codebook_size(self) -> int:
        return int(self.codebooks.shape[1])

    @property
    def dim(self) -> int:
        return int(self.encoder[0][0].shape[1])

    @classmethod
    def fit(
        cls, vectors: npt.ArrayLike, levels: int, codebook_size: int, seed: int, config: VAEConfig | None = None
    ) -> ResidualVAE:
        """Fit on vectors (n, dim), n >= 1. Duplicates and n < codebook_size are fine: a level then uses fewer codes.

        The same arguments give the same weights on one machine with one thread count.
        Raises ValueError on a wrong shape, no rows, values not finite, or levels or codebook_size below 1.
        """
        # torch is needed to train only.
        from gpl.codes.vae_training import train

        return train(checked_fit(vectors, levels, codebook_size), levels, codebook_size, seed, config or VAEConfig())

    def encode(self, vectors: npt.ArrayLike) -> Ints:
        """Codes (n, levels) of vectors (n, dim). Raises ValueError on a wrong shape or values not finite."""
        rows = checked(vectors, self.dim)
        return nearest_codes(_forward(rows, self.encoder).astype(np.float32), self.codebooks, self.used)

    def decode(self, codes: npt.NDArray[np.integer]) -> Floats:
        """Vectors (n, dim) that codes (n, levels) stand for: the decoder's, of the sum of the levels' codes.

        Raises ValueError on a wrong shape or a code out of range.
        """
        return _forward(sum_of_codes(self.codebooks, self.used, codes), self.decoder).astype(np.float32)

    def report(self, vectors: Floats) -> Report:
        """Measure on vectors (n, dim), n >= 1: those fitted on, or others."""
        return report(self, vectors)

    def save(self, directory: Path) -> None:
        """Write ``quantiser.json`` and ``quantiser.safetensors`` into ``directory``, which is made if need be."""
        directory.mkdir(parents=True, exist_ok=True)
        save_file(_tensors(self.encoder, self.decoder, self.codebooks), directory / WEIGHTS)
        manifest = {"kind": self.kind, "used": list(self.used), "version": self.version}
        (directory / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")

    @classmethod
    def load(cls, directory: Path) -> ResidualVAE:
        """What ``save`` wrote. Raises FileNotFoundError, or ValueError when the version does not fit the weights."""
        path = directory / MANIFEST
        manifest = json.loads(path.read_text())
        try:
            weights = load_file(directory / WEIGHTS)
            networks = [_layers(weights, name) for name in ("encoder", "decoder")]
            loaded = cls.of(networks[0], networks[1], weights["codebooks"], tuple(manifest["used"]))
        except (KeyError, TypeError, SafetensorError) as error:
            raise ValueError(f"{path}: does not fit the weights beside it: {error!r}") from error
        if loaded.version != manifest.get("version"):
            raise ValueError(f"{path}: version {manifest.get('version')}, the weights beside it are {loaded.version}")
        return loaded


def _forward(rows: Floats, layers: Sequence[Layer]) -> npt.NDArray[np.float64]:
    """SiLU between linear layers. In float64, so that a row's result hardly depends on what else is in the call."""
    x = rows.astype(np.float64)
    for at, (weight, bias) in enumerate(layers):
        if at:
            x = x * (0.5 + 0.5 * np.tanh(0.5 * x))  # x * sigmoid(x), without overflow
        x = x @ weight.T.astype(np.float64) + bias
    return x


def _tensors(encoder: Sequence[Layer], decoder: Sequence[Layer], codebooks: Floats) -> dict[str, Floats]:
    tensors = {"codebooks": codebooks}
    for name, layers in (("encoder", encoder), ("decoder", decoder)):
        for at, (weight, bias) in enumerate(layers):
            tensors[f"{name}.{at}.weight"], tensors[f"{name}.{at}.bias"] = weight, bias
    return tensors


def _layers(weights: dict[str, Floats], name: str) -> list[Layer]:
    count = sum(key.startswith(f"{name}.") and key.endswith(".weight") for key in weights)
    return [(weights[f"{name}.{at}.weight"], weights[f"{name}.{at}.bias"]) for at in range(count)]
