"""Dead letters for the terminal and as JSON."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

from rich.table import Table
from rich.text import Text

from streams.dlq.letters import Letter


def time(millis: int) -> str:
    """Kafka milliseconds as ISO 8601, UTC; what no calendar holds, as the number."""
    try:
        return datetime.fromtimestamp(millis / 1000, UTC).isoformat(timespec="seconds")
    except (ValueError, OverflowError, OSError):
        return f"{millis} ms"


def counts(letters: Iterable[Letter]) -> dict[tuple[str, str], tuple[int, int]]:
    """(topic, reason) -> letters, and those of them that were sent back."""
    every: Counter[tuple[str, str]] = Counter()
    done: Counter[tuple[str, str]] = Counter()
    for letter in letters:
        every[letter.original.topic, letter.reason] += 1
        done[letter.original.topic, letter.reason] += letter.redriven
    return {what: (every[what], done[what]) for what in sorted(every)}


def count_table(letters: list[Letter]) -> Table | str:
    """``counts`` as a table."""
    if not letters:
        return "no dead letters"
    table = Table("topic", "reason", "letters", "sent back")
    for (topic, reason), (n, done) in counts(letters).items():
        table.add_row(Text(topic), Text(reason), str(n), str(done))
    return table


def row(letter: Letter, redriven: bool | None = None) -> dict[str, Any]:
    """What a letter says of itself, for JSON and for one line a field."""
    origin = letter.original
    return {
        "id": letter.id,
        "written": time(letter.written_ms),
        "topic": origin.topic,
        "partition": origin.partition,
        "offset": origin.offset,
        "timestamp": origin.timestamp,
        "key": text(origin.key),
        "error": letter.error,
        "reason": letter.reason,
        "message": letter.message,
        "redrives": letter.redrives,
        "redriven": letter.redriven if redriven is None else redriven,
        "bytes": letter.size,
    }


def text(data: bytes | None) -> str | None:
    """UTF-8 where it is that, else hexadecimal."""
    if data is None:
        return None
    try:
        return data.decode()
    except UnicodeDecodeError:
        return f"0x{data.hex()}"


def body(value: bytes | None, hexadecimal: bool) -> str:
    """A value as indented JSON where it is that and can be printed, else as a hex dump."""
    if value is None:
        return "null"
    if not hexadecimal:
        try:
            shown = json.dumps(json.loads(value), indent=2, ensure_ascii=False)
            shown.encode()  # lone surrogates are JSON, and cannot be printed
            return shown
        except (ValueError, RecursionError):
            pass
    rows = []
    for at in range(0, len(value), 16):
        row = value[at : at + 16]
        printable = "".join(chr(byte) if 32 <= byte < 127 else "." for byte in row)
        rows.append(f"{at:08x}  {row.hex(' '):<47}  |{printable}|")
    return "\n".join(rows) or "(no bytes)"
