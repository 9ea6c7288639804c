"""The neutral format: a directory that `gpl evaluate --data` reads and `gpl datasets convert` writes.

``docs/evaluation.md`` documents it. ``items.jsonl``, ``recalls.jsonl`` and ``feedback.jsonl`` are those of
``docs/data-format.md``; ``events.csv`` holds purchases in order, ``truth.csv`` the relevance of pairs.
"""

from __future__ import annotations

import bisect
import codecs
import csv
import gzip
import io
import json
import math
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np

from gpl.catalogue import ItemContent
from gpl.evaluation.dataset import DataError, Dataset, Events, Ragged, Requests, Truth

META = "dataset.json"
_LARGEST = float(np.finfo(np.float32).max)
_ALIASES = {"user": "user_id", "item": "item_id", "rating": "relevance", "label": "relevance"}


class _Item(msgspec.Struct):
    item_id: str
    text: str = ""
    embedding: list[float] | None = None
    attributes: dict[str, Any] | None = None


class _Recall(msgspec.Struct):
    request_id: str
    user_id: str
    ts: int
    candidates: list[str]


class _Feedback(msgspec.Struct):
    event_id: str
    user_id: str
    item_id: str
    ts: int
    kind: str
    request_id: str | None = None


class _Meta(msgspec.Struct, forbid_unknown_fields=True):
    name: str | None = None
    unlisted: str = "unknown"
    source: str | None = None


S = TypeVar("S", bound=msgspec.Struct)


class Ids:
    """Ids to numbers 0, 1, ... in order of first appearance."""

    def __init__(self, ids: Iterable[str] = ()) -> None:
        self._number: dict[str, int] = {}
        for i in ids:
            self.add(i)

    def add(self, id_: str) -> int:
        return self._number.setdefault(id_, len(self._number))

    def get(self, id_: str) -> int | None:
        return self._number.get(id_)

    def __len__(self) -> int:
        return len(self._number)

    def to_list(self) -> list[str]:
        return list(self._number)


def load(directory: Path, truth: Path | None = None) -> Dataset:
    """Read a directory; ``truth`` takes the place of its own ``truth.csv``.

    Raises FileNotFoundError for a directory or file that is missing and DataError for what cannot be used.
    Feedback and truth of items that are not in ``items.jsonl`` are left out.
    """
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory}: no such directory")
    if truth is not None and not truth.exists():
        raise FileNotFoundError(f"--truth {truth}: no such file, expected CSV or JSONL of user, item, relevance")
    meta = _meta(directory / META)
    name = meta.name or directory.resolve().name
    items: list[ItemContent] = []
    popularity: list[float] = []
    item_ids, users = Ids(), Ids()
    for number, record in _records(directory / "items.jsonl", _Item):
        if item_ids.get(record.item_id) is not None:
            raise DataError(f"items.jsonl:{number}: item_id {record.item_id!r} stands twice")
        item_ids.add(record.item_id)
        items.append(ItemContent(record.item_id, record.text, record.embedding))
        popularity.append(_popularity(number, record))
    log = None
    if (directory / "recalls.jsonl").is_file() or (directory / "feedback.jsonl").is_file():
        log = _log(directory, item_ids, users)
    found = [path for path in (directory / "events.csv", directory / "events.csv.gz") if path.is_file()]
    events = _events(found[0], item_ids, users) if found else None
    own = [p for p in (directory / f"truth{s}" for s in (".csv", ".csv.gz", ".jsonl")) if p.is_file()]
    truth_file = truth or (own[0] if own else None)
    known = None if truth_file is None else read_truth(truth_file, item_ids, users, meta.unlisted == "irrelevant")
    return Dataset(
        name,
        items,
        users.to_list(),
        known,
        events,
        log,
        np.array(popularity, dtype=np.float32) if not np.isnan(popularity).any() else None,
    )


def read_truth(path: Path, items: Ids, users: Ids, every_cell: bool) -> Truth:
    """Pairs of a CSV or JSONL file with user_id (or user), item_id (or item) and relevance."""
    pairs: dict[tuple[int, int], float] = {}
    for number, row in _table(path, ("user_id", "item_id", "relevance")):
        item = items.get(row["item_id"])
        try:
            relevance = float(row["relevance"])
        except ValueError:
            relevance = float("nan")
        if not np.isfinite(relevance):
            raise DataError(f"{path.name}:{number}: relevance {row['relevance']!r}, expected a number")
        if item is None:
            continue
        pair = (users.add(row["user_id"]), item)
        if pair in pairs:
            raise DataError(
                f"{path.name}:{number}: user_id {row['user_id']!r} and item_id {row['item_id']!r} stand twice"
            )
        pairs[pair] = relevance
    if not any(value > 0 for value in pairs.values()):
        raise DataError(f"{path.name}: no pair of a known item with relevance above 0")
    user, item_of = np.array(list(pairs), dtype=np.int64).T
    return Truth(user, item_of, np.array(list(pairs.values()), dtype=np.float32), every_cell)


