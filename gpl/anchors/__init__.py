"""Anchor generators: from a user's history to the points of the space where the next interest is expected."""

from gpl.anchors.base import AnchorGenerator, Anchors, Beams, History, anchors_of, load_generator

__all__ = ["AnchorGenerator", "Anchors", "Beams", "History", "anchors_of", "load_generator"]
