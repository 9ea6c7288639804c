"""Checks that generators share: SIDs and tries against the codes that a model knows."""

from __future__ import annotations

from gpl.anchors.base import IntArray
from gpl.codes.trie import SidTrie


def check_sids(sids: IntArray, levels: int, codebook_size: int, name: str) -> None:
    """Raises ValueError naming what in ``sids`` is no matrix (n, levels) of codes below ``codebook_size``."""
    if sids.ndim != 2 or sids.shape[1] != levels:
        raise ValueError(f"{name}: shape {sids.shape}, expected (n, {levels})")
    wrong = (sids < 0) | (sids >= codebook_size)
    if wrong.any():
        row, level = (int(at[0]) for at in wrong.nonzero())
        raise ValueError(f"{name}[{row}][{level}]: {sids[row, level]}, expected 0 to {codebook_size - 1}")


def check_trie(trie: SidTrie, levels: int, codebook_size: int) -> None:
    """Raises ValueError for a trie of other levels or another codebook size than the generator was trained on."""
    if (trie.levels, trie.codebook_size) != (levels, codebook_size):
        raise ValueError(
            f"trie: {trie.levels} levels of {trie.codebook_size} codes, "
            f"the generator was trained on {levels} of {codebook_size}"
        )
