"""Reading files of a source directory with clear errors."""

from __future__ import annotations

import csv
import gzip
import html
import io
import math
import re
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from gpl.evaluation.dataset import DataError
from gpl.evaluation.neutral import open_text

UTF_8 = "utf-8-sig"
_CUT_OFF = (EOFError, gzip.BadGzipFile, zlib.error)
_TAG = re.compile(r"</?[A-Za-z][^>]*>|<!--.*?-->", re.DOTALL)


def optional(directory: Path, *names: str) -> Path | None:
    """The first of ``names`` that is a file, plain or gzipped."""
    paths = (directory / f"{name}{suffix}" for name in names for suffix in ("", ".gz"))
    return next((path for path in paths if path.is_file()), None)


def find(directory: Path, *names: str) -> Path:
    """:func:`optional`, but FileNotFoundError naming them if there is none, DataError if one is there as a workbook."""
    if (path := optional(directory, *names)) is not None:
        return path
    for name in names:
        for suffix in (".xls", ".xlsx"):
            workbook = (directory / name).with_suffix(suffix)
            if name.endswith(".csv") and workbook.is_file():
                raise DataError(
                    f"{workbook.name}: workbooks are not read; save it from a spreadsheet program as {name}, separated "
                    f"by commas (or, of its first sheet: libreoffice --headless --convert-to csv '{workbook.name}')"
                )
    raise FileNotFoundError(f"{directory}: expected {' or '.join(names)} (or the same with .gz)")


@contextmanager
def opened(path: Path, encoding: str = UTF_8) -> Iterator[io.TextIOBase]:
    """``path`` as text. What is not, or is cut off, is a DataError naming the file."""
    try:
        with open_text(path, encoding) as handle:
            yield handle
    except UnicodeDecodeError as error:
        raise DataError(f"{path.name}: not UTF-8: {error}") from None
    except (csv.Error, *_CUT_OFF) as error:
        raise DataError(f"{path.name}: cannot be read: {error}") from None


def encoding_of(path: Path) -> str:
    """UTF-8, or Latin-1, in which anything can be read, where the file is not."""
    try:
        # A file that is cut off is an error where it is read.
        with suppress(*_CUT_OFF), open_text(path) as handle:
            for _ in handle:
                pass
    except UnicodeDecodeError:
        return "latin-1"
    return UTF_8


def rows(
    path: Path, *columns: str, aliases: Mapping[str, str] | None = None, encoding: str = UTF_8
) -> Iterator[dict[str, str]]:
    """Rows of a CSV with header, columns of ``aliases`` renamed. DataError when one is missing or a row is short."""
    with opened(path, encoding) as handle:
        reader = csv.reader(handle)
        header = [(aliases or {}).get(name, name) for name in next(reader, [])]
        for column in columns:
            if column not in header:
                raise DataError(f"{path.name}: column {column!r} is missing, found {header}")
        needed = 1 + max(header.index(column) for column in columns)
        for row in reader:
            if row and len(row) < needed:
                raise DataError(f"{path.name}:{reader.line_num}: {len(header)} columns expected, the row is short")
            if row:
                yield dict(zip(header, row, strict=False))


def number(path: Path, field: str, value: object) -> float:
    """``value`` as a finite float. Raises DataError naming file, field and value."""
    try:
        found = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        found = math.nan
    if not math.isfinite(found):
        raise DataError(f"{path.name}: {field} {value!r}, expected a number")
    return found


def plain(markup: str) -> str:
    """HTML without tags and entities, in one line."""
    return " ".join(html.unescape(_TAG.sub(" ", markup)).split())
