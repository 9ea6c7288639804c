"""Reading CSV files of a source directory with clear errors."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

from gpl.evaluation.dataset import DataError
from gpl.evaluation.neutral import open_text


def find(directory: Path, *names: str) -> Path:
    """The first of ``names`` that is a file, plain or gzipped. Raises FileNotFoundError naming them."""
    for name in names:
        for path in (directory / name, directory / f"{name}.gz"):
            if path.is_file():
                return path
    raise FileNotFoundError(f"{directory}: expected {' or '.join(names)} (or the same with .gz)")


def rows(path: Path, *columns: str) -> Iterator[dict[str, str]]:
    """Rows of a CSV with header. Raises DataError when a column is missing or a row is short."""
    with open_text(path) as handle:
        reader = csv.DictReader(handle)
        for column in columns:
            if column not in (reader.fieldnames or ()):
                raise DataError(f"{path.name}: column {column!r} is missing, found {reader.fieldnames}")
        for row in reader:
            if any(row[column] is None for column in columns):
                raise DataError(f"{path.name}:{reader.line_num}: {len(row)} columns expected, the row is short")
            yield row


def number(path: Path, field: str, text: str) -> float:
    """``text`` as a float. Raises DataError naming file, field and value."""
    try:
        return float(text)
    except ValueError:
        raise DataError(f"{path.name}: {field} {text!r}, expected a number") from None
