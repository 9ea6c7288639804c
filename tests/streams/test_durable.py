"""Single files that are the old one or the new one, whoever writes and is killed."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from streams.durable import replacing
from streams.storage import open_storage


def test_of_two_writers_at_once_the_last_has_its_say(tmp_path: Path) -> None:
    target = tmp_path / "pin.json"
    with replacing(target) as one:
        one.write(b"a long")
        with replacing(target) as other:
            other.write(b"short")
        assert target.read_bytes() == b"short"
        one.write(b" one")
    assert target.read_bytes() == b"a long one"
    assert list(tmp_path.iterdir()) == [target]


def test_an_error_leaves_what_was_there(tmp_path: Path) -> None:
    target = tmp_path / "file"
    target.write_bytes(b"old")
    with pytest.raises(ZeroDivisionError), replacing(target) as file:
        file.write(b"new")
        raise ZeroDivisionError
    assert target.read_bytes() == b"old" and list(tmp_path.iterdir()) == [target]


def test_a_directory_that_cannot_be_written_leaves_nothing_on_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = open_storage(tmp_path)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        storage.write("v1", {"weights": b"12", "manifest.json": b"{}"}, last="manifest.json")
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_writer_left_is_cleared(tmp_path: Path) -> None:
    (tmp_path / "journal").mkdir()
    killed = [replacing(tmp_path / name) for name in ("pin.json", "journal/1.json")]
    for writing in killed:
        writing.__enter__()
    storage = open_storage(tmp_path)
    assert len(list(tmp_path.rglob(".aside-*"))) == 2 and storage.names() == ["journal"]
    storage.recover()
    assert [path.name for path in tmp_path.rglob("*")] == ["journal"]
