"""One partition of the stream as a deterministic fold over events in event-time order: anchors and labels come out.

What the profiles, anchors and labels roles do, by their own pure parts, with two freedoms taken away: events come in
order, and the generator answers at once. So the labels are those that the roles publish once all corrections are in.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from gpl.anchors.base import Anchors, History, anchors_of
from gpl.artefacts import Artefacts
from gpl.catalogue import Catalogue
from gpl.codes.trie import SidTrie
from streams.anchors.record import anchors_record
from streams.contracts import AnchorRequest, Calibration, Feedback, Label, Recall, UserAnchors, calibration_record
from streams.history.refresh import DriftRefresh, Refresh, TimetableRefresh
from streams.labels.joiner import Joiner, Source
from streams.labels.record import AnchorSet, Versions, anchor_set, make_label
from streams.profiles.state import AnchorsInForce, Profile
from streams.settings import Settings
from streams.views import AsOf, labeller_config, vectors_from

Event = Recall | Feedback


def in_event_time(events: Iterable[tuple[int, Event]]) -> list[tuple[int, Event]]:
    """(offset, event) by time; of one time recalls before feedback, then by id, so that no order of arrival shows."""

    def key(entry: tuple[int, Event]) -> tuple[int, int, str]:
        event = entry[1]
        return (event.ts, 0, event.request_id) if isinstance(event, Recall) else (event.ts, 1, event.event_id)

    return sorted(events, key=key)


class Pipeline:
    """Labels and anchors of one partition. ``period_ms``: anchors on a timetable instead of by drift.

    ``catalogue``: all items, not changed meanwhile. ``refreshes`` counts anchor requests by reason.
    """

    def __init__(
        self,
        settings: Settings,
        artefacts: Artefacts,
        catalogue: Catalogue,
        partition: int = 0,
        period_ms: int | None = None,
    ) -> None:
        self._settings = settings
        self._generator = artefacts.generator
        self._catalogue = catalogue
        self._partition = partition
        rows = catalogue.rows(catalogue.ids())
        sids, vectors = catalogue.sids[rows], catalogue.vectors[rows]
        self._trie = SidTrie(sids, artefacts.quantiser.codebook_size, vectors)
        self._calibration: Calibration = calibration_record(artefacts.calibration.to_dict())
        self._versions = (artefacts.generator.version, artefacts.quantiser.version, artefacts.space.version)
        self._label_versions = Versions(artefacts.space.version, artefacts.quantiser.version, settings.fingerprint())
        self._config = labeller_config(settings.labels)
        history = settings.generator.history
        self._refresh: Refresh = (
            DriftRefresh(settings.profiles, self._versions, self._vector_of, history)
            if period_ms is None
            else TimetableRefresh(settings.profiles, period_ms, history)
        )
        labels = settings.labels
        self._joiner = Joiner(int(labels.window_seconds * 1000), int(labels.retention_seconds * 1000))
        self._anchors: dict[str, AsOf[AnchorSet]] = {}
        self.refreshes: Counter[str] = Counter()
        self.answers: list[UserAnchors] = []
        """Anchors made so far; the caller may take them away."""

    def advance(self, ts: int) -> list[Label]:
        """Event time has come to ``ts``: the labels of requests whose window ended before it, by closing time."""
        for request in self._refresh.passed(ts):
            self._answer(request)
        labels = [self._label(request_id) for request_id in self._close(ts - 1)]
        self._joiner.forget(ts - 1)
        return labels

    def take(self, offset: int, event: Event) -> None:
        """The next event; ``advance`` to its time was called before. ``offset``: its place in its topic's partition."""
        source = Source(offset, event.ts)
        if isinstance(event, Recall):
            self._joiner.add_recall(event, source)
            return
        self._joiner.add_feedback(event, source)
        if event.kind == "click":
            for request in self._refresh.clicked(event):
                self._answer(request)

    def run(self, events: Iterable[tuple[int, Event]]) -> Iterator[Label]:
        """All labels of (offset, event) in event-time order, those of the end included."""
        last = 0
        for offset, event in events:
            yield from self.advance(event.ts)
            self.take(offset, event)
            last = event.ts
        # Behind the last window nothing can change a label any more.
        yield from self.advance(last + int(self._settings.labels.window_seconds * 1000) + 2)

    def anchors(self, user_id: str, ts: int) -> AnchorSet | None:
        """The user's anchors in force at ``ts``."""
        versions = self._anchors.get(user_id)
        return None if versions is None else versions.at(ts)

    def profiles(self) -> Iterator[Profile]:
        """The users' profiles now, as the profiles role would keep them."""
        return self._refresh.profiles()

    def _close(self, watermark: int) -> list[str]:
        return [joined.recall.request_id for joined in self._joiner.close(watermark)]

    def _label(self, request_id: str) -> Label:
        joined = self._joiner.rejoin(request_id)
        anchors = self.anchors(joined.recall.user_id, joined.recall.ts)
        return make_label(
            joined, self._partition, anchors, self._calibration, self._catalogue.lookup, self._label_versions
        )

    def _vector_of(self, item_id: str) -> NDArray[np.float32] | None:
        row = int(self._catalogue.rows([item_id])[0])
        return None if row < 0 else self._catalogue.vectors[row]

    def _answer(self, request: AnchorRequest) -> None:
        self.refreshes[request.reason] += 1
        used, vectors = self._catalogue.lookup(request.positives)
        anchors: Anchors | None = None
        if used:
            history = History(self._catalogue.sids[self._catalogue.rows(used)], vectors)
            beams = self._generator.generate([history], self._trie, self._settings.generator.beams)[0]
            anchors = anchors_of(beams, self._trie.centroids, history)
        record = anchors_record(request, used, anchors, self._versions)
        dim = self._catalogue.dim
        prepared = anchor_set(record, self._label_versions.space, dim, self._catalogue.levels, self._config)
        self._anchors.setdefault(record.user_id, AsOf()).put(record.ts, prepared)
        in_force = AnchorsInForce(record.version, record.ts, self._versions, vectors_from(record.vectors, dim))
        self._refresh.answer(record.user_id, in_force)
        self.answers.append(record)
