"""The ranker that distillation and self-training learn from: heavier than a pre-ranker, trained on exposures alone."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpl.evaluation.dataset import Floats
from gpl.evaluation.pairs import Pairs
from gpl.evaluation.world import World

_EPOCHS = 4
_BATCH = 4096
_DIM = 32


class Ranker(nn.Module):
    """An MLP over user and item embeddings, their product, content, and the cached anchor score. (ours)"""

    def __init__(self, n_users: int, n_items: int, content: Floats) -> None:
        super().__init__()
        self.user = nn.Embedding(n_users, _DIM)
        self.item = nn.Embedding(n_items, _DIM)
        nn.init.normal_(self.user.weight, std=0.05)
        nn.init.normal_(self.item.weight, std=0.05)
        self.register_buffer("content", torch.from_numpy(content))
        self.content: Tensor
        self.project = nn.Linear(content.shape[1], _DIM, bias=False)
        self.mlp = nn.Sequential(nn.Linear(4 * _DIM + 2, 64), nn.ReLU(), nn.Linear(64, 1))

    def forward(self, user: Tensor, item: Tensor, score: Tensor) -> Tensor:
        """Logits (p,) of pairs; ``score`` (p,) standardised, NaN where there is none."""
        u, v, c = self.user(user), self.item(item), self.project(self.content[item])
        missing = score.isnan()
        cross = torch.stack([score.masked_fill(missing, 0.0), missing.float()], dim=1)
        logits: Tensor = self.mlp(torch.cat([u, v, c, u * (v + c), cross], dim=1))[:, 0]
        return logits


def teach(world: World, pairs: Pairs, score: Floats, seed: int) -> Floats:
    """Train on the exposed pairs and answer the click probability (P,) of every pair. ``score`` (P,): anchor scores."""
    torch.manual_seed(seed)
    known = score[~np.isnan(score)]
    spread = float(known.std()) if len(known) else 1.0
    z = torch.from_numpy((score - (known.mean() if len(known) else 0.0)) / max(spread, 1e-6)).float()
    user = torch.from_numpy(pairs.user[pairs.request])
    item = torch.from_numpy(pairs.item)
    clicked = torch.from_numpy(pairs.clicked)
    model = Ranker(world.n_users, world.n_items, world.vectors)
    optimiser = torch.optim.Adam(model.parameters(), lr=2e-3, weight_decay=1e-6)
    exposed = np.flatnonzero(pairs.exposed)
    rng = np.random.default_rng(seed)
    for _ in range(_EPOCHS):
        for at in np.array_split(rng.permutation(exposed), max(1, len(exposed) // _BATCH)):
            rows = torch.from_numpy(at)
            loss = F.binary_cross_entropy_with_logits(model(user[rows], item[rows], z[rows]), clicked[rows])
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
    with torch.no_grad():
        chunks = [
            torch.sigmoid(model(user[s : s + 65536], item[s : s + 65536], z[s : s + 65536]))
            for s in range(0, len(item), 65536)
        ]
    return torch.cat(chunks).numpy() if chunks else np.zeros(0, dtype=np.float32)
