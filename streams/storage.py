"""Where checkpoints and models live: a local directory, or any store that fsspec has a URL for (``s3://bucket/path``).

A named directory is whole or absent. Locally it is written aside, fsynced and renamed. An object store has no
rename, so the file that names and checks the others (the manifest) is written last and removed first: without it
the directory counts as absent. One writer per location, but that single files may be put by others; readers may be
many. A local directory can be held by its writer; in an object store one writer is assumed.
"""

from __future__ import annotations

import errno
import fcntl
import shutil
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Annotated, Any, Protocol
from urllib.parse import urlsplit
from urllib.request import url2pathname

import fsspec
import structlog
from pydantic import BeforeValidator

from streams.durable import clear_aside, replacing, write_directory

log = structlog.get_logger()


class InUseError(RuntimeError):
    """A location that another writer holds."""


def _location(value: Any) -> Any:
    return Path(value) if isinstance(value, str) and "://" not in value else value


Location = Annotated[Path | str, BeforeValidator(_location)]
"""A local path, or the URL of a store as a string."""


class Storage(Protocol):
    """Named directories of a few files each, and single files beside them, below one location."""

    def held(self) -> AbstractContextManager[None]:
        """Keep other writers out for as long as it is open. Raises InUseError when one is there. Where a store has no
        locks it keeps nobody out."""
        ...

    def recover(self) -> None:
        """Remove what a killed writer left half-written. For the one writer, at its start."""
        ...

    def write(self, name: str, files: Mapping[str, bytes], last: str) -> str:
        """Put a directory with exactly these files, durably; ``last`` of them makes it present. Returns its URI."""
        ...

    def read(self, name: str) -> bytes:
        """A file, or ``directory/file``. Raises FileNotFoundError."""
        ...

    def put(self, name: str, data: bytes) -> None:
        """Write or replace one file, durably: readers see the old or the new one, also of several writers' at once."""
        ...

    def names(self, below: str = "") -> list[str]:
        """Names of what is directly in the location, or in a directory of it; ascending, empty when it is absent."""
        ...

    def remove(self, name: str, last: str | None = None) -> None:
        """Remove a directory or a file, if it is there. ``last``: the file that made a directory present."""
        ...

    def uri(self, name: str) -> str:
        """URI under which another process finds a directory."""
        ...


def open_storage(location: Path | str) -> Storage:
    """The storage at a path or URL. Raises ValueError for a URL whose scheme fsspec does not know, ImportError for one
    whose package is not installed."""
    if isinstance(location, str) and "://" in location:
        parts = urlsplit(location)
        if parts.scheme != "file":
            return ObjectStorage(location)
        if parts.netloc not in ("", "localhost"):
            raise ValueError(f"uri: {location!r} names another host; a file URI of this host expected")
        return LocalStorage(Path(url2pathname(parts.path)))
    return LocalStorage(Path(location))


def split_uri(uri: str) -> tuple[Storage, str]:
    """The storage that holds a directory, and its name there. Raises ValueError for what is no URI."""
    parent, separator, name = uri.rstrip("/").rpartition("/")
    if not separator or "://" not in uri or not name:
        raise ValueError(f"uri: {uri!r}, the URI of a directory expected")
    if urlsplit(uri).scheme == "file":
        name = url2pathname(name)
    return open_storage(parent), name


class LocalStorage:
    """A directory of a local or mounted file system."""

    def __init__(self, root: Path) -> None:
        self._root = root

    @contextmanager
    def held(self) -> Iterator[None]:
        self._root.mkdir(parents=True, exist_ok=True)
        # The kernel lets go of it when the process ends, however it ends; so the file may stay.
        with (self._root / ".lock").open("ab") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InUseError(f"{self._root} is in use") from None
            except OSError as error:
                log.warning(
                    "this file system has no locks: one writer is assumed", path=str(self._root), why=str(error)
                )
            yield

    def recover(self) -> None:
        clear_aside(self._root)

    def write(self, name: str, files: Mapping[str, bytes], last: str) -> str:
        write_directory(self._root / name, files)
        return self.uri(name)

    def read(self, name: str) -> bytes:
        return (self._root / name).read_bytes()

    def put(self, name: str, data: bytes) -> None:
        target = self._root / name
        target.parent.mkdir(parents=True, exist_ok=True)
        with replacing(target) as file:
            file.write(data)

    def names(self, below: str = "") -> list[str]:
        directory = self._root / below
        return sorted(path.name for path in directory.iterdir() if path.name[0] != ".") if directory.is_dir() else []

    def remove(self, name: str, last: str | None = None) -> None:
        path = self._root / name
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)

    def uri(self, name: str) -> str:
        return (self._root / name).resolve().as_uri()


class ObjectStorage:
    """A prefix of an object store, through fsspec. A single object's write is atomic there; nothing else is.

    Whatever the store's client raises comes as OSError.
    """

    def __init__(self, url: str) -> None:
        self._fs, root = fsspec.url_to_fs(url, use_listings_cache=False, skip_instance_cache=True)
        self._root = root.rstrip("/")
        self._url = url.rstrip("/")

    def held(self) -> AbstractContextManager[None]:
        return nullcontext()

    def recover(self) -> None:
        pass  # what was written without its last file is absent, and is replaced when its name is written again

    def write(self, name: str, files: Mapping[str, bytes], last: str) -> str:
        self.remove(name, last)
        try:
            for file in sorted(files, key=lambda file: file == last):
                self.put(f"{name}/{file}", files[file])
        except OSError:
            with suppress(OSError):
                self.remove(name, last)
            raise
        return self.uri(name)

    def read(self, name: str) -> bytes:
        with self._errors():
            data: bytes = self._fs.cat_file(self._path(name))
        return data

    def put(self, name: str, data: bytes) -> None:
        path = self._path(name)
        with self._errors():
            # Object stores have no directories; the file systems among fsspec's (sftp, hdfs, mounted) want them.
            self._fs.makedirs(path.rpartition("/")[0], exist_ok=True)
            self._fs.pipe_file(path, data)

    def names(self, below: str = "") -> list[str]:
        try:
            with self._errors():
                found = self._fs.ls(self._path(below) if below else self._root, detail=False)
        except FileNotFoundError:
            return []
        return sorted({path.rstrip("/").rpartition("/")[2] for path in found} - {""})

    def remove(self, name: str, last: str | None = None) -> None:
        path = self._path(name)
        with self._errors():
            if last is not None and self._fs.exists(f"{path}/{last}"):
                self._fs.rm_file(f"{path}/{last}")
            if self._fs.exists(path):
                self._fs.rm(path, recursive=True)

    def uri(self, name: str) -> str:
        return f"{self._url}/{name}"

    @contextmanager
    def _errors(self) -> Iterator[None]:
        # Clients raise errors of their own (no credentials, no connection): callers are to meet OSError alone.
        try:
            yield
        except OSError:
            raise
        except Exception as error:
            raise OSError(errno.EIO, f"{self._url}: {error}") from error

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"
