"""MIND: news impressions with clicks (Wu et al. 2020). ``behaviors.tsv`` and ``news.tsv``, without header.

There is no truth on what was not exposed, so users are split: impressions of one half are the log, those of the other
half are the truth, on the pairs that were shown. Titles of some news are missing; such items have no content.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import numpy as np

from gpl.catalogue import ItemContent
from gpl.evaluation.dataset import DataError, Dataset, Events, Ragged, Requests, Truth
from gpl.evaluation.neutral import Ids
from gpl.evaluation.sources.table import find, opened


def read(source: Path) -> Dataset:
    """A user's click history comes as events before the log; items are the news that were shown or have a title."""
    texts = {row[0]: f"{row[3]}. {row[4]}".strip(". ") for row in _rows(find(source, "news.tsv"), 5)}
    path = find(source, "behaviors.tsv")
    impressions = sorted(_impressions(path), key=lambda row: row[0])
    items, users = Ids(), Ids()
    history: dict[int, list[str]] = {}
    log: list[tuple[int, dict[int, bool]]] = []
    truth: dict[tuple[int, int], float] = {}
    for _, user_id, past, shown in impressions:
        user = users.add(user_id)
        history.setdefault(user, past)
        seen: dict[int, bool] = {}
        for pair in shown:
            item, _, clicked = pair.rpartition("-")
            if not item or clicked not in ("0", "1"):
                raise DataError(f"{path.name}: impression {pair!r}, expected ITEM-0 or ITEM-1")
            seen[items.add(item)] = clicked == "1"
        if _held_out(user_id):
            for at, click in seen.items():
                truth[user, at] = max(float(click), truth.get((user, at), 0.0))
        else:
            log.append((user, seen))
    if not any(truth.values()):
        raise DataError(f"{path.name}: no click of the half of the users who are held out")
    if not log:
        raise DataError(f"{path.name}: no impression of the half of the users who are the log")
    for titled in texts:
        items.add(titled)
    ids = items.to_list()
    user_of, item_of = np.array(list(truth), dtype=np.int64).reshape(-1, 2).T
    # Read news that were neither shown here nor have a title would be nothing but ids.
    known = ((user, items.get(news)) for user, past in history.items() for news in dict.fromkeys(past))
    events = [(user, item) for user, item in known if item is not None]
    event_user, event_item = np.array(events, dtype=np.int64).reshape(-1, 2).T
    return Dataset(
        "mind",
        [ItemContent(item, texts.get(item, "")) for item in ids],
        users.to_list(),
        Truth(user_of, item_of, np.array(list(truth.values()), dtype=np.float32), every_cell=False),
        Events(event_user, event_item, np.arange(len(events))),
        Requests(
            np.array([user for user, _ in log], dtype=np.int64),
            Ragged.of(list(seen) for _, seen in log),
            np.array([click for _, seen in log for click in seen.values()], dtype=bool),
            Ragged.of([] for _ in log),
        ),
    )


def _held_out(user_id: str) -> bool:
    return hashlib.sha256(user_id.encode()).digest()[0] % 2 == 1


def _impressions(path: Path) -> Iterator[tuple[datetime, str, list[str], list[str]]]:
    for row in _rows(path, 5):
        try:
            at = datetime.strptime(row[2], "%m/%d/%Y %I:%M:%S %p")
        except ValueError as error:
            raise DataError(f"{path.name}: time {row[2]!r}: {error}") from None
        yield at, row[1], row[3].split(), row[4].split()


def _rows(path: Path, columns: int) -> Iterator[list[str]]:
    with opened(path) as handle:
        for number, line in enumerate(handle, 1):
            row = line.rstrip("\r\n").split("\t")
            if len(row) < columns:
                raise DataError(f"{path.name}:{number}: {len(row)} columns, expected at least {columns}")
            yield row
