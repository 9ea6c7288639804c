"""What labels are made with, as the log tells it: the users' anchors as of any time, calibrations, item vectors.

The topics are compacted, so the log may have lost what was in force at some time. Whether it has is decided, not
guessed: a user's refreshes are numbered, and offsets that are missing show where something was removed.
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from gpl.catalogue import Catalogue
from gpl.labels import labeller
from streams.contracts import Calibration, ItemVector, UserAnchors, decode
from streams.frame import Frame
from streams.labels.record import AnchorSet, anchor_set
from streams.replay.log import Entry, Log
from streams.views import AsOf, CatalogueView, calibration_of, vectors_from

Vector = NDArray[np.float32]
_PREPARED = 4096
"""Anchors kept ready to match; the others are made ready again."""


@dataclass(frozen=True, slots=True)
class Refresh:
    """One record of ``user-anchors`` in its place."""

    record: UserAnchors
    offset: int
    kafka_ms: int
    missing: int


@dataclass(frozen=True, slots=True)
class InForce:
    """A user's anchors as of a time. ``refresh``: None when there were none. ``lost``: why that cannot be known."""

    refresh: Refresh | None
    following: Refresh | None
    lost: str | None = None


class AnchorHistory:
    """The anchors of a partition's users, every version that the log still holds.

    ``ready(refresh, config)`` prepares them for matching.
    """

    def __init__(self, log: Log, partition: int, user: str | None = None) -> None:
        self._frame = log.frame
        self._by_user: dict[str, list[Refresh]] = {}
        self._removed: dict[str, int] = {}
        self.unreadable = 0
        for entry in log.read("user-anchors", partition):
            self._take(entry, user)
        self._prepared = lru_cache(maxsize=_PREPARED)(self._prepare)

    def _take(self, entry: Entry, user: str | None) -> None:
        if entry.value is None:
            name = (entry.key or b"").decode(errors="replace")
            self._by_user.pop(name, None)
            self._removed[name] = entry.kafka_ms
            return
        try:
            record = decode(UserAnchors, entry.value)
            anchor_set(record, self._frame.space, self._frame.dim, self._frame.levels, labeller.Config())
        except (ValueError, OverflowError):  # the labels role passes it over too
            self.unreadable += 1
            return
        if user is None or record.user_id == user:
            refresh = Refresh(record, entry.offset, entry.kafka_ms, entry.missing)
            bisect.insort(self._by_user.setdefault(record.user_id, []), refresh, key=_time)

    def of(self, user_id: str) -> list[Refresh]:
        """Every record of a user, by the time from which it was in force; of equal times the newest in the log last."""
        return self._by_user.get(user_id, [])

    def at(self, user_id: str, ts: int, kafka_ms: int) -> InForce:
        """Anchors of the user with the newest ts <= ``ts``. ``kafka_ms``: when the asking recall was logged."""
        every = self.of(user_id)
        place = bisect.bisect_right(every, ts, key=lambda refresh: refresh.record.ts)
        found = every[place - 1] if place else None
        following = every[place] if place < len(every) else None
        if self._removed.get(user_id, -1) > kafka_ms:
            return InForce(found, following, "the user's anchors were removed from the log after this request")
        if following is not None:
            # Compaction keeps a user's newest record, so only what came before a kept one can be gone.
            before, missing = (0, 0) if found is None else (found.record.version, found.missing)
            if following.record.version != before + 1 and following.missing > missing:
                known = f"version {before} was in force before" if found else "nothing older is in the log"
                lost = f"compacted away: the anchors of that time ({known}, version {following.record.version} is next)"
                return InForce(found, following, lost)
        return InForce(found, following)

    def recorded(self, user_id: str, ts: int, version: int, digest: str | None) -> Refresh | None:
        """The refresh that a label says it was made with, if the log holds it."""
        named = [r for r in self.of(user_id) if (r.record.ts, r.record.version) == (ts, version)]
        if digest is None:
            return named[-1] if named else None
        config = labeller.Config()
        return next((r for r in reversed(named) if self.ready(r, config).digest == digest), None)

    def ready(self, refresh: Refresh, config: labeller.Config) -> AnchorSet:
        """Prepared for matching under a configuration."""
        return self._prepared(refresh.record.user_id, refresh.offset, config)

    def _prepare(self, user_id: str, offset: int, config: labeller.Config) -> AnchorSet:
        refresh = next(r for r in self._by_user[user_id] if r.offset == offset)
        return anchor_set(refresh.record, self._frame.space, self._frame.dim, self._frame.levels, config)


