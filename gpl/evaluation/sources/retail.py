"""UCI Online Retail: invoices of a gift shop, times to the minute (Chen et al. 2012). An invoice is a session.

As published, the workbook saved as CSV: ``Online Retail.csv``
InvoiceNo,StockCode,Description,Quantity,InvoiceDate,CustomerID, or ``online_retail_II.csv``, where two of them are
Invoice and ``Customer ID``; in UTF-8 or else Latin-1. Rows without customer and of stock codes that are no products
(postage, fees) are left out.

Rearranged: ``events.csv`` user,item,timestamp,basket,qty; ``items.csv`` item,title.

Of both, cancellations (an invoice that begins with C) and quantities of 0 or less are left out.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path

import numpy as np

from gpl.catalogue import ItemContent
from gpl.evaluation.dataset import DataError, Dataset, Events
from gpl.evaluation.neutral import Ids
from gpl.evaluation.sources.table import encoding_of, find, number, optional, rows

_PUBLISHED = ("Online Retail.csv", "OnlineRetail.csv", "online_retail.csv", "online_retail_II.csv", "data.csv")
_ALIASES = {"Invoice": "InvoiceNo", "Customer ID": "CustomerID"}
_PRODUCT = re.compile(r"\d{5}")
_DATES = tuple(
    f"{date} {time}"
    for date in ("%m/%d/%Y", "%d/%m/%Y", "%m/%d/%y", "%d/%m/%y", "%d-%m-%Y", "%m-%d-%Y", "%Y-%m-%d")
    for time in ("%H:%M", "%H:%M:%S")
)


def read(source: Path) -> Dataset:
    if optional(source, "items.csv") is None and (published := optional(source, *_PUBLISHED)) is not None:
        return _published(published)
    path = find(source, "items.csv", *_PUBLISHED)
    texts = {row["item"]: row["title"].strip() for row in rows(path, "item", "title")}
    path = find(source, "events.csv")
    events = [
        (row["user"], number(path, "timestamp", row["timestamp"]), row["basket"], row["item"])
        for row in rows(path, "user", "item", "timestamp", "basket")
        if row["item"] in texts and _bought(path, row["basket"], row.get("qty") or "1")
    ]
    return _dataset(path, texts, events)


def _published(path: Path) -> Dataset:
    named: defaultdict[str, Counter[str]] = defaultdict(Counter)
    lines = []
    columns = ("InvoiceNo", "StockCode", "Description", "Quantity", "InvoiceDate", "CustomerID")
    for row in rows(path, *columns, aliases=_ALIASES, encoding=encoding_of(path)):
        invoice, code, text, quantity, date, user = (row[column].strip() for column in columns)
        code = code.upper()
        if user and _PRODUCT.match(code) and _bought(path, invoice, quantity):
            named[code].update([text] if text else [])
            # Where a column has gaps, numbers are written with a decimal point.
            lines.append((user.removesuffix(".0"), date, invoice, code))
    at = _times(path, dict.fromkeys(date for _, date, _, _ in lines))
    # Descriptions differ between invoices: the most frequent one is the product's.
    texts = {code: max(names, key=lambda name: names[name], default="") for code, names in named.items()}
    return _dataset(path, texts, [(user, at[date], invoice, code) for user, date, invoice, code in lines])


def _bought(path: Path, invoice: str, quantity: str) -> bool:
    return not invoice.startswith("C") and number(path, "quantity", quantity) > 0


def _times(path: Path, dates: Iterable[str]) -> dict[str, float]:
    """Seconds, by the first format that reads all dates: one alone does not tell days from months."""
    unread = (-1, "")
    for form in _DATES:
        found: dict[str, float] = {}
        for date in dates:
            try:
                found[date] = (datetime.strptime(date, form) - datetime(1970, 1, 1)).total_seconds()
            except ValueError:
                unread = max(unread, (len(found), date))
                break
        else:
            return found
    raise DataError(f"{path.name}: InvoiceDate {unread[1]!r}, expected all as 12/1/2010 8:26 or 2010-12-01 08:26:00")


def _dataset(path: Path, texts: dict[str, str], bought: list[tuple[str, float, str, str]]) -> Dataset:
    """``bought``: user, time, invoice and item of each row."""
    if not bought:
        raise DataError(f"{path.name}: no purchase of a known item")
    users, items, baskets = Ids(), Ids(texts), Ids()
    events = [(users.add(user), at, baskets.add(basket), items.add(item)) for user, at, basket, item in bought]
    events.sort(key=lambda event: event[:3])
    user, session, item = np.array([(u, b, i) for u, _, b, i in events], dtype=np.int64).T
    catalogue = [ItemContent(item_id, text) for item_id, text in texts.items()]
    return Dataset("online-retail", catalogue, users.to_list(), events=Events(user, item, session))
