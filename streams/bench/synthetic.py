"""Made-up state of a served system, of any size: item vectors, users' anchors and published models.

Vectors are random directions: what a score costs does not depend on what it says.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from gpl.labels.matching import Floats
from gpl.preranker.model import PreRanker
from streams import models
from streams.contracts import ItemVector, ModelUpdate, Record, UserAnchors
from streams.frame import Frame
from streams.settings import GeneratorSettings
from streams.views import vector_bytes

LEVELS = 3
_HISTORY = GeneratorSettings().history


def drawn_history(cumulative: NDArray[np.float64], rng: np.random.Generator) -> list[str]:
    """A history as long as generators read by default, of items drawn by popularity, ``cumulative`` (N,) shares."""
    return [f"item-{i}" for i in np.searchsorted(cumulative, rng.random(_HISTORY)).tolist()]


class SyntheticState:
    """``items`` items in ``dim`` dimensions; ``users`` users with ``anchors`` anchors each."""

    def __init__(self, items: int, users: int, anchors: int, dim: int, seed: int) -> None:
        self._rng = np.random.default_rng(seed)
        self.frame = Frame(dim, LEVELS, "synthetic", "synthetic")
        self.items = [f"item-{n}" for n in range(items)]
        self.users = [f"user-{n}" for n in range(users)]
        vectors = self._rng.normal(size=(items, dim)).astype(np.float32)
        self.vectors: Floats = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        chosen = self._rng.integers(items, size=(users, anchors))
        self.anchors: dict[str, Floats] = {
            user: self.vectors[rows] for user, rows in zip(self.users, chosen, strict=True)
        }
        self.histories: dict[str, list[str]] = {
            user: [self.items[row] for row in rows.tolist()] for user, rows in zip(self.users, chosen, strict=True)
        }

    def records(self) -> Iterator[tuple[str, str, Record]]:
        """(topic, key, record) of the catalogue and the anchors."""
        sid = [0] * LEVELS
        for item_id, vector in zip(self.items, self.vectors, strict=True):
            yield "item-vectors", item_id, ItemVector(item_id, vector_bytes(vector), sid, "", *self._versions)
        for user_id, anchors in self.anchors.items():
            k = len(anchors)
            record = UserAnchors(
                user_id=user_id,
                ts=0,
                version=1,
                sid=[sid] * k,
                logprob=[-1.0] * k,
                vectors=vector_bytes(anchors),
                history_factor=[1.0] * k,
                history=self.histories[user_id],
                generator="synthetic",
                quantiser=self._versions[1],
                encoder=self._versions[0],
            )
            yield "user-anchors", user_id, record

    def network(self, dim: int, number: int) -> PreRanker:
        """Version ``number`` of a pre-ranker of tower width ``dim`` that has met every user and item, in row order."""
        network = PreRanker(self.frame.dim, dim, seed=number)
        network.grow(len(self.users) + 1, len(self.items) + 1)
        generator = torch.Generator().manual_seed(number)
        for name, table in network.tables():
            table.data[1 : network.rows(name)].normal_(std=0.3, generator=generator)
        return network

    def publish(self, directory: Path, name: str, dim: int, number: int) -> ModelUpdate:
        """Write version ``number`` (see ``network``) where a scorer finds it. It is still to be announced."""
        network = self.network(dim, number)
        manifest = models.Manifest(
            model=name,
            version=models.version_name(number, number),
            step=number,
            config={"dim": dim, "dim_content": self.frame.dim},
            encoder=self._versions[0],
            quantiser=self._versions[1],
            source_offsets={},
            newest_event_ts=0,
            published_at=0,
            metrics={},
        )
        store = models.ModelStore(directory)
        uri, checksum = store.write(manifest, network.state_tensors(), models.Ids(self.users, self.items))
        return ModelUpdate(name, manifest.version, uri, checksum, {}, 0, {})

    @property
    def _versions(self) -> tuple[str, str]:
        return self.frame.encoder, self.frame.quantiser
