"""Readers of public data sets, each in the format of its source."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from gpl.evaluation import neutral
from gpl.evaluation.dataset import DataError, Dataset
from gpl.evaluation.sources import amazon, coat, jester, kuairec, mind, movielens, retail

CONVERTERS: dict[str, Callable[[Path], Dataset]] = {
    "jester": jester.read,
    "kuairec": kuairec.read,
    "coat": coat.read,
    "mind": mind.read,
    "amazon-office": amazon.read,
    "amazon": amazon.read,
    "online-retail": retail.read,
}
"""By name: a reader of the source's directory. Raises FileNotFoundError and DataError."""

BUILT_IN: dict[str, Callable[[], Dataset]] = {
    "ml-100k-completed": movielens.completed,
    "ml-100k-time": movielens.time_split,
}
"""Sets that need no files: they come with an installed package. Raises movielens.DatasetMissingError."""


def open_dataset(name: str | Path, truth: Path | None = None) -> Dataset:
    """A built-in set by its name, or a directory in the neutral format; a Path is always a directory.

    Raises FileNotFoundError, DataError, movielens.DatasetMissingError.
    """
    if isinstance(name, Path):
        return neutral.load(name, truth)
    if name in BUILT_IN:
        if truth is not None:
            raise DataError(f"{name}: a built-in set has its own truth, {truth} cannot take its place")
        return BUILT_IN[name]()
    if not Path(name).is_dir():
        raise FileNotFoundError(f"{name}: neither a directory nor a built-in set ({', '.join(BUILT_IN)})")
    return neutral.load(Path(name), truth)
