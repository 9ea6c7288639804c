"""Amazon Office Products 2018 as rebuilt later: no dates, each user's order (Ni et al. 2019).

``events.csv`` user,item,order,split; ``items.csv`` item,title,description,brand. Events marked ``undated`` are left
out: where they stand among a user's others is not known.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from gpl.catalogue import ItemContent
from gpl.evaluation.dataset import Dataset, Events
from gpl.evaluation.neutral import Ids
from gpl.evaluation.sources.table import find, number, rows


def read(source: Path) -> Dataset:
    texts = {
        row["item"]: _text(row) for row in rows(find(source, "items.csv"), "item", "title", "description", "brand")
    }
    path = find(source, "events.csv")
    users, items = Ids(), Ids(texts)
    events = [
        (users.add(row["user"]), number(path, "order", row["order"]), at)
        for row in rows(path, "user", "item", "order", "split")
        if row["split"] != "undated" and (at := items.get(row["item"])) is not None
    ]
    events.sort()
    user, item = np.array([(u, i) for u, _, i in events], dtype=np.int64).T
    catalogue = [ItemContent(item_id, text) for item_id, text in texts.items()]
    return Dataset("amazon-office", catalogue, users.to_list(), events=Events(user, item, np.arange(len(events))))


def _text(row: dict[str, str]) -> str:
    """Title, brand where the title lacks it, description where it says more than the title."""
    title, brand, description = (row[name].strip() for name in ("title", "brand", "description"))
    if brand and brand.lower() not in title.lower():
        title = f"{brand} {title}"
    if description.startswith(row["title"].strip()):
        description = description[len(row["title"].strip()) :].lstrip(". ")
    return f"{title}. {description}" if description else title