def _time(refresh: Refresh) -> tuple[int, int]:
    return refresh.record.ts, refresh.offset


class Calibrations:
    """Calibrations by time and by version. ``incomplete``: records were removed from the topic."""

    def __init__(self, log: Log) -> None:
        self._by_time: AsOf[Calibration] = AsOf()
        self.by_version: dict[str, Calibration] = {}
        self.incomplete = False
        for partition in log.partitions("calibrations"):
            for entry in log.read("calibrations", partition):
                self.incomplete = self.incomplete or entry.missing > 0
                if entry.value is None:
                    continue
                try:
                    calibration = decode(Calibration, entry.value)
                    calibration_of(calibration)
                except (ValueError, OverflowError):  # the labels role passes it over too
                    continue
                self._by_time.put(calibration.ts, calibration)
                self.by_version[calibration.version] = calibration

    def at(self, ts: int) -> Calibration | None:
        """In force as of an event time."""
        return self._by_time.at(ts)


@dataclass(frozen=True, slots=True)
class ItemVersion:
    """An item's vector as of a record of ``item-vectors``; None: removed."""

    kafka_ms: int
    vector: Vector | None


class Items:
    """The catalogue as the log has it now, and what items were before, as far as the log still tells.

    Vectors of another space than the frame's are left out, as the labels role leaves them out. ``incomplete``: records
    were removed from the topic.
    """

    def __init__(self, log: Log) -> None:
        frame = log.frame
        self.catalogue = Catalogue(frame.dim, frame.levels)
        self.incomplete = False
        self.since: dict[str, int] = {}
        self._earlier: dict[str, list[ItemVersion]] = {}
        view = CatalogueView(self.catalogue, frame.dim, frame.encoder, frame.quantiser)
        for partition in log.partitions("item-vectors"):
            for entry in log.read("item-vectors", partition):
                self.incomplete = self.incomplete or entry.missing > 0
                self._take(view, frame, entry)
        self.foreign = view.foreign

    def _take(self, view: CatalogueView, frame: Frame, entry: Entry) -> None:
        item_id, vector = (entry.key or b"").decode(errors="replace"), None
        try:
            if entry.value is not None:
                item = decode(ItemVector, entry.value)
                if (item.encoder, item.quantiser) != frame.space:
                    view.foreign += 1
                    return
                item_id, vector = item.item_id, next(iter(vectors_from(item.vector, frame.dim)), None)
            before = self.catalogue.lookup([item_id])[1]
            view(entry)  # refuses a vector that is none
        except (ValueError, OverflowError):  # the labels role passes it over too
            return
        if len(before) == 0 if vector is None else (len(before) > 0 and np.array_equal(before[0], vector)):
            return  # nothing changed
        if item_id in self.since:
            was = before[0] if len(before) else None
            self._earlier.setdefault(item_id, []).append(ItemVersion(self.since[item_id], was))
        self.since[item_id] = entry.kafka_ms

    def versions(self, item_id: str) -> list[ItemVersion]:
        """Every version of an item, oldest first, the present one last; empty for an item never seen."""
        if item_id not in self.since:
            return []
        now = self.catalogue.lookup([item_id])[1]
        return [*self._earlier.get(item_id, ()), ItemVersion(self.since[item_id], now[0] if len(now) else None)]

    def as_of(self, item_id: str, kafka_ms: int) -> Vector | None:
        """The vector that was in force at a Kafka time; None when there was none."""
        found = [version for version in self.versions(item_id) if version.kafka_ms <= kafka_ms]
        return found[-1].vector if found else None

    def changed_after(self, item_ids: Mapping[str, object] | list[str], kafka_ms: int) -> list[str]:
        """Those items whose vector came, changed or went after a Kafka time."""
        return [item for item in item_ids if self.since.get(item, -1) > kafka_ms]

    def lookup_as_of(self, kafka_ms: int, item_ids: list[str]) -> tuple[list[str], Vector]:
        """The known among ``item_ids`` and their vectors as they were at a Kafka time."""
        if not self.changed_after(item_ids, kafka_ms):
            return self.catalogue.lookup(item_ids)
        present = {item: (self.as_of(item, kafka_ms)) for item in item_ids}
        known = [item for item in item_ids if present[item] is not None]
        rows = [vector for item in known if (vector := present[item]) is not None]
        dim = self.catalogue.dim
        return known, np.stack(rows) if rows else np.zeros((0, dim), np.float32)
