"""The frozen space that a process works in, without the models that made it: enough to read vectors by."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from gpl.artefacts import Artefacts


@dataclass(frozen=True)
class Frame:
    """``dim`` of vectors, ``levels`` of semantic ids, and the versions of what made them."""

    dim: int
    levels: int
    encoder: str
    quantiser: str

    @classmethod
    def load(cls, artefacts: Path) -> Frame:
        """The frame of what `gpl fit` wrote. Raises what ``Artefacts.load`` raises."""
        return cls.of(Artefacts.load(artefacts, with_generator=False))

    @classmethod
    def of(cls, fitted: Artefacts) -> Frame:
        return cls(fitted.space.dim, fitted.quantiser.levels, fitted.space.version, fitted.quantiser.version)

    @property
    def space(self) -> tuple[str, str]:
        """What vectors must share to be compared: the versions of encoder and quantiser."""
        return self.encoder, self.quantiser

    @property
    def versions(self) -> dict[str, str]:
        """For manifests."""
        return {"encoder": self.encoder, "quantiser": self.quantiser}
