"""``gpl backfill``: the first model and the first anchors from history, by the code that the stream runs."""

from __future__ import annotations

import heapq
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import msgspec

from gpl.artefacts import Artefacts
from gpl.catalogue import Catalogue
from streams.contracts import Item, Label, decode
from streams.data.reader import records
from streams.durable import sha256_hex
from streams.fitting import catalogue_of, usable
from streams.frame import Frame
from streams.history.partition import ANCHORS, LABELS, PROFILES, Done, Task, file_of, label_partition, save_catalogue
from streams.kafka import check_size, producer
from streams.parent import end_with_parent
from streams.settings import KafkaSettings, Settings
from streams.storage import open_storage
from streams.topics import full_name
from streams.trainer.checkpoint import CheckpointStore
from streams.trainer.trainer import Trainer

Say = Callable[[str], None]

_BEGUN, _COMPLETE = "begun.json", "complete.json"
_CHUNK = 500  # records that are sent before their answers are waited for
_SEND_SECONDS = 60.0


class _Keyed(msgspec.Struct):
    user_id: str


class _Marker(msgspec.Struct, omit_defaults=True):
    """Of which data directory, on how many partitions, a backfill is. ``checkpoint``, until it is complete:
    checksum of the state of the one that is about to be saved."""

    data: str
    partitions: int
    checkpoint: str | None = None


class BackfillError(ValueError):
    """What stands in the way of a backfill; the message says what to do."""


@dataclass(frozen=True)
class Outcome:
    """What a backfill has made. ``metrics``: progressive validation of the checkpoint's model."""

    labels: int
    users: int
    refreshes: Counter[str]
    checkpoint: str
    metrics: dict[str, float]


def backfill(data: Path, out: Path, settings: Settings, processes: int, ray: bool, say: Say) -> Outcome:
    """Label all of a data directory, then train the first checkpoint on its labels, in the order of their closing.

    ``out``: a new or empty directory for labels, anchors and profiles, a file a partition; or that of a backfill of the
    same data that was killed or failed, which begins anew. Nothing of the outcome depends on ``processes``. Events
    further ahead of the clock than the stream takes are passed over. Raises BackfillError where there is already a
    checkpoint or ``out`` is another's, FileNotFoundError for missing files, ImportError without ray where it is asked
    for, ValueError for items that cannot be encoded.
    """
    for name in ("items.jsonl", "recalls.jsonl", "feedback.jsonl"):
        if not (data / name).is_file():
            raise FileNotFoundError(f"{data / name} does not exist")
    own = settings.trainer
    store = CheckpointStore(own.checkpoints, own.keep_checkpoints, own.keep_hourly_checkpoints)
    begun, ours = _begun(out), _marker(data, settings)
    newest = store.load_newest()
    if newest is not None and (begun is None or begun.checkpoint != sha256_hex(newest.state)):
        raise BackfillError(f"trainer.checkpoints: {own.checkpoints} has checkpoints; a backfill makes the first one")
    storage = open_storage(out)
    there = out.is_file() or bool(storage.names())  # killed at its first write, it leaves nothing but the directory
    if there and (begun is None or (begun.data, begun.partitions) != (ours.data, ours.partitions)):
        raise BackfillError(f"{out} exists; a backfill writes to a new or an empty directory")
    artefacts = Artefacts.load(settings.artefacts)
    items = list(usable(records(data / "items.jsonl", Item, settings.kafka.max_record_bytes), say))
    if not items:
        raise BackfillError(f"{data / 'items.jsonl'}: no valid record")
    catalogue = catalogue_of(items, artefacts, settings.space)
    if begun is not None:
        say(f"{out} was not finished, it is made anew")
    if newest is not None:  # of the killed one
        store.discard_after(newest.step - 1)
    storage.recover()
    storage.put(_BEGUN, msgspec.json.encode(ours))
    path = (out / "catalogue.npz").resolve()
    save_catalogue(catalogue, path)
    # One moment for all: which events count must not depend on when a worker comes to them.
    max_ahead = settings.labels.max_ahead_seconds
    until = int((time.time() + max_ahead) * 1000)
    tasks = [Task(data.resolve(), path, out.resolve(), p, until, settings) for p in range(settings.kafka.partitions)]
    done = _on_ray(tasks) if ray else _on_this_machine(tasks, processes)
    if ahead := sum(d.ahead for d in done):
        say(f"{ahead:,} events passed over, over {max_ahead:g} s ahead of the clock (gpl validate names them)")
    refreshes: Counter[str] = sum((d.refreshes for d in done), Counter())
    say(f"{sum(d.labels for d in done):,} requests labelled, anchors of {sum(d.users for d in done):,} users")
    trainer = _train(out, settings, artefacts, catalogue)
    checkpoint = trainer.checkpoint(positions={}, journal=0)
    # Killed from here on, it is known by this whose the checkpoint is.
    saving = msgspec.structs.replace(ours, checkpoint=sha256_hex(checkpoint.state))
    storage.put(_BEGUN, msgspec.json.encode(saving))
    where = store.save(checkpoint)
    storage.put(_COMPLETE, msgspec.json.encode(ours))
    storage.remove(_BEGUN)
    return Outcome(sum(d.labels for d in done), sum(d.users for d in done), refreshes, where, dict(checkpoint.metrics))


