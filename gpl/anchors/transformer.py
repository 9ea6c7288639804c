"""A small causal transformer over semantic ids, with a key-value cache that beams share.

An item is ``levels`` tokens, one a level of its SID; a history is ``BOS`` followed by the tokens of its items.
The level that comes next is known from the position, so each softmax runs over one codebook only.

The cache is append-only and its keys form a tree: the history is the trunk, and each decoding step appends one
key a beam. Which of them a beam may attend to is a row of a mask, so the trunk is never copied per beam and
nothing is moved when beams are reordered.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Shape:
    """Everything that fixes the parameters. ``history``: items the positions reach back to."""

    levels: int
    codebook_size: int
    history: int
    dim: int
    layers: int
    heads: int
    dropout: float

    def __post_init__(self) -> None:
        for name in ("levels", "codebook_size", "history", "dim", "layers", "heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.dim % self.heads:
            raise ValueError(f"dim must be a multiple of heads, got dim {self.dim} and heads {self.heads}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")

    @property
    def bos(self) -> int:
        """Token that opens every sequence; the SID token of code c at level l is ``l * codebook_size + c``."""
        return self.levels * self.codebook_size


@dataclass
class Cache:
    """Keys and values of every token seen so far, one pair a layer, each (batch, heads, tokens, head dim)."""

    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        if layer == len(self.keys):
            self.keys.append(key)
            self.values.append(value)
        else:
            self.keys[layer] = torch.cat((self.keys[layer], key), dim=2)
            self.values[layer] = torch.cat((self.values[layer], value), dim=2)
        return self.keys[layer], self.values[layer]


class Block(nn.Module):
    """Pre-norm attention and feed-forward, without biases."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads = shape.heads
        self.dropout = shape.dropout
        self.attention_norm = nn.RMSNorm(shape.dim, eps=1e-6)
        self.qkv = nn.Linear(shape.dim, 3 * shape.dim, bias=False)
        self.out = nn.Linear(shape.dim, shape.dim, bias=False)
        self.feed_norm = nn.RMSNorm(shape.dim, eps=1e-6)
        self.up = nn.Linear(shape.dim, 4 * shape.dim, bias=False)
        self.down = nn.Linear(4 * shape.dim, shape.dim, bias=False)

    def forward(self, x: Tensor, layer: int, cache: Cache | None, mask: Tensor | None) -> Tensor:
        batch, length, dim = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(batch, length, 3, self.heads, dim // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        if cache is not None:
            key, value = cache.append(layer, key, value)
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=mask is None)
        attended = attended.transpose(1, 2).reshape(batch, length, dim)
        x = x + F.dropout(self.out(attended), self.dropout, self.training)
        fed = self.down(F.gelu(self.up(self.feed_norm(x)), approximate="tanh"))
        return x + F.dropout(fed, self.dropout, self.training)


class SidTransformer(nn.Module):
    """Next-token model of SID sequences; input and output embeddings are tied."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.tokens = nn.Embedding(shape.levels * shape.codebook_size + 1, shape.dim)
        # One position an item, not a token: the token itself says its level. 0: BOS; history + 1: what is generated.
        self.slots = nn.Embedding(shape.history + 2, shape.dim)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.dim, eps=1e-6)
        self.bias = nn.Parameter(torch.zeros(shape.levels, shape.codebook_size))
        for parameter in self.parameters():
            if parameter.ndim == 2 and parameter is not self.bias:
                nn.init.normal_(parameter, std=0.02)
        for block in self.blocks:
            assert isinstance(block, Block)
            for weight in (block.out.weight, block.down.weight):
                nn.init.normal_(weight, std=0.02 / (2 * shape.layers) ** 0.5)

    def forward(self, tokens: Tensor, slots: Tensor, cache: Cache | None = None, mask: Tensor | None = None) -> Tensor:
        """Hidden states (batch, n, dim) of ``tokens`` (batch, n) at item positions ``slots`` (n,).

        With a cache the tokens come after what it holds, and are added to it. ``mask``: (batch, 1, n, keys) bool,
        true where a token may attend; without one attention is causal, which is right only for an empty cache.
        """
        x = F.dropout(self.tokens(tokens) + self.slots(slots), self.shape.dropout, self.training)
        for layer, block in enumerate(self.blocks):
            x = block(x, layer, cache, mask)
        normed: Tensor = self.norm(x)
        return normed

    def logits(self, hidden: Tensor, level: int) -> Tensor:
        """Scores (..., codebook_size) of the codes at ``level``, from hidden states (..., dim) just before it."""
        size = self.shape.codebook_size
        return F.linear(hidden, self.tokens.weight[level * size : (level + 1) * size], self.bias[level])
