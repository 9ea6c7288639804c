"""KuaiRec: short videos with (nearly) every user x video cell observed (Gao et al. 2022).

``small_positives.csv`` user_id,video_id lists watch ratios of at least 2, all other cells of ``small_users`` x
``small_items`` are negative; ``big_positives_train.csv`` is the biased log of other users, which gives popularity;
``videos.csv`` holds caption, tags and category names (Chinese).
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np

from gpl.catalogue import ItemContent
from gpl.evaluation.dataset import Dataset, Truth
from gpl.evaluation.sources.table import find, rows

_NOTHING = ("", "UNKNOWN", "[]", "nan")
_CATEGORIES = ("first_level_category_name", "second_level_category_name", "third_level_category_name")


def read(source: Path) -> Dataset:
    items = [row["video_id"] for row in rows(find(source, "small_items.csv"), "video_id")]
    users = [row["user_id"] for row in rows(find(source, "small_users.csv"), "user_id")]
    videos = {row["video_id"]: row for row in rows(find(source, "videos.csv"), "video_id", "caption", "topic_tag")}
    item_at, user_at = ({id_: n for n, id_ in enumerate(ids)} for ids in (items, users))
    pairs = sorted(
        {
            (user_at[row["user_id"]], item_at[row["video_id"]])
            for row in rows(find(source, "small_positives.csv"), "user_id", "video_id")
            if row["user_id"] in user_at and row["video_id"] in item_at
        }
    )
    user, item = np.array(pairs, dtype=np.int64).T
    views = Counter(row["video_id"] for row in rows(find(source, "big_positives_train.csv"), "user_id", "video_id"))
    return Dataset(
        "kuairec",
        [ItemContent(video, _text(videos.get(video, {}))) for video in items],
        users,
        Truth(user, item, np.ones(len(pairs), dtype=np.float32), every_cell=True),
        popularity=np.array([views[video] for video in items], dtype=np.float32),
    )


def _text(video: dict[str, str]) -> str:
    fields = [video.get(name, "").strip("[]") for name in ("caption", "topic_tag", *_CATEGORIES)]
    return ". ".join(field.strip() for field in fields if field and field.strip() not in _NOTHING)
