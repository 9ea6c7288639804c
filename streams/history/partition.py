"""One partition of a data directory, labelled: the unit that processes, or Ray's workers, take.

Users go to partitions as they do on the topics, so a partition's labels are the same whoever makes them, and how many
others there are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import numpy as np
from kafka.partitioner.default import murmur2

from gpl.artefacts import Artefacts
from gpl.catalogue import Catalogue
from streams.contracts import Feedback, Recall, UserAnchors, encode
from streams.data.reader import records
from streams.durable import replacing
from streams.history.pipeline import Event, Pipeline, in_event_time
from streams.settings import Settings

LABELS, ANCHORS, PROFILES = "labels", "anchors", "profiles"


@dataclass(frozen=True)
class Task:
    """What one worker needs; paths are of a file system that all workers see. ``until``: events of later times are
    passed over."""

    data: Path
    catalogue: Path
    out: Path
    partition: int
    until: int
    settings: Settings


@dataclass
class Done:
    """What came of a partition. ``refreshes``: anchor requests by reason; ``ahead``: events passed over."""

    partition: int
    labels: int = 0
    users: int = 0
    ahead: int = 0
    refreshes: Counter[str] = field(default_factory=Counter)


def partition_of(user_id: str, partitions: int) -> int:
    """Where Kafka's default partitioner puts a user's records."""
    hashed: int = murmur2(user_id.encode()) & 0x7FFFFFFF
    return hashed % partitions


def file_of(directory: Path, kind: str, partition: int) -> Path:
    """The file of one kind of a partition's outcome, JSON lines."""
    return directory / f"{kind}-{partition:04d}.jsonl"


def save_catalogue(catalogue: Catalogue, path: Path) -> None:
    """For ``load_catalogue`` in another process."""
    rows = catalogue.rows(catalogue.ids())
    ids = np.frombuffer(msgspec.json.encode(catalogue.ids()), np.uint8)
    np.savez(path, ids=ids, vectors=catalogue.vectors[rows], sids=catalogue.sids[rows])


def load_catalogue(path: Path) -> Catalogue:
    with np.load(path, allow_pickle=False) as saved:
        ids, vectors, sids = (
            msgspec.json.decode(saved["ids"].tobytes(), type=list[str]),
            saved["vectors"],
            saved["sids"],
        )
    catalogue = Catalogue(vectors.shape[1], sids.shape[1])
    for item_id, vector, sid in zip(ids, vectors, sids, strict=True):
        catalogue.put(item_id, vector, sid)
    return catalogue


def label_partition(task: Task) -> Done:
    """Label a partition: its labels by closing time, each user's newest anchors, and the profiles, as files."""
    settings = task.settings
    pipeline = Pipeline(settings, Artefacts.load(settings.artefacts), load_catalogue(task.catalogue), task.partition)
    done, newest = Done(task.partition), dict[str, UserAnchors]()
    with replacing(file_of(task.out, LABELS, task.partition)) as labels:
        for label in pipeline.run(in_event_time(_events(task, done))):
            labels.write(encode(label) + b"\n")
            done.labels += 1
            newest.update((anchors.user_id, anchors) for anchors in pipeline.answers)
            pipeline.answers.clear()
    newest.update((anchors.user_id, anchors) for anchors in pipeline.answers)
    with replacing(file_of(task.out, ANCHORS, task.partition)) as out:
        out.writelines(encode(newest[user]) + b"\n" for user in sorted(newest))
    profiles = {profile.user_id: profile for profile in pipeline.profiles()}
    with replacing(file_of(task.out, PROFILES, task.partition)) as out:
        out.writelines(encode(profiles[user]) + b"\n" for user in sorted(profiles))
    done.users, done.refreshes = len(newest), pipeline.refreshes
    return done


def _events(task: Task, done: Done) -> Iterator[tuple[int, Event]]:
    cap, partitions = task.settings.kafka.max_record_bytes, task.settings.kafka.partitions
    files: tuple[Iterator[Event], ...] = (
        records(task.data / "recalls.jsonl", Recall, cap),
        records(task.data / "feedback.jsonl", Feedback, cap),
    )
    for events in files:
        mine = (event for event in events if partition_of(event.user_id, partitions) == task.partition)
        for numbered in enumerate(mine):
            if numbered[1].ts > task.until:
                done.ahead += 1
            else:
                yield numbered