def save(dataset: Dataset, directory: Path, source: str) -> None:
    """Write ``dataset`` so that :func:`load` gives it back. Raises FileExistsError for a directory with files in it.

    Where every pair is known, only what is relevant is written, and one irrelevant pair of a user to whom nothing is.
    """
    directory.mkdir(parents=True, exist_ok=True)
    if any(directory.iterdir()):
        raise FileExistsError(f"{directory}: not empty")
    every = dataset.truth is not None and dataset.truth.every_cell
    meta = {"name": dataset.name, "unlisted": "irrelevant" if every else "unknown", "source": source}
    (directory / META).write_text(json.dumps(meta, indent=2) + "\n")
    _write_jsonl(directory / "items.jsonl", (_item(dataset, at) for at in range(len(dataset.items))))
    if dataset.events is not None:
        e = dataset.events
        rows = zip(e.user.tolist(), e.item.tolist(), range(len(e.user)), e.session.tolist(), strict=True)
        header = ("user_id", "item_id", "order", "session")
        _write_csv(directory / "events.csv", header, ((*_ids(dataset, u, i), o, s) for u, i, o, s in rows))
    if dataset.truth is not None:
        t = dataset.truth
        pairs = list(zip(t.user.tolist(), t.item.tolist(), t.relevance.tolist(), strict=True))
        if every:
            pairs = [pair for pair in pairs if pair[2] > 0]
            pairs += [(user, 0, 0.0) for user in set(range(len(dataset.users))) - {user for user, _, _ in pairs}]
            pairs.sort(key=lambda pair: pair[0])  # users are read back in their order
        kept = ((*_ids(dataset, u, i), f"{r:g}") for u, i, r in pairs)
        _write_csv(directory / "truth.csv", ("user_id", "item_id", "relevance"), kept)
    if dataset.log is not None:
        _save_log(dataset, dataset.log, directory)


def _save_log(dataset: Dataset, log: Requests, directory: Path) -> None:
    ids = [item.item_id for item in dataset.items]
    recalls, feedback = [], []
    for r in range(len(log)):
        user, ts = dataset.users[log.user[r]], 1000 * (r + 1)
        shown = log.exposed[r].tolist()
        candidates = [ids[i] for i in [*shown, *log.recalled[r].tolist()]]
        recalls.append({"request_id": f"r{r}", "user_id": user, "ts": ts, "candidates": candidates})
        start = int(log.exposed.offsets[r])
        for at, item in enumerate(shown):
            kind = "click" if log.clicked[start + at] else "impression"
            row = {"event_id": f"e{start + at}", "request_id": f"r{r}", "user_id": user, "item_id": ids[item]}
            feedback.append({**row, "ts": ts + 1 + at, "kind": kind})
    _write_jsonl(directory / "recalls.jsonl", recalls)
    _write_jsonl(directory / "feedback.jsonl", feedback)


def _log(directory: Path, items: Ids, users: Ids) -> Requests:
    """Requests by time. Feedback without a request joins the user's latest recall that holds the item."""
    recalls = sorted((r for _, r in _records(directory / "recalls.jsonl", _Recall)), key=lambda r: (r.ts, r.request_id))
    row_of = {recall.request_id: row for row, recall in enumerate(recalls)}
    if len(row_of) < len(recalls):
        raise DataError("recalls.jsonl: a request_id stands twice")
    holding: defaultdict[tuple[str, str], list[int]] = defaultdict(list)
    for row, recall in enumerate(recalls):
        for candidate in recall.candidates:
            holding[recall.user_id, candidate].append(row)
    shown: list[dict[int, bool]] = [{} for _ in recalls]
    feedback = sorted(
        _records(directory / "feedback.jsonl", _Feedback), key=lambda line: (line[1].ts, line[1].event_id)
    )
    for number, event in feedback:
        if event.kind not in ("impression", "click"):
            raise DataError(f"feedback.jsonl:{number}: kind {event.kind!r}, expected 'impression' or 'click'")
        item = items.get(event.item_id)
        at = row_of.get(event.request_id) if event.request_id is not None else None
        if event.request_id is None:
            mine = holding.get((event.user_id, event.item_id), [])
            before = bisect.bisect_right(mine, event.ts, key=lambda row: recalls[row].ts)
            at = mine[before - 1] if before else None
        if at is None or item is None:
            continue
        if recalls[at].user_id != event.user_id:
            raise DataError(f"feedback.jsonl:{number}: user_id {event.user_id!r}, its request has another user")
        shown[at][item] = shown[at].get(item, False) or event.kind == "click"
    recalled = []
    for recall, seen in zip(recalls, shown, strict=True):
        known = dict.fromkeys(n for c in recall.candidates if (n := items.get(c)) is not None)
        recalled.append([item for item in known if item not in seen])
    return Requests(
        np.array([users.add(recall.user_id) for recall in recalls], dtype=np.int64),
        Ragged.of(list(seen) for seen in shown),
        np.array([clicked for seen in shown for clicked in seen.values()], dtype=bool),
        Ragged.of(recalled),
    )


