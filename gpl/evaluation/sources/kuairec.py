"""KuaiRec: short videos with (nearly) every user x video cell observed (Gao et al. 2022).

As published (the folder with the CSV files, or the one around its ``data``): ``small_matrix.csv``
user_id,video_id,watch_ratio, whose cells that are missing or below 2 are negative; ``big_matrix.csv``, the biased log,
of which the rows of other users are taken; ``kuairec_caption_category.csv``.

Rearranged: ``small_positives.csv`` user_id,video_id lists watch ratios of at least 2, all other cells of
``small_users`` x ``small_items`` are negative; ``big_positives_train.csv`` is the biased log; ``videos.csv``.

The log gives popularity, by watch ratios of at least 2; captions, tags and category names (Chinese) are the content.
"""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from gpl.catalogue import ItemContent
from gpl.evaluation.dataset import DataError, Dataset, Truth
from gpl.evaluation.neutral import Ids
from gpl.evaluation.sources.table import find, number, opened, optional, rows

RELEVANT_FROM = 2.0
_NOTHING = ("", "UNKNOWN", "[]", "nan")
_CATEGORIES = ("first_level_category_name", "second_level_category_name", "third_level_category_name")
# A caption with commas, and perhaps quotes, and the tags after it.
_CAPTION_AND_TAGS = re.compile(r'(?P<caption>.*),"?(?P<tags>\[[^\[]*\])"?')


def read(source: Path) -> Dataset:
    if optional(source, "small_items.csv") is None and optional(source, *_names("small_matrix.csv")) is not None:
        return _published(source)
    items = _ids(find(source, "small_items.csv", *_names("small_matrix.csv")), "video_id")
    users = _ids(find(source, "small_users.csv"), "user_id")
    videos = {row["video_id"]: row for row in rows(find(source, "videos.csv"), "video_id", "caption", "topic_tag")}
    path = find(source, "small_positives.csv")
    pairs = {
        (user, item)
        for row in rows(path, "user_id", "video_id")
        if (user := users.get(row["user_id"])) is not None and (item := items.get(row["video_id"])) is not None
    }
    views = Counter(row["video_id"] for row in rows(find(source, "big_positives_train.csv"), "user_id", "video_id"))
    return _dataset(path, items, users, pairs, videos, views)


def _published(source: Path) -> Dataset:
    path, log = find(source, *_names("small_matrix.csv")), find(source, *_names("big_matrix.csv"))
    videos = {row["video_id"]: row for row in _videos(find(source, *_names("kuairec_caption_category.csv")))}
    items, users = Ids(), Ids()
    pairs = set()
    for user_id, video_id, relevant in _watched(path):
        pair = users.add(user_id), items.add(video_id)
        if relevant:
            pairs.add(pair)
    views = Counter(video for user, video, relevant in _watched(log) if relevant and users.get(user) is None)
    return _dataset(path, items, users, pairs, videos, views)


def _dataset(
    path: Path,
    items: Ids,
    users: Ids,
    pairs: set[tuple[int, int]],
    videos: Mapping[str, Mapping[str, str]],
    views: Mapping[str, int],
) -> Dataset:
    if not pairs:
        raise DataError(f"{path.name}: no watch ratio of at least {RELEVANT_FROM:g} of a known user and video")
    user, item = np.array(sorted(pairs), dtype=np.int64).T
    return Dataset(
        "kuairec",
        [ItemContent(video, _text(videos.get(video, {}))) for video in items.to_list()],
        users.to_list(),
        Truth(user, item, np.ones(len(pairs), dtype=np.float32), every_cell=True),
        popularity=np.array([views.get(video, 0) for video in items.to_list()], dtype=np.float32),
    )


def _names(name: str) -> tuple[str, str]:
    return name, f"data/{name}"


def _ids(path: Path, column: str) -> Ids:
    found = Ids()
    for row in rows(path, column):
        if found.get(row[column]) is not None:
            raise DataError(f"{path.name}: {column} {row[column]!r} stands twice")
        found.add(row[column])
    return found


def _watched(path: Path) -> Iterator[tuple[str, str, bool]]:
    for row in rows(path, "user_id", "video_id", "watch_ratio"):
        yield row["user_id"], row["video_id"], number(path, "watch_ratio", row["watch_ratio"]) >= RELEVANT_FROM


def _videos(path: Path) -> Iterator[dict[str, str]]:
    """Rows of the captions, which have line ends, commas and single quotes that CSV would not have.

    A row is therefore what begins with a number and a comma, and is parsed alone, so that no quote swallows the next.
    A row that cannot be told apart is left out: its video has no content.
    """
    with opened(path) as handle:
        lines = handle.read().replace("\r", "\n").split("\n")
    columns = lines[0].split(",")
    for column in ("video_id", "caption", "topic_tag", *_CATEGORIES):
        if column not in columns:
            raise DataError(f"{path.name}: column {column!r} is missing, found {columns}")
    records: list[str] = []
    for line in lines[1:]:
        if re.match(r'"?\d+"?,', line):
            records.append(line)
        elif records and line:
            records[-1] += f" {line}"
    before, after = columns.index("caption"), len(columns) - columns.index("topic_tag") - 1
    for record in records:
        try:
            row = next(csv.reader([record], strict=True))
        except csv.Error:
            row = []
        if len(row) != len(columns):
            row = record.split(",")
            found = _CAPTION_AND_TAGS.fullmatch(",".join(row[before : len(row) - after]))
            if found is not None:
                row = [*row[:before], found["caption"].replace('"', ""), found["tags"], *row[len(row) - after :]]
        if len(row) == len(columns):
            yield dict(zip(columns, row, strict=True))


def _text(video: Mapping[str, str]) -> str:
    fields = [video.get(name, "").strip("[]") for name in ("caption", "topic_tag", *_CATEGORIES)]
    return ". ".join(field.strip() for field in fields if field and field.strip() not in _NOTHING)
