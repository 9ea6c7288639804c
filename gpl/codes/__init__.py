"""Semantic ids: the quantiser that gives them, the trie of those that exist, their vectors."""

from gpl.codes.centroids import SidCentroids
from gpl.codes.quantiser import Quantiser, Report, load_quantiser, suggest_codebook_size, suggest_levels
from gpl.codes.rq_kmeans import ResidualKMeans
from gpl.codes.rq_vae import ResidualVAE, VAEConfig
from gpl.codes.trie import SidTrie

__all__ = [
    "Quantiser",
    "Report",
    "ResidualKMeans",
    "ResidualVAE",
    "SidCentroids",
    "SidTrie",
    "VAEConfig",
    "load_quantiser",
    "suggest_codebook_size",
    "suggest_levels",
]
