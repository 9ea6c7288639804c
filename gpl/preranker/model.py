"""The pre-ranker: a user and an item tower, their inner product, and the cached anchors' score as a cross input.

    user(u)    = default + U[u] + sum_{h in H} P[h] / sqrt(|H|)
                                                       rows of U start at 0: a new user is the default user
    item(i)    = W e_i + V[i]                          rows of V start at 0: a new item scores from its content e_i
    tower(u,i) = <user(u), item(i)> + b[i] + b
    logit(u,i) = tower(u,i) + w_s z(s) + w_0 [no score]

``H`` is what the user had liked before the request, as far as the items have rows, and P a table of its own that
starts at 0 (FISM's form, Kabbur et al. 2013, beside a user's own row as in SVD++, Koren 2008). Through it a like tells
of other items, of a user that was never trained on too, where content does not tell.

``s`` is the raw anchor score and ``z`` its standard score over all pairs trained on so far, so that one learning rate
serves cosines and kernel scores alike. ``default`` starts at 0, W as a random projection (``<W a, W b>`` is about
``<a, b>``) and ``w_s`` at 1, so an untrained model ranks by the anchor score, which is hard to beat early; it measured
better than starting at 0 (Amazon Office, one pass, HR@10 .117 against .108, tail .084 against .071).
The structure is ours.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpl.arrays import check_shape
from gpl.labels.matching import Floats, Ints
from gpl.moments import Moments
from gpl.preranker.batch import Batch

_MIN_CAPACITY = 1024
_NO_HISTORY = np.zeros(0, np.int64)


@dataclass(frozen=True)
class Logits:
    """(P,) each. ``towers`` is ``full`` without the cross input: what the model says of a user without anchors."""

    full: Tensor
    towers: Tensor


ROWS_OF = {"users": "users", "items": "items", "history": "items", "item_bias": "items"}
"""Each id table, and the one of `users` and `items` whose ids its rows are."""


class PreRanker(nn.Module):
    """Weights in float32. Id tables have capacity to spare; rows at or beyond ``n_users``/``n_items`` are unused."""

    def __init__(self, dim_content: int, dim: int, seed: int) -> None:
        super().__init__()
        for name, value in (("dim_content", dim_content), ("dim", dim)):
            if value < 1:
                raise ValueError(f"{name}: {value}, expected at least 1")
        generator = torch.Generator().manual_seed(seed)
        self.dim_content, self.dim = dim_content, dim
        self.n_users = self.n_items = 1  # row 0: unknown
        self.default = nn.Parameter(torch.zeros(dim))
        self.content = nn.Parameter(torch.randn(dim, dim_content, generator=generator) / dim**0.5)
        self.bias = nn.Parameter(torch.zeros(()))
        self.w_score = nn.Parameter(torch.ones(()))
        self.w_missing = nn.Parameter(torch.zeros(()))
        self.users = nn.Parameter(torch.zeros(_MIN_CAPACITY, dim))
        self.items = nn.Parameter(torch.zeros(_MIN_CAPACITY, dim))
        self.history = nn.Parameter(torch.zeros(_MIN_CAPACITY, dim))
        self.item_bias = nn.Parameter(torch.zeros(_MIN_CAPACITY, 1))
        # `Moments` of the anchor scores trained on.
        self.register_buffer("score_moments", torch.zeros(3, dtype=torch.float64))
        self.score_moments: Tensor

    @classmethod
    def of_state(cls, state: Mapping[str, Tensor], dim_content: int) -> PreRanker:
        """The model whose :meth:`state_tensors` these are. Errors as of :meth:`load_state_tensors`."""
        check_shape("default", state, (None,))
        model = cls(dim_content, len(state["default"]), seed=0)
        model.load_state_tensors(state)
        return model

    def tables(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters whose rows are ids; their gradients are sparse."""
        for name in ROWS_OF:
            yield name, getattr(self, name)

    def rows(self, table: str) -> int:
        """How many rows of a table are in use, row 0 among them."""
        return self.n_users if ROWS_OF[table] == "users" else self.n_items

    def dense(self) -> Iterator[tuple[str, nn.Parameter]]:
        """All other parameters."""
        for name in ("default", "content", "bias", "w_score", "w_missing"):
            yield name, getattr(self, name)

    def grow(self, n_users: int, n_items: int) -> None:
        """Make rows 0..n-1 usable (pass ``len(table) + 1``); never shrinks. New rows are zero.

        Capacity doubles and the parameters stay the same objects, so an optimizer over them stays valid.
        """
        self.n_users, self.n_items = max(self.n_users, n_users), max(self.n_items, n_items)
        for name, table in self.tables():
            table.data = grown(table.data, self.rows(name))

    def forward(self, batch: Batch, content: Floats) -> Logits:
        """Logits of a batch's pairs. ``content`` (rows, dim_content) is what ``batch.content_row`` points into."""
        return self._combine(self._towers(batch, content), torch.from_numpy(batch.score))

    def observe(self, score: Floats) -> None:
        """Take anchor scores (NaN is skipped) into the standardisation. Once a batch, before its forward pass."""
        self.score_moments.copy_(torch.tensor(self._moments().including(score), dtype=torch.float64))

    @torch.no_grad()
    def score(
        self,
        user_row: int,
        item_row: Ints,
        content: Floats,
        anchor_score: Floats | None,
        history: Ints = _NO_HISTORY,
    ) -> Floats:
        """Logits (n,) of one user's candidates. ``content`` (n, dim_content), zeros where an item has none.
        ``history`` (h,): rows of what the user liked; those of unknown items are to be left out.

        Row 0 is an unknown id. ``anchor_score`` (n,) raw, NaN or None where the user has no anchors.
        Raises ValueError for shapes that do not fit and IndexError for rows beyond the tables.
        """
        return self.combine(self.item_side(item_row, content) @ self.user_side(user_row, history), anchor_score)

    @torch.no_grad()
    def item_side(self, item_row: Ints, content: Floats) -> Floats:
        """What of a logit depends on the item alone, (n, w): made once a model, its product with a ``user_side`` is
        what the towers say. Arguments and errors as of :meth:`score`."""
        n = len(item_row)
        if content.shape != (n, self.dim_content):
            raise ValueError(f"content: shape {content.shape}, expected ({n}, {self.dim_content})")
        self._check_rows("item_row", item_row, self.n_items)
        rows = torch.from_numpy(np.ascontiguousarray(item_row, dtype=np.int64))
        vectors = torch.from_numpy(np.asarray(content, dtype=np.float32) @ self.content.detach().numpy().T)
        vectors += self.items.index_select(0, rows)
        side: Floats = torch.cat([vectors, self.item_bias.index_select(0, rows)], dim=1).numpy()
        return side

    @torch.no_grad()
    def user_side(self, user_row: int, history: Ints = _NO_HISTORY) -> Floats:
        """The user's counterpart (w,) of :meth:`item_side`. Row 0: the default user; ``history`` as in ``score``."""
        self._check_rows("user_row", np.array([user_row]), self.n_users)
        self._check_rows("history", history, self.n_items)
        # By numpy: for one user it is the same to the last bit as torch's embedding bag, at a fifth of the time.
        default, users, table = (
            self.default.numpy(force=True),
            self.users.numpy(force=True),
            self.history.numpy(force=True),
        )
        liked = table[history].sum(axis=0) / np.float32(max(len(history), 1) ** 0.5)
        return np.append(default + users[user_row] + liked, np.float32(1.0))

    @torch.no_grad()
    def combine(self, towers: Floats, anchor_score: Floats | None) -> Floats:
        """Logits (n,) from the products (n,) of the two sides and the raw anchor scores, as in :meth:`score`."""
        if anchor_score is not None and anchor_score.shape != towers.shape:
            raise ValueError(f"anchor_score: shape {anchor_score.shape}, expected {towers.shape}")
        bias, w_score, w_missing = (p.numpy(force=True) for p in (self.bias, self.w_score, self.w_missing))
        # As _combine, and by numpy for the reason that user_side has.
        towers = towers + bias
        if anchor_score is None:
            return np.asarray(towers + w_missing)
        moments = self._moments()
        z = (anchor_score - np.float32(moments.mean)) / np.float32(moments.spread)
        missing = np.isnan(anchor_score)
        logits: Floats = towers + w_score * np.where(missing, np.float32(0.0), z) + w_missing * missing
        return logits

    def state_tensors(self) -> dict[str, Tensor]:
        """Everything that defines the model, exactly; id tables cut to the rows in use. For safetensors."""
        state = {name: p.detach().clone() for name, p in self.dense()}
        for name, table in self.tables():
            state[name] = table.detach()[: self.rows(name)].clone()
        state["score_moments"] = self.score_moments.clone()
        return state

    def load_state_tensors(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of :meth:`state_tensors`. Raises ValueError naming a tensor that is missing or misshapen."""
        for name, table in self.tables():
            check_shape(name, state, (None, *table.shape[1:]))
        fixed = {**dict(self.dense()), "score_moments": self.score_moments}
        for name, parameter in fixed.items():
            check_shape(name, state, tuple(parameter.shape))
        for name, ids in ROWS_OF.items():
            if len(state[name]) != len(state[ids]):
                raise ValueError(f"{name}: {len(state[name])} rows, expected {len(state[ids])} as {ids}")
        self.n_users, self.n_items = len(state["users"]), len(state["items"])
        for name, table in self.tables():
            table.data = grown(state[name].to(table.dtype).clone(), _MIN_CAPACITY)
        with torch.no_grad():
            for name, parameter in fixed.items():
                parameter.copy_(state[name])

    def _towers(self, batch: Batch, content: Floats) -> Tensor:
        self._check_rows("user_row", batch.user_row, self.n_users)
        self._check_rows("item_row", batch.item_row, self.n_items)
        item_row = torch.from_numpy(batch.item_row)
        liked = self._liked(batch.history, batch.history_request, len(batch.user_row))
        user = self.default + _embed(torch.from_numpy(batch.user_row), self.users) + liked
        item = gather_content(content, batch.content_row) @ self.content.T + _embed(item_row, self.items)
        # All requests by all distinct items: one small product, and cheaper than gathering a vector per pair.
        every = (user @ item.T).view(-1)
        pair = torch.from_numpy(batch.request * len(batch.item_row) + batch.item)
        index = torch.from_numpy(batch.item)
        bias = _embed(item_row, self.item_bias)[:, 0]
        return every.index_select(0, pair) + bias.index_select(0, index) + self.bias

    def _liked(self, history: Ints, request: Ints, requests: int) -> Tensor:
        """(requests, dim) of histories one after another, (H,) rows with the (H,) request of each, ascending."""
        self._check_rows("history", history, self.n_items)
        sizes = np.bincount(request, minlength=requests)
        starts = torch.from_numpy(np.cumsum(sizes) - sizes)
        sums = F.embedding_bag(torch.from_numpy(history), self.history, starts, mode="sum", sparse=True, padding_idx=0)
        return sums / torch.from_numpy(np.sqrt(np.maximum(sizes, 1)).astype(np.float32))[:, None]

    @staticmethod
    def _check_rows(name: str, rows: Ints, used: int) -> None:
        if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < used:
            wrong = rows[(rows < 0) | (rows >= used)][0]
            raise IndexError(f"{name}: {wrong}, expected 0 to {used - 1}; grow() makes room for new ids")

    def _combine(self, towers: Tensor, score: Tensor) -> Logits:
        missing = score.isnan()
        moments = self._moments()
        z = ((score - moments.mean) / moments.spread).masked_fill(missing, 0.0)
        return Logits(towers + self.w_score * z + self.w_missing * missing, towers)

    def _moments(self) -> Moments:
        return Moments(*self.score_moments.tolist())


def gather_content(content: Floats, rows: Ints) -> Tensor:
    """Rows of ``content`` as a new tensor (I, d), zeros for -1. Raises IndexError for a row beyond it."""
    if len(rows) and int(rows.max()) >= len(content):
        raise IndexError(f"content_row: {rows.max()}, content has {len(content)} rows")
    # Straight into memory that torch aligned: the last bits of a product can depend on alignment.
    gathered = torch.empty(len(rows), content.shape[1])
    if len(content) == 0:
        return gathered.zero_()
    np.take(content, rows, axis=0, out=gathered.numpy(), mode="clip")
    absent = np.flatnonzero(rows < 0)
    if len(absent):
        gathered[torch.from_numpy(absent)] = 0.0
    return gathered


def grown(table: Tensor, rows: int) -> Tensor:
    """``table`` with at least ``rows`` rows, at double the capacity where it was too small; new rows are zero."""
    if len(table) >= rows:
        return table
    capacity = max(rows, 2 * len(table))
    larger = torch.zeros(capacity, *table.shape[1:], dtype=table.dtype)
    larger[: len(table)] = table
    return larger


def _embed(rows: Tensor, table: Tensor) -> Tensor:
    # padding_idx 0: the row of unknown ids gets no gradient and stays zero.
    return F.embedding(rows, table, padding_idx=0, sparse=True)
