"""The evaluation journal: progressive validation line by line, for reports that need more than a window's mean.

JSON lines of two kinds, written for each request once, before it is trained on:

- ``{"kind": "rank", request_id, user_id, ts, item, tail, n, rank: {model: int}}`` for each clicked item: its rank among
  the ``n`` candidates of the request, 1 is best;
- ``{"kind": "score", request_id, user_id, ts, clicked, score: {model: float}}`` for each exposed item: its logit.

The checkpoint holds the journal's length. What was written after it belongs to steps that a crash took back, so
the file is cut to that length on resume: every evaluation of the surviving history stands in it once.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import structlog

from streams.trainer.batch import Request
from streams.trainer.validation import Evaluated

log = structlog.get_logger()


class Journal:
    """An append-only file that can be taken back to a length. Raises OSError when it cannot be opened."""

    def __init__(self, path: Path, length: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab")
        found = self._file.tell()
        if found < length:
            log.warning("journal_shorter_than_checkpoint", path=str(path), found=found, expected=length)
        elif found > length:
            self._file.truncate(length)

    def append(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Write lines, in order."""
        for line in lines:
            self._file.write(msgspec.json.encode(line) + b"\n")

    def sync(self) -> int:
        """Make all lines durable. Returns the length of the file in bytes."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return os.fstat(self._file.fileno()).st_size

    def close(self) -> None:
        self._file.close()


def journal_lines(requests: Sequence[Request], evaluated: Evaluated) -> Iterator[dict[str, Any]]:
    """Lines of requests that were evaluated, parallel to ``evaluated``'s."""
    for p, own in zip(requests, evaluated.split(), strict=True):
        about = {"request_id": p.request_id, "user_id": p.user_id, "ts": p.ts}
        for i, clicked in enumerate(own.clicked.tolist()):
            scores = {name: float(values[i]) for name, values in own.logits.items()}
            yield {"kind": "score", **about, "item": p.items[i], "clicked": int(clicked), "score": scores}
        for i, tail in enumerate(own.tail.tolist()):
            rank = {name: int(values[i]) for name, values in own.rank.items()}
            if all(rank.values()):
                yield {"kind": "rank", **about, "item": p.items[i], "tail": tail, "n": len(p.items), "rank": rank}
