"""The evaluation journal: progressive validation line by line, for reports that need more than a window's mean.

JSON lines of two kinds, written for each request once, before it is trained on:

- ``{"kind": "rank", request_id, user_id, ts, item, tail, n, rank: {model: int}}`` for each clicked item: its rank among
  the ``n`` candidates of the request, 1 is best;
- ``{"kind": "score", request_id, user_id, ts, clicked, score: {model: float}}`` for each exposed item: its logit.

The checkpoint holds the journal's length. What was written after it belongs to steps that a crash took back, so
the file is cut to that length on resume: every evaluation of the surviving history stands in it once. A journal of
which nothing belongs to the history is another history's (new weights, new checkpoints), and is moved aside.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import msgspec
import structlog

from streams.durable import sync_directory
from streams.trainer.batch import Request
from streams.trainer.validation import Evaluated

log = structlog.get_logger()


class Journal:
    """An append-only file that can be taken back to a length. Raises OSError when it cannot be opened."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._file = path.open("ab")

    def cut(self, length: int) -> None:
        """Take the file back to a length. To none of what is in it: it becomes ``NAME.before-1``, the next free number,
        and a new one begins."""
        found = self._file.tell()
        if found < length:
            log.warning("journal_shorter_than_checkpoint", path=str(self._path), found=found, expected=length)
        elif found > length > 0:
            self._file.truncate(length)
        elif found > length:
            names = (self._path.with_name(f"{self._path.name}.before-{n}") for n in count(1))
            aside = next(name for name in names if not name.exists())
            self._path.rename(aside)
            self._file.close()
            self._file = self._path.open("ab")
            sync_directory(self._path.parent)
            log.warning("journal_moved_aside", path=str(self._path), to=str(aside))

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
