"""A synthetic site for the labels role: a catalogue, users with anchors, and requests with their feedback.

Everything follows from a seed. Half of a request's candidates are drawn by popularity (Zipf, exponent 1), half
uniformly, without repeats; of ten that are shown one is clicked.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gpl.artefacts import Artefacts
from gpl.catalogue import ItemContent
from gpl.fit import Event, FitOptions, fit
from streams.bench.synthetic import drawn_history
from streams.contracts import Calibration, Feedback, ItemVector, Recall, UserAnchors, encode
from streams.kafka import producer
from streams.settings import KafkaSettings
from streams.topics import full_name
from streams.views import vector_bytes

Sent = tuple[str, bytes, bytes, int | None]
"""Topic, key, value and partition (None: the key's) of a record, ready to be produced."""

FITTED_ITEMS = 2_000
"""Items that space and quantiser are fitted on; those of the catalogue are drawn in the same space."""


@dataclass(frozen=True)
class Load:
    """What is asked of the worker. ``shown``: impressions a request, the first of them clicked."""

    items: int = 100_000
    users: int = 5_000
    candidates: int = 1_000
    shown: int = 10
    dim: int = 384
    anchors: int = 10
    seed: int = 0


def save_artefacts(load: Load, target: Path) -> None:
    """Fit a space, a quantiser and the history generator on random vectors, and save them."""
    rng = np.random.default_rng(load.seed)
    rows = rng.standard_normal((FITTED_ITEMS, load.dim), dtype=np.float32)
    items = [ItemContent(f"fitted-{i}", "", row.tolist()) for i, row in enumerate(rows)]
    events = [Event(f"past-{u}", f"fitted-{rng.integers(FITTED_ITEMS)}", t, True) for u in range(30) for t in range(5)]
    fit(items, events, None, FitOptions(generator="history"), seed=load.seed).save(target)


class Workload:
    """The records of a load, for the artefacts that label it."""

    def __init__(self, load: Load, artefacts: Path) -> None:
        self.load = load
        loaded = Artefacts.load(artefacts)
        self._encoder, self._quantiser = loaded.space.version, loaded.quantiser.version
        self._levels = loaded.quantiser.levels
        self._rng = np.random.default_rng(load.seed + 1)
        weight = 1 / np.arange(1, load.items + 1)
        self._popular = np.cumsum(weight / weight.sum())

    def publish_state(self, kafka: KafkaSettings) -> None:
        """Put the catalogue's vectors, the users' anchors and a calibration on their topics."""
        load, rng = self.load, np.random.default_rng(self.load.seed + 2)
        with producer(kafka) as out:
            for start in range(0, load.items, 1_000):
                for i, row in enumerate(_unit(rng, min(1_000, load.items - start), load.dim), start):
                    item = ItemVector(
                        f"item-{i}", vector_bytes(row), [0] * self._levels, "bench", self._encoder, self._quantiser
                    )
                    out.send(full_name(kafka, "item-vectors"), key=item.item_id.encode(), value=encode(item))
            for u in range(load.users):
                anchors = UserAnchors(
                    user_id=f"user-{u}",
                    ts=0,
                    version=1,
                    sid=[[k % 7, 0, 0][: self._levels] for k in range(load.anchors)],
                    logprob=np.linspace(-1, -6, load.anchors).round(6).tolist(),
                    vectors=vector_bytes(_unit(rng, load.anchors, load.dim)),
                    history_factor=rng.uniform(0, 1, load.anchors).round(6).tolist(),
                    history=drawn_history(self._popular, rng),
                    generator="bench",
                    quantiser=self._quantiser,
                    encoder=self._encoder,
                )
                out.send(full_name(kafka, "user-anchors"), key=anchors.user_id.encode(), value=encode(anchors))
            calibration = Calibration("bench", 0, "platt", 5.0, -3.0, 1_000)
            out.send(full_name(kafka, "calibrations"), key=b"platt", value=encode(calibration))

    def request(self, n: int, ts: int, candidates: list[str]) -> list[Recall | Feedback]:
        """The ``n``-th request, of a random user at ``ts``, with its feedback."""
        user, shown = f"user-{self._rng.integers(self.load.users)}", candidates[: self.load.shown]
        impressions = [
            Feedback(f"e{n}-{k}", user, item, ts + 1 + k, "impression", f"r{n}", k) for k, item in enumerate(shown)
        ]
        click = Feedback(f"c{n}", user, candidates[0], ts + 2 + len(shown), "click", f"r{n}", 0)
        return [Recall(f"r{n}", user, ts, candidates), *impressions, click]

    def requests(self, start_ms: int, step_ms: float, count: int, first: int = 0) -> Iterator[list[Recall | Feedback]]:
        """Requests ``step_ms`` of event time apart; ids count on from ``first``."""
        for n in range(count):
            yield self.request(first + n, start_ms + int(n * step_ms), self.candidates())

    def closed(
        self, start_ms: int, step_ms: int, count: int, pause_ms: int, partitions: int, first: int = 0
    ) -> list[Sent]:
        """`requests`, and ``pause_ms`` after the last one a request in each partition, before which all can close."""
        sent = [_sent(record) for records in self.requests(start_ms, step_ms, count, first) for record in records]
        end_ms = start_ms + count * step_ms + pause_ms
        for partition, records in enumerate(self.requests(end_ms, 0, partitions, first + count)):
            sent += [_sent(record, partition) for record in records]
        return sent

    def candidates(self) -> list[str]:
        """Ids of what was recalled, drawn anew."""
        load = self.load
        drawn = np.empty(0, np.int64)
        while len(drawn) < load.candidates:
            popular = np.searchsorted(self._popular, self._rng.random(load.candidates))
            uniform = self._rng.integers(0, load.items, load.candidates)
            both = np.stack([np.minimum(popular, load.items - 1), uniform], axis=1).ravel()
            _, first = np.unique(np.concatenate([drawn, both]), return_index=True)
            drawn = np.concatenate([drawn, both])[np.sort(first)]
        return [f"item-{row}" for row in drawn[: load.candidates].tolist()]


def send(kafka: KafkaSettings, records: list[Sent]) -> None:
    """Produce all of it as fast as it goes."""
    with producer(kafka, linger_ms=20, batch_size=2**18) as out:
        for topic, key, value, partition in records:
            out.send(full_name(kafka, topic), key=key, value=value, partition=partition)


def _sent(record: Recall | Feedback, partition: int | None = None) -> Sent:
    topic = "recalls" if isinstance(record, Recall) else "feedback"
    return topic, record.user_id.encode(), encode(record), partition


def _unit(rng: np.random.Generator, rows: int, dim: int) -> NDArray[np.float32]:
    vectors = rng.standard_normal((rows, dim), dtype=np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors
