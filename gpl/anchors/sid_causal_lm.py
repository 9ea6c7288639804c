"""A pre-trained causal LM that reads and spells semantic ids: its network, in training and in decoding.

SID tokens are added to the vocabulary (one embedding a level and code) and the text head is left off: logits are over
the codes of one level only. An item of the history is *one* position, the sum of its code embeddings, so that a
history is read in a third of the positions (at 3 levels); the item asked for is spelled code by code, each code a
position of its own. (ours)

Training scores every item of a window at once. Behind the history stand the spelling positions of all its items, each
seeing the history up to its item and the codes before it:

    start  i_0  i_1  |  c_0^0  c_0^1  |  c_1^0  c_1^1  |  c_2^0  c_2^1        three items, three levels

Decoding reads the history once into a key-value cache. All beams of a user are positions of that user's one row, told
apart by the attention mask (a tree, as in SpecInfer, Miao et al. 2024), so the cache is neither repeated for each beam
nor reordered between the levels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpl.anchors.sampling import IntArray
from gpl.anchors.training import PADDING, padded


class SidCausalLM(nn.Module):
    """``backbone``: a transformers decoder of hidden size h. Codes are tied: the same embeddings in and out."""

    def __init__(self, backbone: Any, levels: int, codebook_size: int, codes: Tensor | None = None) -> None:
        """``codes``: initial embeddings (levels, codebook_size, h); None: random, of the scale of the LM's own."""
        super().__init__()
        self.backbone = backbone
        self.levels, self.codebook_size = levels, codebook_size
        words = backbone.get_input_embeddings().weight.detach().float()
        if codes is None:
            codes = torch.randn(levels, codebook_size, words.shape[1]) * words.std() / levels**0.5
        self.codes = nn.Parameter(codes.float().clone())
        self.bias = nn.Parameter(torch.zeros(levels, codebook_size))
        self.start = nn.Parameter(words.mean(dim=0).clone())  # stands before the first item
        self.spelling = nn.Parameter(torch.zeros(levels, words.shape[1]))  # tells codes apart from items

    def added(self) -> dict[str, Tensor]:
        """All that is not the backbone's, by name."""
        return {name: p for name, p in self.named_parameters() if not name.startswith("backbone.")}

    @property
    def device(self) -> torch.device:
        return self.codes.device

    def embed(self, codes: Tensor, level: int) -> Tensor:
        """Embeddings (..., h) of codes (...,) of one level."""
        return F.embedding(codes, self.codes[level])

    def items(self, codes: Tensor) -> Tensor:
        """One embedding (..., h) an item: the sum over the levels of codes (..., levels)."""
        return torch.stack([self.embed(codes[..., level], level) for level in range(self.levels)]).sum(dim=0)

    def scores(self, hidden: Tensor, level: int) -> Tensor:
        """Scores (..., codebook_size) of the codes of ``level`` after hidden states (..., h)."""
        return F.linear(hidden.float(), self.codes[level], self.bias[level])

    def negative_log_likelihood(self, cut: Sequence[IntArray]) -> Tensor:
        """Sum over all codes of windows of SIDs, in nats."""
        targets = padded(cut, self.levels).to(self.device)
        codes = targets.clamp(min=0)
        batch, n, levels = codes.shape
        start = self.start.expand(batch, 1, -1)
        history = torch.cat((start, self.items(codes[:, :-1])), dim=1)
        spelled = [self.embed(codes[..., level], level) + self.spelling[level] for level in range(levels - 1)]
        depth = torch.stack(spelled, dim=2).flatten(1, 2) if spelled else history[:, :0]
        hidden = self._run(torch.cat((history, depth), dim=1), *_training_layout(n, levels, self.device), None)
        contexts = hidden[:, :n].unsqueeze(2)
        states = torch.cat((contexts, hidden[:, n:].reshape(batch, n, levels - 1, hidden.shape[-1])), dim=2)
        loss = hidden.new_zeros((), dtype=torch.float32)
        for level in range(levels):
            scores = self.scores(states[:, :, level], level)
            loss = loss + F.cross_entropy(
                scores.flatten(0, 1), targets[..., level].flatten(), ignore_index=PADDING, reduction="sum"
            )
        return loss

    def read(self, histories: Sequence[IntArray]) -> Reading:
        """Read users' histories (n, levels) once; the answer scores what may follow."""
        lengths = torch.tensor([len(history) for history in histories], device=self.device)
        longest = max(1, int(lengths.max()))
        rows = np.zeros((len(histories), longest, self.levels), np.int64)
        for row, history in zip(rows, histories, strict=True):
            row[: len(history)] = history
        items = self.items(torch.from_numpy(rows).to(self.device))
        x = torch.cat((self.start.expand(len(rows), 1, -1), items), dim=1)
        from transformers import DynamicCache

        cache = DynamicCache()
        places = torch.arange(longest + 1, device=self.device)
        causal = (places.unsqueeze(0) <= places.unsqueeze(1)).expand(len(rows), 1, -1, -1)
        hidden = self._run(x, places.expand(len(rows), -1), causal, cache)
        last = hidden[torch.arange(len(rows), device=self.device), lengths]
        return Reading(self, cache, lengths, longest + 1, last)

    def _run(self, x: Tensor, positions: Tensor, sees: Tensor, cache: Any) -> Tensor:
        """Hidden states (batch, n, h) of inputs (batch, n, h); ``sees``: bool (batch or 1, 1, n, all positions)."""
        dtype = self.backbone.get_input_embeddings().weight.dtype
        mask = torch.zeros(sees.shape, dtype=dtype, device=sees.device).masked_fill(~sees, torch.finfo(dtype).min)
        answer = self.backbone(
            inputs_embeds=x.to(dtype),
            attention_mask=mask,
            position_ids=positions.expand(len(x), -1),
            past_key_values=cache,
            use_cache=cache is not None,
        )
        hidden: Tensor = answer.last_hidden_state
        return hidden


class Reading:
    """Histories of a batch of users, read; a `Scorer` for `beam_search` that goes down the levels once."""

    def __init__(self, network: SidCausalLM, cache: Any, lengths: Tensor, width: int, last: Tensor) -> None:
        self._network, self._cache, self._lengths, self._last = network, cache, lengths, last
        places = torch.arange(width, device=lengths.device)
        self._history = (places <= lengths.unsqueeze(1)).unsqueeze(1)  # (batch, 1, width): real, not padding
        self._lineage = torch.zeros((len(lengths), 1, 0), dtype=torch.bool, device=lengths.device)
        """(batch, beams, spelling positions so far): which of them are a beam's own prefix."""

    def __call__(self, prefixes: Tensor, parents: Tensor) -> Tensor:
        """Scores (batch, beams, codebook_size) of the code after ``prefixes``; see `Scorer`."""
        network, level = self._network, prefixes.shape[-1]
        if level == 0:
            return network.scores(self._last, 0).unsqueeze(1)
        batch, beams = prefixes.shape[:2]
        inherited = self._lineage.gather(1, parents.unsqueeze(-1).expand(-1, -1, self._lineage.shape[-1]))
        itself = torch.eye(beams, dtype=torch.bool, device=prefixes.device).expand(batch, -1, -1)
        self._lineage = torch.cat((inherited, itself), dim=-1)
        sees = torch.cat((self._history.expand(-1, beams, -1), self._lineage), dim=-1).unsqueeze(1)
        x = network.embed(prefixes[..., -1], level - 1) + network.spelling[level - 1]
        positions = (self._lengths + level).unsqueeze(1).expand(-1, beams)
        return network.scores(network._run(x, positions, sees, self._cache), level)


def text_codes(words: Tensor, sids: IntArray, levels: int, codebook_size: int) -> Tensor:
    """Code embeddings (levels, codebook_size, h) whose sums come near what the items' texts are to the LM.

    ``words`` (n, h): each item's mean token embedding; ``sids`` (n, levels). Level by level the mean of what the
    levels before left over; a code without items gets zero. (ours)
    """
    residual = words.float().clone()
    codes = torch.zeros(levels, codebook_size, words.shape[1])
    for level in range(levels):
        index = torch.from_numpy(sids[:, level].astype(np.int64))
        count = torch.bincount(index, minlength=codebook_size).clamp_min(1).unsqueeze(1)
        codes[level].index_add_(0, index, residual)
        codes[level] /= count
        residual -= codes[level][index]
    return codes


def _training_layout(n: int, levels: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Positions (1, n * levels) and what each sees (1, 1, n * levels, n * levels), see the module's drawing."""
    item = torch.arange(n, device=device)
    deep = item.repeat_interleave(levels - 1)  # the item that a spelling position belongs to
    level = torch.arange(1, levels, device=device).repeat(n)
    owner, depth = torch.cat((item, deep)), torch.cat((torch.zeros_like(item), level))
    history = (depth == 0).unsqueeze(0) & (owner.unsqueeze(0) <= owner.unsqueeze(1))
    own = (owner.unsqueeze(0) == owner.unsqueeze(1)) & (depth.unsqueeze(0) <= depth.unsqueeze(1))
    return (owner + depth).unsqueeze(0), (history | own)[None, None]
