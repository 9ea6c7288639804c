"""Semantic ids: the quantiser that gives them, the trie of those that exist, their vectors."""

from gpl.codes.centroids import SidCentroids
from gpl.codes.quantiser import ResidualKMeans, suggest_codebook_size
from gpl.codes.trie import SidTrie

__all__ = ["ResidualKMeans", "SidCentroids", "SidTrie", "suggest_codebook_size"]
