"""Directories and files that are whole or absent: written aside, fsynced, renamed.

A reader, also one that comes after a kill or a power cut, sees the old state or the new one, never a part of it.
One writer per parent directory is assumed; single files may have several.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

_ASIDE = ".aside-"
_REPLACED = ".aside-replaced-"


def sha256_hex(data: bytes) -> str:
    """Checksum as manifests carry it: lower-case hex of SHA-256."""
    return hashlib.sha256(data).hexdigest()


def sync_directory(directory: Path) -> None:
    """Make renames and new entries in a directory survive a power cut."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_directory(target: Path, files: Mapping[str, bytes]) -> None:
    """Put a directory with exactly these files at ``target``, replacing one of that name.

    Raises OSError when the disk does; ``target`` is then as it was.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_name(_ASIDE + target.name)
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir()
        for name, data in files.items():
            with (aside / name).open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        sync_directory(aside)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)  # of a full disk not even more
        raise
    replaced = target.with_name(_REPLACED + target.name)
    if target.exists():
        target.rename(replaced)  # a kill from here on leaves one of the two, see `clear_aside`
    aside.rename(target)
    sync_directory(target.parent)
    shutil.rmtree(replaced, ignore_errors=True)


@contextmanager
def replacing(target: Path) -> Iterator[BinaryIO]:
    """A new file to write, which takes the place of ``target`` at the end; after an error ``target`` is as it was.

    Its name aside is no other writer's, so of several the last has its say, and none a part of another's.
    """
    aside = target.with_name(f"{_ASIDE}{uuid.uuid4().hex}-{target.name}")
    try:
        with aside.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        aside.replace(target)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    sync_directory(target.parent)


def clear_aside(parent: Path) -> None:
    """Remove what a killed writer left half-written under ``parent``, and put back what it was about to replace."""
    for path in parent.glob(f"{_REPLACED}*"):
        target = path.with_name(path.name.removeprefix(_REPLACED))
        if not target.exists():
            path.rename(target)
    for path in (*parent.glob(f"{_ASIDE}*"), *parent.glob(f"*/{_ASIDE}*")):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
