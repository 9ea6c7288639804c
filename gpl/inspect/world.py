"""The catalogue and everybody's history under fitted artefacts, ready to be asked about."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from gpl.anchors.base import Anchors, History, anchors_of
from gpl.artefacts import Artefacts
from gpl.catalogue import ItemContent, rows_by_id
from gpl.codes.trie import SidTrie
from gpl.fit import Event
from gpl.inspect.views import (
    AnchorView,
    Histogram,
    ItemView,
    Labelled,
    Map,
    Met,
    Neighbour,
    Point,
    Sid,
    SidView,
    UserView,
)
from gpl.labels import labeller
from gpl.labels.confidence import dispersion_factor, generation_factor
from gpl.labels.matching import Floats
from gpl.space import Encoder, raw_vectors

_BINS = 25
_MAP_ITEMS = 2000
_ASKED_USERS = 200


class Inspector:
    """Answers what the method sees. Deterministic. ``positives`` are taken from the events that are clicks."""

    def __init__(
        self,
        artefacts: Artefacts,
        items: Sequence[ItemContent],
        events: Sequence[Event],
        encoder: Encoder | None,
        config: labeller.Config | None = None,
        beams: int = 10,
        history: int = 50,
        min_positives: int = 1,
    ) -> None:
        """``encoder``: that of the space; None: vectors come with the items. ``min_positives``: clicks below which the
        stream makes no anchors. Raises ValueError as `fit`."""
        self._artefacts, self._items = artefacts, list(items)
        self._row_of = rows_by_id(self._items)
        self._config, self._beams, self._length = config or labeller.Config(), beams, history
        self._least = min_positives
        artefacts.space.check_encoder(encoder)
        raw = raw_vectors(self._items, encoder, artefacts.space.raw_dim)
        self._vectors = artefacts.space.project(raw, list(self._row_of))
        self._sids = artefacts.quantiser.encode(self._vectors)
        self._trie = SidTrie(self._sids, artefacts.quantiser.codebook_size, self._vectors)
        self._positives: dict[str, list[Event]] = {}
        for event in sorted((e for e in events if e.clicked), key=lambda e: (e.known_ts, e.item_id)):
            self._positives.setdefault(event.user_id, []).append(event)

    @property
    def users(self) -> list[str]:
        """Users with positives, those with most first."""
        return sorted(self._positives, key=lambda user: (-len(self._positives[user]), user))

    def user(self, user_id: str, nearest: int = 5, top: int = 20, until: int | None = None) -> UserView:
        """A user as of event time ``until`` (None: the end). Raises KeyError for a user without positives by then."""
        events = [e for e in self._positives.get(user_id, []) if until is None or e.known_ts <= until]
        if not events:
            by_then = "" if until is None else f" until {until}"
            raise KeyError(f"user {user_id!r}: no click in the data{by_then}")
        known = [event for event in events if event.item_id in self._row_of]
        rows = [self._row_of[event.item_id] for event in known]
        read = rows[-self._length :]
        anchors = self._anchors([rows])[0] if rows else None
        met = np.unique(rows)
        labelled = None if anchors is None else self._label(anchors)
        candidates = np.setdiff1d(np.arange(len(self._items)), met)
        best: list[Labelled] = []
        if labelled is not None:
            order = candidates[np.argsort(-labelled.score[candidates], kind="stable")][:top]
            points = self._points(self._vectors[order])
            best = [
                Labelled(
                    self._items[row].item_id,
                    self._items[row].text,
                    float(labelled.score[row]),
                    float(labelled.label[row]),
                    float(labelled.confidence[row]),
                    int(labelled.best[row]),
                    point,
                )
                for row, point in zip(order.tolist(), points, strict=True)
            ]
        return UserView(
            user_id=user_id,
            history=[
                Met(e.item_id, self._items[row].text, e.known_ts, at >= len(rows) - len(read))
                for at, (e, row) in enumerate(zip(known, rows, strict=True))
            ],
            unknown_items=len(events) - len(known),
            anchors=[] if anchors is None else self._anchor_views(anchors, read, met, nearest),
            dispersion_factor=None if anchors is None else dispersion_factor(anchors.vectors, anchors.logprobs),
            labels=None if labelled is None else _histogram(labelled.label[candidates]),
            confidences=None if labelled is None else _histogram(labelled.confidence[candidates]),
            top=best,
            map=Map(self._sample, self._points(self._vectors[read]), self._explained),
            generator=self._artefacts.generator.version,
            settings=self._settings(),
            notice=self._notice(len(events)),
        )

    def item(self, item_id: str, nearest: int = 10) -> ItemView:
        """An item. Raises KeyError for one that the data do not have."""
        if item_id not in self._row_of:
            raise KeyError(f"item {item_id!r}: not in the data")
        row = self._row_of[item_id]
        vector, sid = self._vectors[row], self._sids[row]
        same = np.flatnonzero((self._sids == sid).all(axis=1))
        # Those who have anchors in the stream.
        enough = [user for user in self.users if len(self._positives[user]) >= self._least]
        users = [u for u in enough if all(e.item_id != item_id for e in self._positives[u])][:_ASKED_USERS]
        pasts = [[self._row_of[e.item_id] for e in self._positives[u] if e.item_id in self._row_of] for u in users]
        found: list[tuple[str, float]] = []
        for user, anchors in zip(users, self._anchors(pasts), strict=True):
            if anchors is not None:
                found.append((user, float(self._label(anchors, np.array([row])).label[0])))
        found.sort(key=lambda entry: (-entry[1], entry[0]))
        return ItemView(
            item_id,
            self._items[row].text,
            tuple(sid.tolist()),
            self._near(vector, same[same != row], len(same)),
            self._near(vector, np.flatnonzero(np.arange(len(self._items)) != row), nearest),
            sum(event.item_id == item_id for events in self._positives.values() for event in events),
            len(found),
            _histogram(np.array([label for _, label in found])) if found else None,
            found[:10],
        )

    def sid(self, sid: Sid, nearest: int = 20) -> SidView:
        """A SID or its first codes. Raises KeyError where no item begins so, ValueError for too many codes."""
        levels = self._artefacts.quantiser.levels
        if not 0 < len(sid) <= levels:
            raise ValueError(f"sid: {len(sid)} codes, expected 1 to {levels}")
        depth = len(sid)
        here = np.flatnonzero((self._sids[:, :depth] == np.array(sid)).all(axis=1))
        if not len(here):
            raise KeyError(f"sid {'-'.join(map(str, sid))}: no item's SID begins so")
        mean = _direction(self._vectors[here])
        children: list[tuple[int, int, str]] = []
        if depth < levels:
            for code in np.unique(self._sids[here, depth]).tolist():
                rows = here[self._sids[here, depth] == code]
                children.append((code, len(rows), self._near(_direction(self._vectors[rows]), rows, 1)[0].text))
        children.sort(key=lambda child: (-child[1], child[0]))
        siblings: list[tuple[Sid, int, float]] = []
        prefixes, inverse, counts = np.unique(self._sids[:, :depth], axis=0, return_inverse=True, return_counts=True)
        for at, prefix in enumerate(map(tuple, prefixes.tolist())):
            if prefix != tuple(sid) and prefix[:-1] == tuple(sid)[:-1]:
                other = _direction(self._vectors[inverse.ravel() == at])
                siblings.append((prefix, int(counts[at]), float(other @ mean)))
        siblings.sort(key=lambda entry: (-entry[2], entry[0]))
        return SidView(
            tuple(sid),
            levels,
            self._near(mean, here, nearest),
            len(here),
            float((self._vectors[here] @ mean).mean()),
            children,
            siblings[:10],
        )

    def _anchors(self, pasts: Sequence[Sequence[int]]) -> list[Anchors | None]:
        """Anchors of histories (catalogue rows, oldest first); None where there are none."""
        histories = [History(self._sids[list(p)], self._vectors[list(p)]).last(self._length) for p in pasts]
        asked = [at for at, history in enumerate(histories) if len(history)]
        beams = self._artefacts.generator.generate([histories[at] for at in asked], self._trie, self._beams)
        found: list[Anchors | None] = [None] * len(histories)
        for at, beam in zip(asked, beams, strict=True):
            if len(beam):
                found[at] = anchors_of(beam, self._trie.centroids, histories[at])
        return found

    def _label(self, anchors: Anchors, rows: NDArray[np.int64] | None = None) -> labeller.Labelled:
        prepared = labeller.PreparedAnchors.build(
            anchors.vectors,
            anchors.logprobs,
            anchors.history_factor,
            self._artefacts.quantiser.levels,
            self._config,
        )
        vectors = self._vectors if rows is None else self._vectors[rows]
        return labeller.label(prepared, self._artefacts.calibration, vectors)

    def _anchor_views(
        self, anchors: Anchors, read: Sequence[int], met: NDArray[np.int64], nearest: int
    ) -> list[AnchorView]:
        levels = self._artefacts.quantiser.levels
        weights = labeller.PreparedAnchors.build(
            anchors.vectors, anchors.logprobs, anchors.history_factor, levels, self._config
        ).weight
        generated = generation_factor(anchors.logprobs, levels)
        unmet = np.setdiff1d(np.arange(len(self._items)), met)
        points = self._points(anchors.vectors)
        return [
            AnchorView(
                sid=tuple(anchors.sids[k].tolist()),
                probability=float(np.exp(anchors.logprobs[k])),
                generation_factor=float(generated[k]),
                history_factor=float(anchors.history_factor[k]),
                confidence=float(weights[k]),
                carriers=int((self._sids == anchors.sids[k]).all(axis=1).sum()),
                remembered=next(iter(self._near(anchors.vectors[k], np.unique(read), 1)), None),
                nearest=self._near(anchors.vectors[k], unmet, nearest),
                point=points[k],
            )
            for k in range(len(anchors))
        ]

    def _near(self, vector: Floats, rows: NDArray[np.int64], count: int) -> list[Neighbour]:
        cosines = self._vectors[rows] @ vector
        order = np.argsort(-cosines, kind="stable")[:count]
        return [
            Neighbour(self._items[row].item_id, self._items[row].text, float(cosine))
            for row, cosine in zip(rows[order].tolist(), cosines[order].tolist(), strict=True)
        ]

    @cached_property
    def _axes(self) -> tuple[Floats, Floats, float]:
        """Mean (dim,), two principal directions (dim, 2), and the share of variance that they hold."""
        mean = self._vectors.mean(axis=0)
        centred = (self._vectors - mean).astype(np.float64)
        # Not np.cov: it makes a number of one dimension, and NaN of one item.
        values, directions = np.linalg.eigh(centred.T @ centred)
        first = directions[:, ::-1][:, :2]
        # An eigenvector's sign is arbitrary: the largest component is made positive, so that pages compare.
        first = first * np.sign(first[np.abs(first).argmax(axis=0), range(first.shape[1])])
        return mean, first.astype(np.float32), float(values[::-1][:2].sum() / max(1e-12, values.sum()))

    @property
    def _explained(self) -> float:
        return self._axes[2]

    def _points(self, vectors: Floats) -> list[Point]:
        mean, directions, _ = self._axes
        flat = (vectors - mean) @ directions
        return [(float(row[0]), float(row[1]) if len(row) > 1 else 0.0) for row in flat]

    @cached_property
    def _sample(self) -> list[Point]:
        step = -(-len(self._items) // _MAP_ITEMS)
        return self._points(self._vectors[::step])

    def _notice(self, clicks: int) -> str:
        if clicks >= self._least:
            return ""
        return f"In the stream no anchors or labels yet: {clicks} of {self._least} clicks (profiles.min_positives)."

    def _settings(self) -> str:
        config = self._config
        matching = "largest cosine" if config.matching == "max" else f"kernel, tau {config.kernel_tau:g}"
        names = [name for name in ("dispersion", "history", "generation") if getattr(config, name)]
        calibration = ", ".join(
            f"{k} {v:.3g}" if isinstance(v, float) else f"{v}" for k, v in _scalars(self._artefacts)
        )
        return f"matching: {matching}; confidence: {_mean(names)}; calibration: {calibration}"


def _mean(names: Sequence[str]) -> str:
    product = " x ".join(names) or "1"
    return product if len(names) < 2 else f"({product})^(1/{len(names)})"


def _scalars(artefacts: Artefacts) -> list[tuple[str, object]]:
    """What of a calibration fits on a line."""
    return [(k, v) for k, v in artefacts.calibration.to_dict().items() if isinstance(v, str | float | int)]


def _direction(vectors: Floats) -> Floats:
    total = vectors.sum(axis=0)
    length = float(np.linalg.norm(total))
    direction: Floats = total / length if length > 1e-6 else vectors[0]
    return direction


def _histogram(values: NDArray[np.floating]) -> Histogram | None:
    if not len(values):
        return None
    low, high = float(values.min()), float(values.max())
    pad = 0.0 if high - low > 1e-6 else 0.01
    counts, edges = np.histogram(values, bins=_BINS, range=(low - pad, high + pad))
    return Histogram(edges.tolist(), counts.tolist(), float(values.mean()))
