"""The semantic ids that exist, as a prefix trie that a batched beam search walks."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch

from gpl.codes.centroids import SidCentroids


class SidTrie:
    """Prefix tree over SIDs. A beam keeps a node id a prefix, from ``root`` on, and asks ``step`` for what may follow.

    Children are kept as sorted edge lists (compressed sparse rows), so memory is a few integers a node whatever the
    codebook size; a dense table would take nodes x codebook_size. Immutable: build it anew when the
    catalogue's ``generation`` moved on.
    """

    root = 0

    def __init__(
        self, codes: npt.NDArray[np.integer], codebook_size: int, vectors: npt.NDArray[np.float32] | None = None
    ) -> None:
        """``codes``: (n, levels), n may be 0, duplicates are fine. ``vectors``: unit rows (n, dim) of the items that
        carry them, for who asks where a SID lies (`places`). Raises ValueError for a code out of
        [0, codebook_size), and for vectors that are not parallel.
        """
        codes = np.asarray(codes, np.int64)
        if codes.ndim != 2 or codes.shape[1] < 1:
            raise ValueError(f"codes: shape {codes.shape}, expected (n, levels)")
        wrong = (codes < 0) | (codes >= codebook_size)
        if wrong.any():
            row, level = np.argwhere(wrong)[0]
            raise ValueError(f"codes[{row}][{level}]: {codes[row, level]}, expected 0 to {codebook_size - 1}")
        if vectors is not None and (vectors.ndim != 2 or len(vectors) != len(codes)):
            raise ValueError(f"vectors: shape {vectors.shape}, expected ({len(codes)}, dim)")
        self.levels = codes.shape[1]
        self.codebook_size = codebook_size

        # Level by level, nodes are numbered in the order of their prefixes, so each node's children are consecutive:
        # the child at edge e is node e + 1, and edges are sorted by (parent, code).
        parents, edge_codes, edge_parents = np.zeros(len(codes), np.int64), [], []
        nodes = 1
        for level in range(self.levels):
            keys, inverse = np.unique(parents * codebook_size + codes[:, level], return_inverse=True)
            edge_parents.append(keys // codebook_size)
            edge_codes.append(keys % codebook_size)
            parents = nodes + inverse
            nodes += len(keys)
        self._size = len(edge_codes[-1])
        self._leaves_from = nodes - self._size
        self.nodes = nodes
        """Node ids are 0 to ``nodes`` - 1; children come after their parents."""
        self._places = None if vectors is None else _Places(codes, vectors, self._size)
        parent = np.concatenate(edge_parents)
        degree = np.bincount(parent, minlength=nodes)
        self._parent = torch.from_numpy(np.append(self.root, parent))  # the root is its own
        self._degree = torch.from_numpy(degree)
        self._first_edge = torch.from_numpy(np.cumsum(degree) - degree)
        self._edge_code = torch.from_numpy(np.concatenate(edge_codes))

    def __len__(self) -> int:
        """Number of different SIDs."""
        return self._size

    def to(self, device: torch.device | str) -> SidTrie:
        """This trie with its tables on ``device``."""
        moved = object.__new__(SidTrie)
        moved.__dict__.update(self.__dict__)
        for name in ("_parent", "_degree", "_first_edge", "_edge_code"):
            setattr(moved, name, getattr(self, name).to(device))
        return moved

    def step(self, nodes: torch.Tensor) -> torch.Tensor:
        """Node ids of the children by code: int64 (...,) -> int64 (..., codebook_size), -1 where no SID goes on so.

        ``step(nodes) >= 0`` is the mask of valid next codes. A node -1, and a whole SID, have no children. ``nodes``
        must be on the trie's device.
        """
        flat = nodes.reshape(-1)
        degree = torch.where(flat >= 0, self._degree[flat.clamp_min(0)], 0)
        children = flat.new_full((len(flat), self.codebook_size), -1)
        rows = torch.repeat_interleave(torch.arange(len(flat), device=flat.device), degree)
        # Position of each child among its parent's edges, then among all edges.
        within = torch.arange(len(rows), device=flat.device) - (degree.cumsum(0) - degree)[rows]
        edges = self._first_edge[flat[rows]] + within
        children[rows, self._edge_code[edges]] = edges + 1
        return children.reshape(*nodes.shape, self.codebook_size)

    def leaves(self, sids: npt.NDArray[np.integer]) -> torch.Tensor:
        """Node ids (n,) of whole SIDs (n, levels), -1 where no item carries one; any code may be asked for.

        Raises ValueError for SIDs of another number of levels.
        """
        if sids.ndim != 2 or sids.shape[1] != self.levels:
            raise ValueError(f"sids: shape {sids.shape}, the trie has {self.levels} levels")
        codes = torch.from_numpy(sids.astype(np.int64)).to(self._degree.device)
        valid = ((codes >= 0) & (codes < self.codebook_size)).all(dim=1)
        codes = codes.clamp(0, self.codebook_size - 1)
        nodes = torch.full((len(sids),), self.root, device=codes.device)
        for level in range(self.levels):
            nodes = self.step(nodes).gather(1, codes[:, level : level + 1]).squeeze(1)
        return nodes.where(valid, -1)

    def closed_by(self, sids: npt.NDArray[np.integer]) -> torch.Tensor:
        """Which nodes (nodes,) lead nowhere once ``sids`` (n, levels) are left out: their leaves, and every node all of
        whose children are closed.
        """
        leaves = self.leaves(sids)
        closed = torch.zeros(self.nodes, dtype=torch.bool, device=leaves.device)
        closing = torch.unique(leaves[leaves >= 0])
        for _ in range(self.levels):
            closed[closing] = True
            parents, children = torch.unique(self._parent[closing], return_counts=True)
            closing = parents[children == self._degree[parents]]
        closed[closing] = True
        return closed

    @property
    def _placed(self) -> _Places:
        if self._places is None:
            raise ValueError("trie: built without vectors, so it cannot tell where a SID lies")
        return self._places

    @property
    def centroids(self) -> SidCentroids:
        """Of the items that the trie was built of. Raises ValueError when it was built without vectors."""
        return self._placed.centroids

    def directions(self, sids: npt.NDArray[np.integer]) -> npt.NDArray[np.float32]:
        """The mean direction (n, dim) of the items that carry each SID (n, levels) of the trie.

        Kept once it was asked for: users' likely SIDs are much the same, and a catalogue's are many. Raises KeyError
        for a SID that no item carries, ValueError when the trie was built without vectors.
        """
        return self._placed.of(self.rows(sids), sids)

    def places(self) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
        """Every SID (m, levels), ascending, and the mean direction (m, dim) of the items that carry it, not to be
        written to.

        Raises ValueError when the trie was built without vectors.
        """
        return self._placed.every()

    def rows(self, sids: npt.NDArray[np.integer]) -> npt.NDArray[np.int64]:
        """Row (n,) in `places` of SIDs (n, levels), -1 where no item carries one."""
        # Leaves are numbered as SIDs ascend.
        leaves = self.leaves(sids).cpu().numpy()
        found: npt.NDArray[np.int64] = np.where(leaves >= 0, leaves - self._leaves_from, -1)
        return found

    def contains(self, sid: Sequence[int]) -> bool:
        """Whether some item carries the whole SID (``levels`` codes)."""
        node = self.root
        for code in sid:
            if not 0 <= code < self.codebook_size:
                return False
            device = self._degree.device
            node = int(self.step(torch.tensor(node, device=device))[code])
            if node < 0:
                return False
        return node >= self._leaves_from


class _Places:
    """Where SIDs lie, each computed when it is first asked for. One for a trie and its copies on other devices."""

    def __init__(self, codes: npt.NDArray[np.integer], vectors: npt.NDArray[np.float32], size: int) -> None:
        self._codes, self._vectors = codes, vectors
        self._directions = np.empty((size, vectors.shape[1]), np.float32)
        self._known = np.zeros(size + 1, bool)  # row -1, of a SID that is not there, never is
        self._lock = threading.Lock()

    @cached_property
    def centroids(self) -> SidCentroids:
        return SidCentroids(self._codes, self._vectors)

    @cached_property
    def sids(self) -> npt.NDArray[np.int32]:
        return np.unique(self._codes, axis=0).astype(np.int32)

    def of(self, rows: npt.NDArray[np.int64], sids: npt.NDArray[np.integer]) -> npt.NDArray[np.float32]:
        """Directions (n, dim) of ``sids`` (n, levels), which are those of ``rows`` (n,)."""
        with self._lock:
            self._fill(rows, sids)
        return self._directions[rows]

    def every(self) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
        with self._lock:
            self._fill(np.arange(len(self._directions)), self.sids)
        view = self._directions.view()
        view.flags.writeable = False
        return self.sids, view

    def _fill(self, rows: npt.NDArray[np.int64], sids: npt.NDArray[np.integer]) -> None:
        new = np.flatnonzero(~self._known[rows])
        if len(new):
            self._directions[rows[new]] = self.centroids.vectors_of(sids[new])
            self._known[rows[new]] = True
