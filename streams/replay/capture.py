"""A range of the log as files that replay anywhere, without a broker and without the artefacts.

One gzip file of JSON lines a topic and partition, each line an entry: its offset, Kafka time, key, headers, and its
value as it was, byte for byte. ``manifest.json`` holds the selection, the settings, the versions, and checksums.
What only moved the watermark (other users, times around the range) is kept as its event time alone.
"""

from __future__ import annotations

import base64
import gzip
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import msgspec

from streams.durable import sha256_hex, sync_directory
from streams.frame import Frame
from streams.replay.log import Entry, LogError, Span
from streams.replay.select import Selection
from streams.settings import LabelSettings, Settings

FORMAT = 1
MANIFEST = "manifest.json"
SECTIONS = ("labels", "profiles", "generator", "trainer")
"""Settings that a capture carries: those that replay works with."""
_REACH = ("window_seconds", "allowed_lateness_seconds", "retention_seconds", "max_ahead_seconds")
"""Label settings that say how far around its requests a capture must reach."""


class _Line(msgspec.Struct, omit_defaults=True, forbid_unknown_fields=True):
    """An entry. ``value``: the value where it is a JSON object on one line, ``value_base64`` any other. ``headers``: in
    their order, name and base64, null for one without a value; older captures have an object of them."""

    offset: int
    kafka_ms: int
    missing: int = 0
    event_ms: int | None = None
    key: str | None = None
    key_base64: str | None = None
    headers: list[tuple[str, str | None]] | dict[str, str] = []
    value: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    value_base64: str | None = None


class File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One file: the partition's offsets in the log that was captured, how many entries are kept, SHA-256."""

    topic: str
    partition: int
    start: int
    end: int
    entries: int
    sha256: str


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """About a capture. Times are event milliseconds; ``code``: version of the labelling code that captured."""

    format: int = FORMAT
    from_ms: int
    to_ms: int
    user: str | None
    recalls: dict[str, list[tuple[int, int]]] | None
    feedback: dict[str, list[tuple[int, int]]] | None
    frame: dict[str, Any]
    code: str
    config: str
    settings: dict[str, Any]
    requests: int
    files: dict[str, File]


class CaptureWriter:
    """Writes a capture: whole once ``finish`` has returned, absent before. Raises FileExistsError for an old one."""

    def __init__(self, directory: Path) -> None:
        if directory.exists():
            raise FileExistsError(f"{directory} exists; a capture is written to a new directory")
        self._directory = directory
        self._aside = directory.with_name(f".aside-{directory.name}")
        shutil.rmtree(self._aside, ignore_errors=True)
        self._aside.mkdir(parents=True)
        self._files: dict[str, File] = {}
        self._open: dict[tuple[str, int], tuple[IO[bytes], list[int], Span]] = {}

    def add(self, entry: Entry, span: Span) -> None:
        """Keep one entry; those of a partition come in order. ``span``: of its partition in the log."""
        self.open(entry.topic, entry.partition, span)
        out, count, _ = self._open[entry.topic, entry.partition]
        out.write(msgspec.json.encode(_line(entry)) + b"\n")
        count[0] += 1

    def open(self, topic: str, partition: int, span: Span) -> None:
        """Say that a partition is part of the capture, whether or not an entry of it is kept."""
        if (topic, partition) not in self._open:
            path = self._aside / f"{topic}-{partition}.jsonl.gz"
            # No name and no time of day in the file: equal entries give equal bytes.
            out = gzip.GzipFile(filename="", mode="wb", fileobj=path.open("wb"), mtime=0, compresslevel=6)
            self._open[topic, partition] = (out, [0], span)  # type: ignore[assignment]

    def finish(self, **about: Any) -> Manifest:
        """Write the manifest (``about``: its other fields) and put the capture in its place."""
        for (topic, partition), (out, count, span) in sorted(self._open.items()):
            raw: IO[bytes] = out.fileobj  # type: ignore[attr-defined]
            out.close()
            raw.close()
            name = f"{topic}-{partition}.jsonl.gz"
            checksum = sha256_hex((self._aside / name).read_bytes())
            self._files[name] = File(topic, partition, span.start, span.end, count[0], checksum)
        manifest = Manifest(files=self._files, **about)
        text = msgspec.json.format(msgspec.json.encode(manifest), indent=2)
        (self._aside / MANIFEST).write_bytes(text + b"\n")
        sync_directory(self._aside)
        self._aside.rename(self._directory)
        sync_directory(self._directory.parent)
        return manifest

    def discard(self) -> None:
        """Leave nothing behind."""
        shutil.rmtree(self._aside, ignore_errors=True)


