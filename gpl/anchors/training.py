"""Training of a generator's network: next-item cross-entropy, early stopping on users it does not train on."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gpl.anchors.checkpoint import TrainingState, fingerprint
from gpl.anchors.sampling import IntArray, batches, keep_probabilities, thin, windows

Progress = Callable[[int, int, float], None]
"""``progress(step, total, loss)`` after each optimiser step; loss in nats an item."""
Likelihood = Callable[[Sequence[IntArray]], Tensor]
"""Negative log-likelihood, in nats, summed over all items of windows of SIDs (n, levels)."""

PADDING = -100  # the target that F.cross_entropy leaves out
_WARMUP = 0.1  # share of the steps
_BETAS = (0.9, 0.98)
_CLIP = 1.0


@dataclass(frozen=True)
class Schedule:
    """How long and how hard to train."""

    epochs: int = 20
    patience: int = 2
    """Epochs without a better validation loss before training stops; the best epoch's weights are kept."""
    batch_items: int = 400
    """Items an optimiser step, padding included."""
    learning_rate: float = 5e-3
    weight_decay: float = 0.1
    downsample_threshold: float = 1e-3
    """t of the keep probability, see `keep_probabilities`; 1 keeps everything."""

    def __post_init__(self) -> None:
        for name in ("epochs", "patience", "batch_items", "learning_rate", "downsample_threshold"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: {getattr(self, name)}, must be positive")
        if not self.weight_decay >= 0:
            raise ValueError(f"weight_decay: {self.weight_decay}, must not be negative")


@dataclass(frozen=True)
class Resume:
    """Where training keeps its state, so that it can go on after an interruption."""

    path: Path
    """One safetensors file, replaced whole; removed by whoever keeps the result."""
    every: int = 100
    """Optimiser steps between two writes; each epoch's end is written too."""


def train(
    network: nn.Module,
    likelihood: Likelihood,
    history: int,
    sequences: Sequence[IntArray],
    validation: Sequence[IntArray],
    schedule: Schedule,
    seed: int,
    on_progress: Progress | None = None,
    resume: Resume | None = None,
    settings: dict[str, Any] | None = None,
) -> list[float]:
    """Fit those parameters of ``network`` that ask for gradients, in place, on their device.

    Answers the validation loss (nats an item) after each epoch. ``likelihood`` is the network's; ``history``: items
    that are read at most; a window is one longer, or what follows so many would not be learned. ``sequences``,
    ``validation``: users' SIDs (n, levels), oldest first. Without validation all epochs are run and the answer is
    empty. Dropout draws from torch's global generator, which the caller seeds.

    With ``resume`` an interrupted call is taken up where its state was written last, and ends with the very weights
    of one that was not interrupted. A state of other data, first weights, seed, schedule or ``settings`` is passed
    over; ``settings``: what else the network computes by, that its weights do not tell (dropout, say).

    Raises ValueError where the loss is no longer finite; what was written before stays.
    """
    rng = np.random.default_rng(seed)
    keep = keep_probabilities(sequences, schedule.downsample_threshold)
    # Popular items are thinned anew each epoch; drawn ahead, so that the number of steps is known to the schedule.
    epochs = [
        batches(windows(thin(sequences, keep, rng), history + 1, rng), schedule.batch_items, rng)
        for _ in range(schedule.epochs)
    ]
    held_out = batches(windows(validation, history + 1), schedule.batch_items)
    total = sum(map(len, epochs))
    parameters = {name: p for name, p in network.named_parameters() if p.requires_grad}
    optimiser = torch.optim.AdamW(
        parameters.values(), lr=schedule.learning_rate, betas=_BETAS, weight_decay=schedule.weight_decay
    )
    state = TrainingState(parameters, optimiser)
    identity = ""
    if resume is not None:
        everything = {"window": history + 1, "schedule": asdict(schedule), "seed": seed, "network": settings}
        identity = fingerprint(network, everything, sequences, validation)
        state.load(resume.path, identity)
    while state.epoch < schedule.epochs and not _stalled(state.losses, schedule.patience):
        network.train()
        epoch = epochs[state.epoch]
        while state.batch < len(epoch):
            batch = epoch[state.batch]
            for group in optimiser.param_groups:
                group["lr"] = schedule.learning_rate * _rate(state.step, total)
            loss = likelihood(batch) / sum(map(len, batch))
            _check_finite("loss", loss.item(), state.step + 1, schedule)
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            norm = torch.nn.utils.clip_grad_norm_(parameters.values(), _CLIP)
            _check_finite("gradient norm", norm.item(), state.step + 1, schedule)
            optimiser.step()
            state.batch, state.step = state.batch + 1, state.step + 1
            if on_progress is not None:
                on_progress(state.step, total, loss.item())
            if resume is not None and state.step % resume.every == 0 and state.batch < len(epoch):
                state.save(resume.path, identity)
        if held_out:
            validation_loss = _evaluate(network, likelihood, held_out)
            _check_finite("validation loss", validation_loss, state.step, schedule)
            state.end_epoch(validation_loss)
        else:
            state.end_epoch(None)
        if resume is not None:
            state.save(resume.path, identity)
    state.restore_best()
    network.eval()
    return state.losses


def _check_finite(name: str, value: float, step: int, schedule: Schedule) -> None:
    if not math.isfinite(value):
        raise ValueError(
            f"training diverged: {name} {value} at step {step}; lower learning_rate, it is {schedule.learning_rate:g}"
        )


def padded(cut: Sequence[IntArray], levels: int) -> Tensor:
    """Windows as one int64 tensor (windows, longest, levels), filled up on the right with `PADDING`."""
    rows = np.full((len(cut), max(map(len, cut)), levels), PADDING, dtype=np.int64)
    for row, window in zip(rows, cut, strict=True):
        row[: len(window)] = window
    return torch.from_numpy(rows)


@torch.no_grad()
def _evaluate(network: nn.Module, likelihood: Likelihood, held_out: Sequence[Sequence[IntArray]]) -> float:
    network.eval()
    total = sum(float(likelihood(batch)) for batch in held_out)
    return total / sum(len(window) for batch in held_out for window in batch)


def _stalled(losses: Sequence[float], patience: int) -> bool:
    return bool(losses) and len(losses) > losses.index(min(losses)) + patience


def _rate(step: int, total: int) -> float:
    """Share of the peak learning rate: linear warm-up, then half a cosine down to 0."""
    rising = max(1, round(_WARMUP * total))
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, total - rising)))