def is_complete(data: Path, out: Path, settings: Settings) -> bool:
    """Whether ``out`` is what a backfill of this data directory, on as many partitions, has made to its end.

    Says nothing of checkpoints: see ``has_checkpoints``.
    """
    marker = out / _COMPLETE
    return marker.is_file() and marker.read_bytes() == msgspec.json.encode(_marker(data, settings))


def has_checkpoints(settings: Settings) -> bool:
    """Whether a trainer under these settings would go on from a checkpoint, in whatever state."""
    return bool(CheckpointStore(settings.trainer.checkpoints, keep=1).steps())


def _begun(out: Path) -> _Marker | None:
    """What a backfill that was not finished has left in ``out``."""
    path = out / _BEGUN
    if not path.is_file() or (out / _COMPLETE).is_file():
        return None
    return msgspec.json.decode(path.read_bytes(), type=_Marker)


def _marker(data: Path, settings: Settings) -> _Marker:
    return _Marker(str(data.resolve()), settings.kafka.partitions)


def publish(out: Path, settings: Settings) -> dict[str, int]:
    """Put a backfill's anchors and profiles on their topics, so that the roles go on from them. Records by topic.

    For topics on which the roles have written nothing yet; one that failed can be repeated, for each user's newest
    record counts. The calibration comes with the first labels worker. Raises kafka errors when the broker refuses a
    record, RecordTooLargeError.
    """
    kafka, counts = settings.kafka, {}
    with producer(kafka) as sending:
        for topic, kind in (("user-anchors", ANCHORS), ("profiles", PROFILES)):
            name, counts[topic] = full_name(kafka, topic), 0
            for partition in range(kafka.partitions):
                with file_of(out, kind, partition).open("rb") as lines:
                    while chunk := list(islice(lines, _CHUNK)):
                        sent = [_send(sending, kafka, name, partition, line.rstrip(b"\n")) for line in chunk]
                        for future in sent:
                            future.get(timeout=_SEND_SECONDS)
                        counts[topic] += len(sent)
    return counts


def _send(sending: Any, kafka: KafkaSettings, topic: str, partition: int, line: bytes) -> Any:
    key = msgspec.json.decode(line, type=_Keyed).user_id.encode()
    check_size(kafka, topic, key, line)
    return sending.send(topic, key=key, value=line, partition=partition)


def labels_in_order(out: Path, partitions: int) -> Iterator[Label]:
    """All labels by event time, then request: an order that no number of processes changes."""
    files = (_labels(file_of(out, LABELS, partition)) for partition in range(partitions))
    return heapq.merge(*files, key=lambda label: (label.ts, label.request_id))


def _labels(path: Path) -> Iterator[Label]:
    with path.open("rb") as lines:
        for line in lines:
            yield decode(Label, line)


def _train(out: Path, settings: Settings, artefacts: Artefacts, catalogue: Catalogue) -> Trainer:
    trainer = Trainer(settings.trainer, Frame.of(artefacts), catalogue, evaluations=False)
    batch: list[Label] = []
    for label in labels_in_order(out, settings.kafka.partitions):
        batch.append(label)
        if len(batch) == settings.trainer.batch_records:
            trainer.step(batch)
            batch = []
    if batch:
        trainer.step(batch)
    return trainer


def _on_this_machine(tasks: Sequence[Task], processes: int) -> list[Done]:
    if processes == 1:
        return [label_partition(task) for task in tasks]
    # Killed, it must not leave workers behind: they would go on with the tasks that are in the queue.
    with ProcessPoolExecutor(processes, get_context("spawn"), initializer=end_with_parent) as pool:
        return list(pool.map(label_partition, tasks))


def _on_ray(tasks: Sequence[Task]) -> list[Done]:
    import ray

    started = not ray.is_initialized()
    if started:
        ray.init(log_to_driver=False)
    try:
        remote: Any = ray.remote(label_partition)
        done: list[Done] = ray.get([remote.remote(task) for task in tasks])
    finally:
        if started:
            ray.shutdown()
    return done
