"""Where the bytes of retained recalls are: in memory, or on disk in RocksDB.

A recall of a thousand candidates is some 13 KB, needed once when its window is over and again for a correction. State
is rebuilt from the log after a restart, so nothing here has to survive one: the store on disk only keeps the bulk out
of memory.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

from streams.settings import LabelSettings


class RecallStore(Protocol):
    """Bytes by request id."""

    def put(self, request_id: str, data: bytes) -> None:
        """Keep the bytes of a request."""
        ...

    def get(self, request_id: str) -> bytes:
        """The bytes of a request. Raises KeyError when there are none."""
        ...

    def remove(self, request_ids: Iterable[str]) -> None:
        """Let go of requests that are held."""
        ...

    def clear(self) -> None:
        """Let go of everything."""
        ...

    def close(self) -> None:
        """Nothing is asked for any more."""
        ...


class MemoryStore:
    """A dictionary."""

    def __init__(self) -> None:
        self._data: dict[str, bytes] = {}

    def put(self, request_id: str, data: bytes) -> None:
        self._data[request_id] = data

    def get(self, request_id: str) -> bytes:
        return self._data[request_id]

    def remove(self, request_ids: Iterable[str]) -> None:
        for request_id in request_ids:
            del self._data[request_id]

    def clear(self) -> None:
        self._data = {}

    def close(self) -> None:
        self._data = {}


class DiskStore:
    """RocksDB through rocksdict, in a directory of this process's own, which is empty at first and gone at last.

    Without a write-ahead log: what is here is in Kafka. Raises ModuleNotFoundError without the extra ``disk``.
    """

    def __init__(self, directory: Path) -> None:
        try:
            import rocksdict
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                'labels.store = "disk" needs rocksdict: pip install "gpl-streams[disk]"'
            ) from error
        directory.mkdir(parents=True, exist_ok=True)
        for left in directory.iterdir():
            if not _alive(left.name):
                shutil.rmtree(left, ignore_errors=True)
        self._rocksdict = rocksdict
        self._directory = directory / str(os.getpid())
        self._open()

    def _open(self) -> None:
        options = self._rocksdict.Options(raw_mode=True)
        options.create_if_missing(True)
        options.set_write_buffer_size(16 * 2**20)
        options.set_max_write_buffer_number(2)
        options.set_compression_type(self._rocksdict.DBCompressionType.lz4())
        self._db = self._rocksdict.Rdict(str(self._directory), options=options)
        unlogged = self._rocksdict.WriteOptions()
        unlogged.disable_wal = True  # type: ignore[method-assign, assignment]  # a property, its stub says a method
        self._db.set_write_options(unlogged)

    def put(self, request_id: str, data: bytes) -> None:
        self._db[request_id.encode()] = data

    def get(self, request_id: str) -> bytes:
        data = self._db[request_id.encode()]
        assert isinstance(data, bytes)
        return data

    def remove(self, request_ids: Iterable[str]) -> None:
        for request_id in request_ids:
            del self._db[request_id.encode()]

    def clear(self) -> None:
        self.close()
        self._open()

    def close(self) -> None:
        self._db.close()
        shutil.rmtree(self._directory, ignore_errors=True)


def open_store(settings: LabelSettings) -> RecallStore:
    """The store that the settings name, empty. Raises ModuleNotFoundError when its package is not installed."""
    return DiskStore(settings.store_path) if settings.store == "disk" else MemoryStore()


def _alive(process: str) -> bool:
    return process.isdigit() and Path("/proc", process).exists()
