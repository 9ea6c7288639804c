"""Semantic ids: the quantiser that gives them, their vectors.

The trie of those that exist is in ``gpl.codes.trie``, to be imported by name: it needs torch, which takes seconds to
import and which a worker without a generator does without.
"""

from gpl.codes.centroids import SidCentroids
from gpl.codes.quantiser import Quantiser, Report, load_quantiser, suggest_codebook_size, suggest_levels
from gpl.codes.rq_kmeans import ResidualKMeans
from gpl.codes.rq_vae import ResidualVAE, VAEConfig

__all__ = [
    "Quantiser",
    "Report",
    "ResidualKMeans",
    "ResidualVAE",
    "SidCentroids",
    "VAEConfig",
    "load_quantiser",
    "suggest_codebook_size",
    "suggest_levels",
]
