"""noida-db: a Kafka-compatible broker in one small binary from PyPI, for the demo where there is no Java.

Not for anything whose correctness matters. Seen there: it never expires dead group members; a commit during a rebalance
leaves ghosts that block the group; SIGKILL loses acknowledged records; its state is one JSON file, to be kept to tens
of MB. So each run begins with empty data.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import ClassVar

from streams.broker.local import LocalBroker
from streams.broker.process import LOOPBACK, BrokerError


def find_noida() -> Path:
    """The binary: inside the installed wheel, else ``noida-db`` on PATH. Raises BrokerError when there is none."""
    spec = importlib.util.find_spec("noida_db")
    if spec is not None and spec.origin is not None:
        binary = Path(spec.origin).with_name("noida-db.exe" if os.name == "nt" else "noida-db")
        if binary.is_file():
            return binary
    on_path = shutil.which("noida-db")
    if on_path is None:
        raise BrokerError("noida-db is not installed: pip install 'gpl-streams[demo]', or use another broker")
    return Path(on_path)


def noida_version() -> str:
    """Of the installed package; empty when the binary came from elsewhere."""
    try:
        return version("noida-db")
    except PackageNotFoundError:
        return ""


class NoidaBroker(LocalBroker):
    """noida-db's Kafka service, in the foreground. Every object begins with empty data; a restart of it keeps them."""

    kind: ClassVar[str] = "noida"

    def __init__(self, directory: Path, port: int = 0) -> None:
        super().__init__(directory, port)
        self._begun = False

    def _prepare(self) -> list[str]:
        binary = find_noida()
        if not os.access(binary, os.X_OK):
            binary.chmod(0o755)  # some installers drop the bit
        data = self.directory / "noida"
        if not self._begun:
            shutil.rmtree(data, ignore_errors=True)
            self._begun = True
        command = [str(binary), "start", "--only", "kafka", "--host", LOOPBACK]
        return [*command, "--kafka-port", str(self._ports[0]), "--data-dir", str(data)]
