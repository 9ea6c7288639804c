"""The frozen semantic space: raw item vectors (encoder) and their centring on the catalogue's mean."""

from gpl.space.encoder import Encoder, SentenceEncoder
from gpl.space.raw import PRECOMPUTED, choose_encoder, raw_vectors
from gpl.space.space import Space

__all__ = ["PRECOMPUTED", "Encoder", "SentenceEncoder", "Space", "choose_encoder", "raw_vectors"]
