"""Training of the SID transformer: next-token cross-entropy, early stopping on users it does not train on."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from gpl.anchors.sampling import batches, keep_probabilities, thin, windows
from gpl.anchors.transformer import Shape, SidTransformer

IntArray = NDArray[np.int32]
Progress = Callable[[int, int, float], None]
"""``progress(step, total, loss)`` after each optimiser step; loss in nats an item."""

PADDING = -100  # F.cross_entropy's ignore_index


@dataclass(frozen=True)
class Schedule:
    """How long and how hard to train. ``batch_items``: items an optimiser step, padding included."""

    epochs: int = 6
    batch_items: int = 800
    learning_rate: float = 3e-3
    weight_decay: float = 0.01
    warmup: float = 0.1
    patience: int = 2
    downsample_threshold: float = 1e-3


def token_batch(cut: Sequence[IntArray], shape: Shape) -> tuple[Tensor, Tensor, Tensor]:
    """Right-padded windows as tokens (b, n * levels), item positions (n * levels,), target codes (b, n, levels).

    ``tokens`` is BOS and every token but the last; each predicts the code at the same place of the
    targets. Padding needs no attention mask: it comes after everything real and attention
    is causal. Its targets are `PADDING`.
    """
    n = max(map(len, cut))
    codes = np.full((len(cut), n, shape.levels), PADDING, dtype=np.int64)
    for row, window in zip(codes, cut, strict=True):
        row[: len(window)] = window
    targets = torch.from_numpy(codes)
    offsets = torch.arange(shape.levels) * shape.codebook_size
    flat = (targets.clamp(min=0) + offsets).flatten(1)
    tokens = torch.cat((torch.full((len(cut), 1), shape.bos), flat[:, :-1]), dim=1)
    slots = (torch.arange(n * shape.levels) + shape.levels - 1) // shape.levels
    return tokens, slots, targets


def loss_of(model: SidTransformer, cut: Sequence[IntArray], device: torch.device) -> tuple[Tensor, int]:
    """Sum of the negative log-likelihood of all items in ``cut`` (nats, unconstrained by a trie), and their number."""
    shape = model.shape
    tokens, slots, targets = (t.to(device) for t in token_batch(cut, shape))
    hidden = model(tokens, slots).unflatten(1, (-1, shape.levels))
    loss = hidden.new_zeros(())
    for level in range(shape.levels):
        logits = model.logits(hidden[:, :, level], level)
        loss = loss + F.cross_entropy(
            logits.flatten(0, 1), targets[:, :, level].flatten(), ignore_index=PADDING, reduction="sum"
        )
    return loss, sum(map(len, cut))


@torch.no_grad()
def evaluate(model: SidTransformer, cut: Sequence[IntArray], batch_items: int, device: torch.device) -> float:
    """Mean negative log-likelihood an item, in nats. Raises ValueError without items."""
    if not cut:
        raise ValueError("validation: no items to evaluate on")
    model.eval()
    total, count = 0.0, 0
    for batch in batches(cut, batch_items):
        loss, items = loss_of(model, batch, device)
        total, count = total + float(loss), count + items
    return total / count


def rate(step: int, total: int, warmup: float) -> float:
    """Share of the peak learning rate: linear warm-up, then a half cosine down to 0."""
    rising = max(1, round(warmup * total))
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, total - rising)))


def train(
    model: SidTransformer,
    sequences: Sequence[IntArray],
    validation: Sequence[IntArray],
    schedule: Schedule,
    seed: int,
    device: torch.device,
    on_progress: Progress | None = None,
) -> list[float]:
    """Fit ``model`` in place and leave the weights of its best epoch in it; answers validation losses by epoch."""
    rng = np.random.default_rng(seed)
    keep = keep_probabilities(sequences, schedule.downsample_threshold)
    held = windows(validation, model.shape.history)
    model.to(device)
    optimiser = torch.optim.AdamW(
        model.parameters(), lr=schedule.learning_rate, weight_decay=schedule.weight_decay, betas=(0.9, 0.98)
    )
    # Thinning makes epochs differ a little in length: the schedule is laid out by the first one.
    plans = [
        list(batches(windows(thin(sequences, keep, rng), model.shape.history, rng), schedule.batch_items, rng))
        for _ in range(schedule.epochs)
    ]
    total, step = sum(map(len, plans)), 0
    history: list[float] = []
    best = copy.deepcopy(model.state_dict())
    for plan in plans:
        model.train()
        for batch in plan:
            for group in optimiser.param_groups:
                group["lr"] = schedule.learning_rate * rate(step, total, schedule.warmup)
            loss, items = loss_of(model, batch, device)
            optimiser.zero_grad()
            (loss / items).backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            step += 1
            if on_progress is not None:
                on_progress(step, total, float(loss) / items)
        history.append(evaluate(model, held, schedule.batch_items, device))
        if history[-1] <= min(history):
            best = copy.deepcopy(model.state_dict())
        elif len(history) - 1 - int(np.argmin(history)) >= schedule.patience:
            break
    model.load_state_dict(best)
    model.eval()
    return history
