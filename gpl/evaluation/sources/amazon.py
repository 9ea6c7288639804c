"""Amazon reviews of a category, such as Office Products (McAuley et al. 2015, Ni et al. 2019, Hou et al. 2024).

As published, 2014, 2018 or 2023: ``meta_CATEGORY.json`` or ``.jsonl``, one product a line, and one review a line in
``reviews_CATEGORY_5.json``, ``CATEGORY_5.json``, ``CATEGORY.csv`` (2023, 5-core), ``CATEGORY.jsonl``,
``reviews_CATEGORY.json`` or ``CATEGORY.json``, the first that is there. A review is a purchase, whatever its stars; a
user's reviews of one time (a day, before 2023) are one session, since their order is not known. Products without
metadata are left out, and so are products without a review.

Rearranged, Office Products 2018 as rebuilt later, with no dates but each user's order: ``events.csv``
user,item,order,split; ``items.csv`` item,title,description,brand. Events marked ``undated`` are left out: where they
stand among a user's others is not known.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from gpl.catalogue import ItemContent
from gpl.evaluation.dataset import DataError, Dataset, Events
from gpl.evaluation.neutral import Ids
from gpl.evaluation.sources.table import find, number, opened, optional, plain, rows

# 5-core before all, which are too many to evaluate on.
_REVIEWS = (
    "reviews_CATEGORY_5.json",
    "CATEGORY_5.json",
    "CATEGORY.csv",
    "CATEGORY.jsonl",
    "reviews_CATEGORY.json",
    "CATEGORY.json",
)


def read(source: Path) -> Dataset:
    metadata = sorted(source.glob("meta_*.json*"))
    if optional(source, "items.csv") is None and metadata:
        categories = sorted({_category(path) for path in metadata})
        if len(categories) > 1:
            raise DataError(f"{source}: metadata of {' and '.join(categories)}, expected of one category")
        return _published(source, metadata[0])
    texts = {
        row["item"]: _text(row["title"], row["brand"], row["description"])
        for row in rows(find(source, "items.csv", "meta_CATEGORY.json"), "item", "title", "description", "brand")
    }
    path = find(source, "events.csv")
    users, items = Ids(), Ids(texts)
    events = [
        (users.add(row["user"]), number(path, "order", row["order"]), at)
        for row in rows(path, "user", "item", "order", "split")
        if row["split"] != "undated" and (at := items.get(row["item"])) is not None
    ]
    if not events:
        raise DataError(f"{path.name}: no event of a known item that is not 'undated'")
    events.sort()
    user, item = np.array([(u, i) for u, _, i in events], dtype=np.int64).T
    catalogue = [ItemContent(item_id, text) for item_id, text in texts.items()]
    return Dataset("amazon-office", catalogue, users.to_list(), events=Events(user, item, np.arange(len(events))))


def _published(source: Path, meta: Path) -> Dataset:
    category = _category(meta)
    path = find(source, *(name.replace("CATEGORY", category) for name in _REVIEWS))
    texts: dict[str, str] = {}
    for at, product in _objects(meta):
        texts.setdefault(_id(meta, at, product, "parent_asin", "asin"), _product(product))
    users, items = Ids(), Ids()
    events = []
    for at, review in _reviews(path):
        item_id = _id(path, at, review, "parent_asin", "asin")
        when = number(path, "time", review.get("unixReviewTime", review.get("timestamp")))
        user_id = _id(path, at, review, "reviewerID", "user_id")
        if item_id in texts:
            events.append((users.add(user_id), when, items.add(item_id)))
    if not events:
        raise DataError(f"{path.name}: no review of a product of {meta.name}")
    events.sort(key=lambda event: event[:2])
    sessions = Ids()
    session = [sessions.add(f"{user} {when}") for user, when, _ in events]
    user, item = np.array([(u, i) for u, _, i in events], dtype=np.int64).T
    return Dataset(
        "amazon-office" if category == "Office_Products" else f"amazon-{category.lower().replace('_', '-')}",
        [ItemContent(item_id, texts[item_id]) for item_id in items.to_list()],
        users.to_list(),
        events=Events(user, item, np.array(session, dtype=np.int64)),
    )


def _category(meta: Path) -> str:
    return meta.name.removeprefix("meta_").partition(".json")[0]


def _reviews(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    if ".csv" in path.suffixes:
        return enumerate(rows(path, "user_id", "parent_asin", "timestamp"), 2)
    return _objects(path)


def _objects(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Objects by line: JSON, or Python literals, as the metadata of 2014 is written."""
    with opened(path) as handle:
        for at, line in enumerate(handle, 1):
            if not line.strip():
                continue
            try:
                found = json.loads(line)
            except ValueError:
                try:
                    found = ast.literal_eval(line.strip())
                except (ValueError, SyntaxError, TypeError):
                    found = None
            if not isinstance(found, dict):
                raise DataError(f"{path.name}:{at}: neither a JSON object nor a Python dict")
            yield at, found


def _id(path: Path, at: int, record: dict[str, Any], *fields: str) -> str:
    for field in fields:
        if record.get(field):
            return str(record[field])
    raise DataError(f"{path.name}:{at}: {' or '.join(fields)} is missing")


def _product(product: dict[str, Any]) -> str:
    description = product.get("description") or ""
    if isinstance(description, list):
        description = " ".join(str(part) for part in description)
    title = plain(str(product.get("title") or ""))
    if "getTime" in title:  # of some products of 2018, what was scraped is a script
        title = ""
    return _text(title, plain(str(product.get("brand") or product.get("store") or "")), plain(str(description)))


def _text(title: str, brand: str, description: str) -> str:
    """Title, brand where the title lacks it, description where it says more than the title."""
    title, brand, description = title.strip(), brand.strip(), description.strip()
    if title and description.startswith(title):
        description = description[len(title) :].lstrip(". ")
    if brand and brand.lower() not in title.lower():
        title = f"{brand} {title}".strip()
    return ". ".join(part for part in (title, description) if part)
