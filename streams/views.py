"""Typed views of the state topics: the catalogue, the users' anchors and the calibrations, in memory."""

from __future__ import annotations

import bisect
import sys
from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar

import msgspec
import numpy as np
import structlog
from numpy.typing import NDArray

from gpl.catalogue import Catalogue
from gpl.labels import calibration, labeller
from streams.contracts import Calibration, ItemVector, UserAnchors, decode
from streams.settings import LabelSettings

log = structlog.get_logger()


def vector_bytes(array: NDArray[np.float32]) -> bytes:
    """Little-endian float32 bytes, as records carry vectors."""
    return np.ascontiguousarray(array, dtype="<f4").tobytes()


def vectors_from(data: bytes, dim: int) -> NDArray[np.float32]:
    """(n, dim) float32 over a record's bytes, read-only. Raises ValueError when they are no whole number of rows."""
    if dim <= 0 or len(data) % (4 * dim):
        raise ValueError(f"vector: {len(data)} bytes are no whole number of rows of {dim} float32 values")
    return np.frombuffer(data, dtype="<f4").astype(np.float32, copy=False).reshape(-1, dim)


def labeller_config(settings: LabelSettings) -> labeller.Config:
    """What the library makes labels with under these settings."""
    return labeller.Config(
        matching=settings.matching,
        kernel_tau=settings.kernel_tau,
        dispersion=settings.dispersion,
        history=settings.history,
        generation=settings.generation,
    )


def prepared_anchors(record: UserAnchors, dim: int, levels: int, config: labeller.Config) -> labeller.PreparedAnchors:
    """A record's anchors, ready to match. Raises ValueError when it has none or its columns do not fit each other."""
    return labeller.PreparedAnchors.build(
        vectors_from(record.vectors, dim),
        np.asarray(record.logprob, dtype=np.float32),
        np.asarray(record.history_factor, dtype=np.float32),
        levels,
        config,
    )


def history_of(record: UserAnchors) -> list[str]:
    """The items that a record's anchors were made of, to be held: users liked the same ones, so ids are shared."""
    return list(map(sys.intern, record.history))


def calibration_of(record: Calibration | None) -> calibration.Fitted:
    """The library's calibration for a record; the linear map when none is in force.

    Raises ValueError when its values do not fit its kind.
    """
    if record is None:
        return calibration.NoCalibration()
    return calibration.calibration_from_dict(msgspec.structs.asdict(record))


class CatalogueView:
    """Handler for ``item-vectors``: keeps a Catalogue current.

    Vectors of another encoder or quantiser than this process works with are skipped and counted in ``foreign``:
    cosines across two spaces mean nothing. ``on_change(item_id, vector | None)`` is told of each change.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        dim: int,
        encoder: str,
        quantiser: str,
        on_change: Callable[[str, ItemVector | None], None] | None = None,
    ) -> None:
        self.catalogue = catalogue
        self.content: dict[str, str] = {}
        self.foreign = 0
        self._dim = dim
        self._encoder = encoder
        self._quantiser = quantiser
        self._on_change = on_change

    def __call__(self, record: Any) -> None:
        if record.value is None:
            item_id = record.key.decode()
            self.content.pop(item_id, None)
            if item_id in self.catalogue:
                self.catalogue.remove(item_id)
                if self._on_change is not None:
                    self._on_change(item_id, None)
            return
        item = decode(ItemVector, record.value)
        if (item.encoder, item.quantiser) != (self._encoder, self._quantiser):
            self.foreign += 1
            return
        vectors = vectors_from(item.vector, self._dim)
        if len(vectors) != 1:
            raise ValueError(f"vector: {len(vectors)} rows of {self._dim} values, expected one")
        self.catalogue.put(item.item_id, vectors[0], item.sid)
        self.content[item.item_id] = item.content
        if self._on_change is not None:
            self._on_change(item.item_id, item)


V = TypeVar("V")


class AsOf(Generic[V]):
    """Values of one key by the event time from which they are in force."""

    __slots__ = ("_times", "_values")

    def __init__(self) -> None:
        self._times: list[int] = []
        self._values: list[V] = []

    def put(self, ts: int, value: V) -> None:
        """Add a value, or replace the one of the same time (a redelivered record)."""
        at = bisect.bisect_left(self._times, ts)
        if at < len(self._times) and self._times[at] == ts:
            self._values[at] = value
        else:
            self._times.insert(at, ts)
            self._values.insert(at, value)

    def at(self, ts: int) -> V | None:
        """The value with the newest time <= ts, None before the first."""
        at = bisect.bisect_right(self._times, ts)
        return self._values[at - 1] if at else None

    def newest(self) -> V | None:
        return self._values[-1] if self._values else None

    def forget_before(self, ts: int) -> None:
        """Drop values that no time >= ts can ask for."""
        keep = max(0, bisect.bisect_right(self._times, ts) - 1)
        del self._times[:keep], self._values[:keep]


class AnchorsView(Generic[V]):
    """Handler for ``user-anchors``: as-of store per user of what ``prepare`` makes of each record. Of each partition by
    itself: what a request finds must not hang on which others its worker has.

    ``on_change(partition, anchors)`` is told of each record.
    """

    def __init__(
        self, prepare: Callable[[UserAnchors], V], on_change: Callable[[int, UserAnchors], None] | None = None
    ) -> None:
        self._prepare = prepare
        self._on_change = on_change
        self._by_user: dict[tuple[int, str], AsOf[V]] = {}

    def __len__(self) -> int:
        return len(self._by_user)

    def __call__(self, record: Any) -> None:
        if record.value is None:
            self._by_user.pop((record.partition, record.key.decode()), None)
            return
        anchors = decode(UserAnchors, record.value)
        self._by_user.setdefault((record.partition, anchors.user_id), AsOf()).put(anchors.ts, self._prepare(anchors))
        if self._on_change is not None:
            self._on_change(record.partition, anchors)

    def at(self, partition: int, user_id: str, ts: int) -> V | None:
        """The user's anchors with the newest ts <= ``ts``."""
        versions = self._by_user.get((partition, user_id))
        return None if versions is None else versions.at(ts)

    def forget_before(self, times: Mapping[int, int]) -> None:
        """Let go of versions that requests of a partition at or after its time cannot use."""
        for (partition, _), versions in self._by_user.items():
            if partition in times:
                versions.forget_before(times[partition])


class CalibrationView:
    """Handler for ``calibrations``: the calibration in force as of an event time. ``on_change(ts)``: a new one."""

    def __init__(self, on_change: Callable[[int], None] | None = None) -> None:
        self._versions: AsOf[Calibration] = AsOf()
        self._on_change = on_change

    def __call__(self, record: Any) -> None:
        if record.value is not None:
            found = decode(Calibration, record.value)
            calibration_of(found)  # one that cannot be applied must not come into force
            self._versions.put(found.ts, found)
            if self._on_change is not None:
                self._on_change(found.ts)

    def at(self, ts: int) -> Calibration | None:
        return self._versions.at(ts)
