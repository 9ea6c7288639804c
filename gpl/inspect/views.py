"""What is seen, as plain data."""

from __future__ import annotations

from dataclasses import dataclass

Sid = tuple[int, ...]
Point = tuple[float, float]


@dataclass(frozen=True)
class Neighbour:
    """An item and how near it is. ``cosine`` is to whatever the list belongs to."""

    item_id: str
    text: str
    cosine: float


@dataclass(frozen=True)
class Met:
    """An item of a history. ``ts`` as the events have it; ``read``: recent enough for the generator to read."""

    item_id: str
    text: str
    ts: int
    read: bool


@dataclass(frozen=True)
class AnchorView:
    """One anchor. ``probability`` is of the whole SID. ``confidence`` is the geometric mean of the factors in force,
    which a label has whose best anchor this one is.
    """

    sid: Sid
    probability: float
    generation_factor: float
    history_factor: float
    confidence: float
    carriers: int
    """Items with this very SID."""
    remembered: Neighbour | None
    """The item of the history that is nearest."""
    nearest: list[Neighbour]
    """Of the whole catalogue, the history left out."""
    point: Point


@dataclass(frozen=True)
class Labelled:
    """A candidate and its pseudo-label. ``anchor``: index of its best anchor."""

    item_id: str
    text: str
    score: float
    label: float
    confidence: float
    anchor: int
    point: Point


@dataclass(frozen=True)
class Histogram:
    """``counts[i]`` values are in ``[edges[i], edges[i + 1])``, the last bin with its right edge."""

    edges: list[float]
    counts: list[int]
    mean: float


@dataclass(frozen=True)
class Map:
    """The first two principal components of the catalogue: its items, a sample of them where there are many, and the
    history in order.
    """

    items: list[Point]
    history: list[Point]
    explained: float
    """Share of the catalogue's variance that the two components hold."""


@dataclass(frozen=True)
class UserView:
    """``labels`` are of all items that the user has not met. Without anchors they are None, as is the map's use."""

    user_id: str
    history: list[Met]
    unknown_items: int
    """Positives that the catalogue does not know."""
    anchors: list[AnchorView]
    dispersion_factor: float | None
    labels: Histogram | None
    confidences: Histogram | None
    top: list[Labelled]
    map: Map
    generator: str
    settings: str
    """In words: matching, factors in force, calibration."""
    notice: str
    """In words: why the stream would not have these anchors yet; empty where it would."""


@dataclass(frozen=True)
class ItemView:
    """``labels``: over ``asked`` users with anchors who have not met it; ``interested`` are those with the highest."""

    item_id: str
    text: str
    sid: Sid
    same_sid: list[Neighbour]
    nearest: list[Neighbour]
    positives: int
    """Events of users who took it."""
    asked: int
    labels: Histogram | None
    interested: list[tuple[str, float]]


@dataclass(frozen=True)
class SidView:
    """A SID, or the beginning of one. ``children``: next codes with their number of items, most first."""

    sid: Sid
    levels: int
    items: list[Neighbour]
    """Cosine to the mean of all items here, nearest first."""
    count: int
    tightness: float
    """Mean cosine of the items with their mean; 1 where all are alike."""
    children: list[tuple[int, int, str]]
    """Code, items, and the text of the item nearest to their mean."""
    siblings: list[tuple[Sid, int, float]]
    """Prefixes of the same length: items, and cosine of the two means, nearest first."""
