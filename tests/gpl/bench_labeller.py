"""Labelling against the bare product and gather: 10 anchors x 1,000 of 100,000 items x 384 dimensions, one thread.

OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 pytest tests/gpl/bench_labeller.py -o addopts= --benchmark-only
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gpl.labels.calibration import Platt
from gpl.labels.labeller import Config, PreparedAnchors, label

ITEMS, CANDIDATES, ANCHORS, DIM = 100_000, 1_000, 10, 384


@pytest.fixture(scope="module")
def case():
    rng = np.random.default_rng(0)
    items = rng.standard_normal((ITEMS, DIM), dtype=np.float32)
    items /= np.linalg.norm(items, axis=1, keepdims=True)
    rows = rng.integers(0, ITEMS, (200, CANDIDATES))
    return items, rows, items[:ANCHORS].copy(), np.linspace(-1, -6, ANCHORS, dtype=np.float32)


def requests(rows):
    """One request after another, so that candidates are not in the cache because the last round put them there."""
    while True:
        yield from rows


@pytest.mark.benchmark(group="labeller")
def test_bare_numpy(benchmark, case):
    items, rows, anchors, _ = case
    request = requests(rows)
    benchmark(lambda: items[next(request)] @ anchors.T)


@pytest.mark.benchmark(group="labeller")
def test_bare_torch(benchmark, case):
    items, rows, anchors, _ = case
    torch.set_num_threads(1)
    matrix, query, request = torch.from_numpy(items), torch.from_numpy(anchors), requests(rows)
    benchmark(lambda: matrix.index_select(0, torch.from_numpy(next(request))) @ query.T)


@pytest.mark.benchmark(group="labeller")
@pytest.mark.parametrize("matching", ["max", "kernel"])
def test_label(benchmark, case, matching):
    items, rows, anchors, logprobs = case
    request = requests(rows)
    prepared = PreparedAnchors.build(anchors, logprobs, np.full(ANCHORS, 0.5), 3, Config(matching=matching))
    benchmark(lambda: label(prepared, Platt(5.0, -3.0), items[next(request)]))
