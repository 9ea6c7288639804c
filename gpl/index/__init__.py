"""Nearest-neighbour search over the catalogue. Adapters import their library, so they are not imported here:
``gpl.index.edge`` (embedded Qdrant), ``gpl.index.server`` (Qdrant server), ``gpl.index.oracle`` (exact, in memory).
"""

from gpl.index.base import IndexUnavailable, VectorIndex

__all__ = ["IndexUnavailable", "VectorIndex"]
