"""Training of the RQ-VAE: an auto-encoder first, then with residual codebooks between its halves."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpl.codes.quantiser import Floats
from gpl.codes.rq_kmeans import fit_codebooks, nearest_codes
from gpl.codes.rq_vae import Layer, ResidualVAE, VAEConfig

_WARMUP = 0.3  # share of the steps without codebooks: k-means then starts from a latent space that has taken shape
_SETTLE = 0.8  # share of the steps after which codes are not restarted any more
_RESTART_EVERY = 50  # steps
_DEAD = 0.05  # a code used less than this share of an even use is restarted


def train(rows: Floats, levels: int, codebook_size: int, seed: int, config: VAEConfig) -> ResidualVAE:
    """Fit on rows (n, dim), n >= 1; see `ResidualVAE.fit`.

    Reconstruction loss through the straight-through estimator plus the commitment loss of each level; codebooks are
    moving averages of what they serve (van den Oord et al. 2017, appendix A.1), start from residual k-means, and
    codes that fell out of use restart at a random residual (Dhariwal et al. 2020).
    """
    rng = np.random.default_rng(seed)
    scale = math.sqrt(len(rows) / max(1e-12, float(np.square(rows, dtype=np.float64).sum()))) * math.sqrt(rows.shape[1])
    data = torch.from_numpy(rows * np.float32(scale))  # of unit mean square: the losses do not depend on the dimension
    # Initialisation draws from torch's global generator: it is borrowed, and given back as it was.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        widths = (rows.shape[1], *config.hidden, config.latent)
        encoder, decoder = _mlp(widths), _mlp(widths[::-1])
    parameters = [*encoder.parameters(), *decoder.parameters()]
    optimiser = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=1e-4)
    codebooks: _Codebooks | None = None
    for step in range(config.steps):
        if step == int(_WARMUP * config.steps):
            codebooks = _Codebooks(_latents(encoder, data), levels, codebook_size, config.decay, rng)
        for group in optimiser.param_groups:
            group["lr"] = config.learning_rate * 0.5 * (1 + math.cos(math.pi * step / config.steps))
        batch = data[torch.from_numpy(rng.integers(len(data), size=min(config.batch_size, len(data))))]
        latent = encoder(batch)
        if codebooks is None:
            loss = F.mse_loss(decoder(latent), batch)
        else:
            settled = step > _SETTLE * config.steps
            quantised, commitment = codebooks.quantise(latent, rng, restart=not settled and step % _RESTART_EVERY == 0)
            straight_through = latent + (quantised - latent).detach()
            loss = F.mse_loss(decoder(straight_through), batch) + config.commitment * commitment
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    if codebooks is None:  # a single step
        codebooks = _Codebooks(_latents(encoder, data), levels, codebook_size, config.decay, rng)
    centroids, used = codebooks.in_use(_latents(encoder, data), codebook_size)
    return ResidualVAE.of(
        _scaled_input(_layers(encoder), scale), _scaled_output(_layers(decoder), scale), centroids, used
    )


class _Codebooks:
    """Residual codebooks as exponential moving averages of the latents they serve."""

    def __init__(
        self, latents: Floats, levels: int, codebook_size: int, decay: float, rng: np.random.Generator
    ) -> None:
        centroids, self.used = fit_codebooks(latents, levels, codebook_size, rng)
        self.decay = decay
        self.centroids = [torch.from_numpy(centroids[level, :count].copy()) for level, count in enumerate(self.used)]
        codes = nearest_codes(latents, centroids, self.used)
        # As if the averages had long seen the k-means assignment, scaled to a share of the items.
        self.share = [
            torch.from_numpy(np.bincount(codes[:, level], minlength=count).astype(np.float32) / len(latents))
            for level, count in enumerate(self.used)
        ]
        self.sums = [c * s.unsqueeze(1) for c, s in zip(self.centroids, self.share, strict=True)]

    def quantise(self, latent: Tensor, rng: np.random.Generator, restart: bool) -> tuple[Tensor, Tensor]:
        """The nearest sum of codes (batch, latent), without gradient, and the commitment loss. Moves the codebooks."""
        residual, commitment = latent, latent.new_zeros(())
        total = torch.zeros_like(latent)
        for level, centroids in enumerate(self.centroids):
            with torch.no_grad():
                codes = torch.cdist(residual, centroids).argmin(dim=1)
                chosen = centroids[codes]
                self._follow(level, residual, codes)
                if restart:
                    self._restart(level, residual, rng)
            commitment = commitment + F.mse_loss(residual, chosen)
            residual = residual - chosen
            total = total + chosen
        return total, commitment / len(self.centroids)

    def _follow(self, level: int, residual: Tensor, codes: Tensor) -> None:
        """Averages one batch on. Centroids are replaced, not changed in place: the loss still reads the old ones."""
        count = len(self.centroids[level])
        hot = F.one_hot(codes, count).to(residual.dtype)
        keep = self.decay
        self.share[level] = keep * self.share[level] + (1 - keep) * hot.mean(dim=0)
        self.sums[level] = keep * self.sums[level] + (1 - keep) * (hot.T @ residual) / len(residual)
        # A code that is hardly used would divide rounding by rounding: it stays where it is until it is restarted.
        alive = self.share[level] > 1e-3 / count
        mean = self.sums[level] / self.share[level].clamp_min(1e-12).unsqueeze(1)
        self.centroids[level] = torch.where(alive.unsqueeze(1), mean, self.centroids[level])

    def _restart(self, level: int, residual: Tensor, rng: np.random.Generator) -> None:
        count = len(self.centroids[level])
        dead = torch.nonzero(self.share[level] < _DEAD / count).flatten()
        if not len(dead) or len(residual) < 2:
            return
        picked = residual[torch.from_numpy(rng.integers(len(residual), size=len(dead)))]
        self.centroids[level] = self.centroids[level].index_copy(0, dead, picked)
        fresh = torch.full((len(dead),), 1.0 / count)
        self.share[level] = self.share[level].index_copy(0, dead, fresh)
        self.sums[level] = self.sums[level].index_copy(0, dead, picked / count)

    def in_use(self, latents: Floats, codebook_size: int) -> tuple[Floats, tuple[int, ...]]:
        """Codebooks with the codes that occur numbered from 0, padded with zeros, and how many there are a level."""
        kept = [centroids.numpy() for centroids in self.centroids]
        padded = np.zeros((len(kept), codebook_size, latents.shape[1]), np.float32)
        for level, centroids in enumerate(kept):
            padded[level, : len(centroids)] = centroids
        codes = nearest_codes(latents, padded, tuple(map(len, kept)))
        result, used = np.zeros_like(padded), []
        for level in range(len(kept)):
            occurring = np.unique(codes[:, level])
            result[level, : len(occurring)] = padded[level, occurring]
            used.append(len(occurring))
        return result, tuple(used)


def _mlp(widths: tuple[int, ...]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for at, (before, after) in enumerate(pairwise(widths)):
        layers += [nn.SiLU()] if at else []
        layers.append(nn.Linear(before, after))
    return nn.Sequential(*layers)


@torch.no_grad()
def _latents(encoder: nn.Sequential, data: Tensor) -> Floats:
    latents: Floats = encoder(data).numpy()
    return latents


def _layers(network: nn.Sequential) -> list[Layer]:
    return [
        (layer.weight.detach().numpy().copy(), layer.bias.detach().numpy().copy())
        for layer in network
        if isinstance(layer, nn.Linear)
    ]


def _scaled_input(layers: list[Layer], scale: float) -> list[Layer]:
    (weight, bias), *rest = layers
    return [(weight * np.float32(scale), bias), *rest]


def _scaled_output(layers: list[Layer], scale: float) -> list[Layer]:
    *rest, (weight, bias) = layers
    return [*rest, (weight / np.float32(scale), bias / np.float32(scale))]
