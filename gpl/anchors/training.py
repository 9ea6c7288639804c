"""Training of the SID transformer: next-item cross-entropy, early stopping on users it does not train on."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gpl.anchors.sampling import IntArray, batches, keep_probabilities, thin, windows
from gpl.anchors.transformer import SidTransformer

Progress = Callable[[int, int, float], None]
"""``progress(step, total, loss)`` after each optimiser step; loss in nats an item."""

_PADDING = -100  # the target that F.cross_entropy leaves out
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


def train(
    model: SidTransformer,
    sequences: Sequence[IntArray],
    validation: Sequence[IntArray],
    schedule: Schedule,
    seed: int,
    on_progress: Progress | None = None,
) -> list[float]:
    """Fit ``model`` in place, on its device; answers the validation loss (nats an item) after each epoch.

    ``sequences``, ``validation``: users' SIDs (n, levels), oldest first. Without validation all epochs are run and
    the answer is empty. Dropout draws from torch's global generator, which the caller seeds.
    """
    rng = np.random.default_rng(seed)
    keep = keep_probabilities(sequences, schedule.downsample_threshold)
    length = model.shape.history
    # Popular items are thinned anew each epoch; drawn ahead, so that the number of steps is known to the schedule.
    epochs = [
        batches(windows(thin(sequences, keep, rng), length, rng), schedule.batch_items, rng)
        for _ in range(schedule.epochs)
    ]
    held_out = batches(windows(validation, length), schedule.batch_items)
    total, step = sum(map(len, epochs)), 0
    optimiser = torch.optim.AdamW(
        model.parameters(), lr=schedule.learning_rate, betas=_BETAS, weight_decay=schedule.weight_decay
    )
    losses: list[float] = []
    best = model.state_dict()
    for epoch in epochs:
        model.train()
        for batch in epoch:
            for group in optimiser.param_groups:
                group["lr"] = schedule.learning_rate * _rate(step, total)
            loss = _negative_log_likelihood(model, batch) / sum(map(len, batch))
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(model.parameters(), _CLIP)
            optimiser.step()
            step += 1
            if on_progress is not None:
                on_progress(step, total, loss.item())
        if not held_out:
            continue
        losses.append(_evaluate(model, held_out))
        if losses[-1] == min(losses):
            best = copy.deepcopy(model.state_dict())
        elif len(losses) > losses.index(min(losses)) + schedule.patience:
            break
    model.load_state_dict(best)
    model.eval()
    return losses


def _negative_log_likelihood(model: SidTransformer, cut: Sequence[IntArray]) -> Tensor:
    """Sum over all items of the windows, in nats.

    Windows are padded on the right; attention is causal, so real items never see the padding.
    """
    padded = np.full((len(cut), max(map(len, cut)), model.shape.levels), _PADDING, dtype=np.int64)
    for row, window in zip(padded, cut, strict=True):
        row[: len(window)] = window
    targets = torch.from_numpy(padded).to(model.offsets.device)
    scores = model.all_codes(targets.clamp(min=0))
    return F.cross_entropy(scores.flatten(0, 2), targets.flatten(), ignore_index=_PADDING, reduction="sum")


@torch.no_grad()
def _evaluate(model: SidTransformer, held_out: Sequence[Sequence[IntArray]]) -> float:
    model.eval()
    total = sum(float(_negative_log_likelihood(model, batch)) for batch in held_out)
    return total / sum(len(window) for batch in held_out for window in batch)


def _rate(step: int, total: int) -> float:
    """Share of the peak learning rate: linear warm-up, then half a cosine down to 0."""
    rising = max(1, round(_WARMUP * total))
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, total - rising)))