def _events(path: Path, items: Ids, users: Ids) -> Events:
    """Rows with user_id, item_id and order (any number that grows with time); ``session`` where there is one."""
    rows: list[tuple[int, float, int, str]] = []
    for number, row in _table(path, ("user_id", "item_id", "order")):
        item = items.get(row["item_id"])
        try:
            order = float(row["order"])
        except ValueError:
            order = math.nan
        if not math.isfinite(order):
            raise DataError(f"{path.name}:{number}: order {row['order']!r}, expected a number")
        if item is not None:
            rows.append((users.add(row["user_id"]), order, item, row.get("session") or f"{order:.17g}"))
    if not rows:
        raise DataError(f"{path.name}: no event of a known item")
    rows.sort(key=lambda row: row[:2])
    sessions = Ids()
    session = [sessions.add(f"{user} {key}") for user, _, _, key in rows]
    user, item_of = np.array([(row[0], row[2]) for row in rows], dtype=np.int64).T
    return Events(user, item_of, np.array(session, dtype=np.int64))


def _popularity(number: int, record: _Item) -> float:
    value = (record.attributes or {}).get("popularity", float("nan"))
    if not isinstance(value, int | float) or value < 0 or value > _LARGEST:
        wanted = "expected a number of at least 0 that fits a 32-bit float"
        raise DataError(f"items.jsonl:{number}: attributes.popularity {value!r}, {wanted}")
    return float(value)


def _item(dataset: Dataset, at: int) -> dict[str, Any]:
    item = dataset.items[at]
    record: dict[str, Any] = {"item_id": item.item_id, "text": item.text}
    if item.embedding is not None:
        record["embedding"] = list(item.embedding)
    if dataset.popularity is not None:
        record["attributes"] = {"popularity": float(dataset.popularity[at])}
    return record


def _ids(dataset: Dataset, user: int, item: int) -> tuple[str, str]:
    return dataset.users[user], dataset.items[item].item_id


def _meta(path: Path) -> _Meta:
    if not path.is_file():
        return _Meta()
    try:
        meta = msgspec.json.decode(path.read_bytes(), type=_Meta)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path.name}: {error}") from None
    if meta.unlisted not in ("unknown", "irrelevant"):
        raise DataError(f"{path.name}: unlisted {meta.unlisted!r}, expected 'unknown' or 'irrelevant'")
    return meta


def open_text(path: Path, encoding: str = "utf-8-sig") -> io.TextIOBase:
    """A text file, by default UTF-8 with or without a byte order mark, gzipped where its name ends in .gz."""
    if path.suffix == ".gz":
        return io.TextIOWrapper(gzip.open(path), encoding=encoding, newline="")
    return path.open(encoding=encoding, newline="")


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """While a file is read: what is wrong with it as a whole is a DataError, but for one that is missing."""
    try:
        yield
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{path}: no such file; docs/evaluation.md tells what a data set's directory holds"
        ) from None
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise DataError(f"{path}: {getattr(error, 'strerror', None) or error}") from None


def _records(path: Path, kind: type[S]) -> Iterator[tuple[int, S]]:
    decode = msgspec.json.Decoder(kind).decode
    with _readable(path), path.open("rb") as handle:
        for number, line in enumerate(handle, 1):
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if line.strip():
                try:
                    yield number, decode(line)
                except (msgspec.DecodeError, UnicodeDecodeError) as error:
                    raise DataError(f"{path.name}:{number}: {error}") from None


def _table(path: Path, columns: tuple[str, ...]) -> Iterator[tuple[int, Mapping[str, str]]]:
    """Rows of a CSV (with header) or JSONL file, with all of ``columns``, as text. Numbers are line numbers."""
    with _readable(path), open_text(path) as handle:
        if ".jsonl" in path.suffixes:
            for number, line in enumerate(handle, 1):
                if line.strip():
                    try:
                        found = {str(k): str(v) for k, v in json.loads(line).items()}
                    except (ValueError, AttributeError):
                        raise DataError(f"{path.name}:{number}: not a JSON object") from None
                    yield number, _named(path, number, found, columns)
        else:
            rows = csv.DictReader(handle)
            try:
                for row in rows:
                    number = rows.reader.line_num
                    yield number, _named(path, number, {k: v or "" for k, v in row.items() if k}, columns)
            except csv.Error as error:
                raise DataError(f"{path.name}:{rows.reader.line_num}: {error}") from None


def _named(path: Path, number: int, row: dict[str, str], columns: tuple[str, ...]) -> dict[str, str]:
    renamed = {_ALIASES[k] if k in _ALIASES and _ALIASES[k] not in row else k: v for k, v in row.items()}
    for column in columns:
        if not renamed.get(column):
            raise DataError(f"{path.name}:{number}: {column} is missing")
    return renamed


def _write_jsonl(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    with path.open("w", encoding="utf-8") as handle:
        for record in records:
            handle.write(json.dumps(record, ensure_ascii=False) + "\n")


def _write_csv(path: Path, header: tuple[str, ...], rows: Iterable[tuple[Any, ...]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as handle:
        writer = csv.writer(handle, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)
