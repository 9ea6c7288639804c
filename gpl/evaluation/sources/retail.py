"""UCI Online Retail: invoices of a gift shop, times to the minute (Chen et al. 2012).

``events.csv`` user,item,timestamp,basket; ``items.csv`` item,title. An invoice is a session.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from gpl.catalogue import ItemContent
from gpl.evaluation.dataset import Dataset, Events
from gpl.evaluation.neutral import Ids
from gpl.evaluation.sources.table import find, number, rows


def read(source: Path) -> Dataset:
    texts = {row["item"]: row["title"].strip() for row in rows(find(source, "items.csv"), "item", "title")}
    path = find(source, "events.csv")
    users, items, baskets = Ids(), Ids(texts), Ids()
    events = [
        (users.add(row["user"]), number(path, "timestamp", row["timestamp"]), baskets.add(row["basket"]), at)
        for row in rows(path, "user", "item", "timestamp", "basket")
        if (at := items.get(row["item"])) is not None
    ]
    events.sort(key=lambda event: event[:3])
    user, session, item = np.array([(u, b, i) for u, _, b, i in events], dtype=np.int64).T
    catalogue = [ItemContent(item_id, text) for item_id, text in texts.items()]
    return Dataset("online-retail", catalogue, users.to_list(), events=Events(user, item, session))
