"""Reading a data directory line by line, in constant memory, whatever the lines hold.

``items.jsonl``, ``recalls.jsonl`` and ``feedback.jsonl``: one JSON record a line, UTF-8, each line exactly the
value of a record of the topic of the same name (``docs/data-format.md``).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import msgspec

from streams.contracts import Feedback, Item, Recall, Record, decode

R = TypeVar("R", bound=Record)

FILES: dict[str, type[Record]] = {"items.jsonl": Item, "recalls.jsonl": Recall, "feedback.jsonl": Feedback}
BOM = b"\xef\xbb\xbf"

_CHUNK = 2**20


@dataclass(frozen=True)
class Line:
    """One line of a file. ``number`` counts from 1, ``offset`` is where it begins.

    ``raw`` is without the line end; None when the line is longer than the cap (``size`` tells how long).
    """

    number: int
    offset: int
    size: int
    raw: bytes | None

    @property
    def blank(self) -> bool:
        return self.raw is not None and not self.raw.strip()


@dataclass(frozen=True)
class FieldError:
    """Why a line is no record: the field ("" for the line as a whole) and the reason, with the value."""

    field: str
    reason: str


@dataclass(frozen=True)
class Entry(Generic[R]):
    """A line and its record; ``record`` is None when the line is no valid record, and ``error`` says why."""

    line: Line
    record: R | None
    error: FieldError | None = None


def lines(path: Path, max_bytes: int) -> Iterator[Line]:
    """Lines of a file; one longer than ``max_bytes`` is passed over without being held in memory. A byte order mark at
    its start is no part of the first.

    Raises FileNotFoundError.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file; docs/data-format.md tells what a data directory holds")
    with path.open("rb") as handle:
        number, offset = 0, 0
        if handle.peek(len(BOM)).startswith(BOM):
            offset = len(handle.read(len(BOM)))
        while chunk := handle.readline(max_bytes + 2):
            number += 1
            size = len(chunk)
            raw: bytes | None = chunk.rstrip(b"\r\n")
            if not chunk.endswith(b"\n") and len(chunk) > max_bytes:
                while chunk and not chunk.endswith(b"\n"):
                    chunk = handle.readline(_CHUNK)
                    size += len(chunk)
                raw = None
            elif raw is not None and len(raw) > max_bytes:
                raw = None
            yield Line(number, offset, size, raw)
            offset += size


def entries(path: Path, kind: type[R], max_bytes: int) -> Iterator[Entry[R]]:
    """Every line that is not blank, parsed. Raises FileNotFoundError; bad lines come with their error."""
    for line in lines(path, max_bytes):
        if not line.blank:
            yield parse(line, kind, max_bytes)


def records(path: Path, kind: type[R], max_bytes: int) -> Iterator[R]:
    """The valid records of a file, in order; lines that are none are passed over."""
    for entry in entries(path, kind, max_bytes):
        if entry.record is not None:
            yield entry.record


def parse(line: Line, kind: type[R], max_bytes: int) -> Entry[R]:
    """A line as a record, or what is wrong with it."""
    if line.raw is None:
        return Entry(line, None, FieldError("", f"record of {line.size} bytes is over the cap of {max_bytes} bytes"))
    try:
        return Entry(line, decode(kind, line.raw))
    except msgspec.ValidationError as error:
        return Entry(line, None, _field_error(line.raw, str(error)))
    except msgspec.DecodeError as error:
        if line.raw.startswith(BOM):
            return Entry(line, None, FieldError("", "byte order mark (BOM) before the record; save as UTF-8 without"))
        return Entry(line, None, FieldError("", str(error)))


_AT = re.compile(r"^(?P<reason>.*) - at `\$\.?(?P<path>.*)`$")
_NAMED = re.compile(r"(?:unknown|required) field `(?P<path>[^`]*)`")
_OWN = re.compile(r"^(?P<path>[a-z_]+): (?P<reason>.*)$")


def _field_error(raw: bytes, message: str) -> FieldError:
    """msgspec's message taken apart: "Expected `str`, got `int` - at `$.item_id`"."""
    if found := _AT.match(message):
        path, reason = found["path"], found["reason"]
        if named := _NAMED.search(reason):
            return FieldError(".".join(filter(None, (path, named["path"]))), reason)
        return FieldError(path, reason + _value_at(raw, path))
    if found := _NAMED.search(message):
        return FieldError(found["path"], message)
    if found := _OWN.match(message):
        return FieldError(found["path"], found["reason"])
    return FieldError("", message)


def _value_at(raw: bytes, path: str) -> str:
    """ ": VALUE", the value that stands at a path like ``candidates[1]``, shortened; "" when it cannot be told."""
    try:
        value: Any = msgspec.json.decode(raw)
        for name, index in re.findall(r"([^.\[\]]+)|\[(\d+)\]", path):
            value = value[name] if name else value[int(index)]
        text = repr(value)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, LookupError, TypeError):
        # The record was refused at an earlier field; what comes after it may be no JSON, no UTF-8 or nested too deeply.
        return ""
    return ": " + (text if len(text) <= 60 else text[:57] + "...")
