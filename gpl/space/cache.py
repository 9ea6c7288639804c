"""Embeddings on disk by content hash: one SQLite file per encoder."""

from __future__ import annotations

import hashlib
import re
import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt

_SCHEMA = "CREATE TABLE IF NOT EXISTS embeddings (content BLOB PRIMARY KEY, vector BLOB NOT NULL)"
_SELECT_BATCH = 500  # below SQLite's smallest limit on bound parameters, 999
_BUSY_SECONDS = 30.0  # another process may be writing a batch


class EmbeddingCache:
    """Vector of a text, by sha256 of encoder and text, as little-endian float32.

    Safe for several processes and threads at once: write-ahead log, and the first writer of a key wins. The
    directory must be on a local disk, as SQLite's write-ahead log asks.
    """

    def __init__(self, directory: Path, encoder: str) -> None:
        """``encoder`` identifies the weights; a different string is a different file."""
        readable = re.sub(r"[^A-Za-z0-9._-]+", "-", encoder)[-60:].strip("-.")
        digest = hashlib.sha256(encoder.encode()).hexdigest()[:8]
        self.path = directory / f"{readable}-{digest}.sqlite"
        self._encoder = encoder

    def key(self, text: str) -> bytes:
        """sha256 of encoder and text; the separator keeps the two apart."""
        return hashlib.sha256(f"{self._encoder}\0{text}".encode("utf-8", "surrogatepass")).digest()

    def dim(self) -> int | None:
        """Dimension of the vectors kept here; None while there are none."""
        if not self.path.exists():
            return None
        with self._connection() as connection:
            row = connection.execute("SELECT length(vector) FROM embeddings LIMIT 1").fetchone()
        return None if row is None else int(row[0]) // 4

    def get(self, keys: Sequence[bytes]) -> dict[bytes, npt.NDArray[np.float32]]:
        """The vectors (dim,) of those keys that are here."""
        found: dict[bytes, npt.NDArray[np.float32]] = {}
        if not keys or not self.path.exists():
            return found
        with self._connection() as connection:
            for start in range(0, len(keys), _SELECT_BATCH):
                batch = keys[start : start + _SELECT_BATCH]
                marks = ",".join("?" * len(batch))
                rows = connection.execute(f"SELECT content, vector FROM embeddings WHERE content IN ({marks})", batch)
                for content, vector in rows:
                    found[content] = np.frombuffer(vector, "<f4").astype(np.float32, copy=False)
        return found

    def put(self, vectors: Mapping[bytes, npt.NDArray[np.float32]]) -> None:
        """Add vectors in one transaction; a key that is there keeps its vector."""
        rows = [(key, vector.astype("<f4", copy=False).tobytes()) for key, vector in vectors.items()]
        with self._connection() as connection, connection:
            connection.executemany("INSERT OR IGNORE INTO embeddings VALUES (?, ?)", rows)

    @contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        # Opened for each batch (0.2 ms): a connection may cross neither threads nor forks.
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with closing(sqlite3.connect(self.path, timeout=_BUSY_SECONDS)) as connection:
                _write_ahead(connection)
                connection.execute("PRAGMA synchronous=NORMAL")
                connection.execute(_SCHEMA)
                yield connection
        except sqlite3.OperationalError as error:  # locked for too long, disk full, not writable
            raise OSError(f"embedding cache {self.path}: {error}") from error
        except sqlite3.DatabaseError as error:
            raise OSError(
                f"embedding cache {self.path}: {error}; delete it, its texts are then encoded again"
            ) from error


def _write_ahead(connection: sqlite3.Connection) -> None:
    """Switch the file to a write-ahead log. Raises sqlite3.OperationalError when others hold it for too long."""
    # Of a new file only one connection can do it, and to the others SQLite says "locked" without having waited.
    deadline = time.monotonic() + _BUSY_SECONDS
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
            time.sleep(0.005)