class CaptureLog:
    """A capture, to be replayed. Raises FileNotFoundError when there is none, LogError when it is damaged."""

    def __init__(self, directory: Path) -> None:
        path = directory / MANIFEST
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no capture there; `gpl capture` makes one")
        try:
            self.manifest = msgspec.json.decode(path.read_bytes(), type=Manifest)
            self.frame = Frame(**self.manifest.frame)
        except (msgspec.DecodeError, TypeError) as error:
            raise LogError(f"{path}: not the manifest of a capture: {error}") from error
        if self.manifest.format != FORMAT:
            raise LogError(f"{path}: format {self.manifest.format}, this version reads {FORMAT}")
        self._directory = directory
        for name, file in self.manifest.files.items():
            try:
                found = sha256_hex((directory / name).read_bytes())
            except OSError as error:
                raise LogError(f"{directory / name}: {error.strerror}") from error
            if found != file.sha256:
                raise LogError(f"{directory / name} is damaged: its checksum is not that of the manifest")

    def settings(self) -> Settings:
        """The settings that were in force where it was captured."""
        return Settings(**self.manifest.settings)

    def check(self, labels: LabelSettings) -> None:
        """Raises LogError for settings under which labels may depend on more than the capture holds."""
        kept = self.settings().labels
        for name in _REACH:
            asked, held = getattr(labels, name), getattr(kept, name)
            if asked > held:
                raise LogError(
                    f"labels.{name}: {asked:g} is asked for, and {self._directory} was captured under {held:g}: what "
                    "more is needed is not in it; replay from the broker, or capture under the larger setting"
                )

    def selection(self) -> Selection:
        """The requests that it was made of."""
        said = self.manifest
        return Selection(said.from_ms, said.to_ms, said.user, _ranges(said.recalls), _ranges(said.feedback))

    def partitions(self, topic: str) -> list[int]:
        return sorted(file.partition for file in self.manifest.files.values() if file.topic == topic)

    def span(self, topic: str, partition: int) -> Span:
        file = self.manifest.files.get(f"{topic}-{partition}.jsonl.gz")
        if file is None:
            raise LogError(f"partition {partition} of {topic} is not in the capture {self._directory}")
        return Span(file.start, file.end)

    def offset_at(self, topic: str, partition: int, kafka_ms: int) -> int:
        """Where reading for a time must begin: at the beginning, for what is kept is what the range needs."""
        return self.span(topic, partition).start

    def read(self, topic: str, partition: int, start: int | None = None, end: int | None = None) -> Iterator[Entry]:
        self.span(topic, partition)
        decoder = msgspec.json.Decoder(_Line)
        with gzip.open(self._directory / f"{topic}-{partition}.jsonl.gz", "rb") as lines:
            for line in lines:
                entry = _entry(topic, partition, decoder.decode(line))
                if end is not None and entry.offset >= end:
                    return
                if start is None or entry.offset >= start:
                    yield entry


def _ranges(said: dict[str, list[tuple[int, int]]] | None) -> dict[int, list[tuple[int, int]]] | None:
    return None if said is None else {int(partition): some for partition, some in said.items()}


def _line(entry: Entry) -> _Line:
    line = _Line(entry.offset, entry.kafka_ms, entry.missing, entry.event_ms)
    if entry.key is not None:
        try:
            line.key = entry.key.decode()
        except UnicodeDecodeError:
            line.key_base64 = base64.b64encode(entry.key).decode()
    line.headers = [(name, None if data is None else base64.b64encode(data).decode()) for name, data in entry.headers]
    if entry.value is not None:
        if _plain(entry.value):
            line.value = msgspec.Raw(entry.value)
        else:
            line.value_base64 = base64.b64encode(entry.value).decode()
    return line


def _plain(value: bytes) -> bool:
    """Whether a value stands in a JSON line as it is, and comes out of it as it was."""
    if not (value.startswith(b"{") and value.endswith(b"}")) or b"\n" in value or b"\r" in value:
        return False
    try:
        value.decode()
        msgspec.json.decode(value)
    except (UnicodeDecodeError, RecursionError, msgspec.DecodeError):
        return False
    return True


def _entry(topic: str, partition: int, line: _Line) -> Entry:
    key = None if line.key is None else line.key.encode()
    if line.key_base64 is not None:
        key = base64.b64decode(line.key_base64)
    value = None if isinstance(line.value, msgspec.UnsetType) else bytes(line.value)
    if line.value_base64 is not None:
        value = base64.b64decode(line.value_base64)
    said = line.headers.items() if isinstance(line.headers, dict) else line.headers
    headers = tuple((name, None if data is None else base64.b64decode(data)) for name, data in said)
    return Entry(topic, partition, line.offset, line.kafka_ms, key, value, headers, line.missing, line.event_ms)
