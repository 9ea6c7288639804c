"""Which code labels: a hash of its source, so that replay can tell a change of code from a change of data."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

import gpl.labels
import streams.labels


@functools.cache
def code_version() -> str:
    """12 hex digits over the source files of ``gpl.labels`` and ``streams.labels``: what says what a label is."""
    said = hashlib.sha256()
    for package in (gpl.labels, streams.labels):
        for path in sorted(Path(package.__path__[0]).glob("*.py")):
            said.update(f"{package.__name__}/{path.name}\n".encode())
            said.update(path.read_bytes())
    return said.hexdigest()[:12]
