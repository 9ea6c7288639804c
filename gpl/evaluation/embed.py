"""Items of a data set in the frozen space. Items without any content are zero rows, which match nothing."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from gpl.evaluation.dataset import DataError, Dataset, Floats
from gpl.evaluation.upstream import UpstreamConfig
from gpl.evaluation.world import World, build
from gpl.space import PRECOMPUTED, Encoder, Space, raw_vectors


def embed(dataset: Dataset, encoder: Encoder, dim: int | None = None) -> tuple[Floats, Floats, Floats]:
    """``(raw, centred, kept)`` unit vectors (n, d), (n, d) and (n, dim). Items that all bring an embedding are not
    encoded. ``kept``: the centred ones in ``dim`` dimensions; None: in all, so they are the same.

    Centring is fitted on the items that have content. Raises DataError when fewer than two have, or only some bring an
    embedding, ValueError for bad vectors.
    """
    carries = [item.embedding is not None for item in dataset.items]
    if any(carries) and not all(carries):
        raise DataError(
            f"{dataset.name}: {sum(carries)} of {len(carries)} items have an embedding, expected all or none"
        )
    used = None if all(carries) else encoder
    having = [at for at, item in enumerate(dataset.items) if used is None or item.text.strip()]
    if len(having) < 2:
        raise DataError(f"{dataset.name}: {len(having)} items have a text, at least 2 are needed")
    found = raw_vectors([dataset.items[at] for at in having], used)
    name = PRECOMPUTED if used is None else used.name
    raw, centred = np.zeros((2, len(dataset.items), found.shape[1]), dtype=np.float32)
    raw[having] = found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-12)
    centred[having] = Space.fit(name, found).project(found)
    if dim is None:
        return raw, centred, centred
    space = Space.fit(name, found, dim=dim)
    kept = np.zeros((len(dataset.items), space.dim), dtype=np.float32)
    kept[having] = space.project(found)
    return raw, centred, kept


def embedded_world(
    dataset: Dataset, encoder: Encoder, seed: int, config: UpstreamConfig | None = None, dim: int | None = None
) -> World:
    """`embed` and `build` in one. The upstream recalls by all dimensions: the log does not hang on ``dim``."""
    raw, centred, kept = embed(dataset, encoder, dim)
    return replace(build(dataset, raw, centred, seed, config), vectors=kept)
