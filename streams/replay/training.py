"""What other training settings would have done: the replayed labels trained on twice, from the same start.

Progressive validation, as the trainer does it: each request is scored by both models before either is trained on it.
"""

from __future__ import annotations

import heapq
import tempfile
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray

from gpl.arrays import sigmoid
from gpl.catalogue import Catalogue
from gpl.evaluation.intervals import bootstrap_mean_ci, paired_difference_ci
from gpl.evaluation.metrics import auc, gauc, log_loss
from streams.contracts import Label, decode, encode
from streams.frame import Frame
from streams.replay.run import Result
from streams.settings import TrainerSettings
from streams.trainer.trainer import MAIN, Trainer
from streams.trainer.validation import TOP

Columns = dict[str, list[Any]]


class Spool:
    """An output that keeps the labels in files, to be trained on in the order of the requests."""

    name = "for training"

    def __init__(self) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="gpl-replay-")
        self._files: dict[int, IO[bytes]] = {}

    def write(self, result: Result) -> None:
        if result.label is None:
            return
        partition = result.request.partition
        if partition not in self._files:
            self._files[partition] = self._path(partition).open("wb")
        self._files[partition].write(encode(result.label) + b"\n")

    def finish(self, about: Mapping[str, Any]) -> None:
        for file in self._files.values():
            file.close()

    def labels(self) -> Iterator[Label]:
        """Every label, by time of its request; of the partitions the least one first where they are equal."""
        yield from heapq.merge(
            *(self._read(partition) for partition in sorted(self._files)), key=lambda label: label.ts
        )

    def close(self) -> None:
        self._directory.cleanup()

    def _path(self, partition: int) -> Path:
        return Path(self._directory.name) / f"{partition}.jsonl"

    def _read(self, partition: int) -> Iterator[Label]:
        with self._path(partition).open("rb") as lines:
            for line in lines:
                yield decode(Label, line)


def trained(
    spool: Spool, frame: Frame, catalogue: Catalogue, in_force: TrainerSettings, asked: TrainerSettings
) -> dict[str, Any]:
    """Both trainings and their figures, JSON-ready: ``in_force`` and ``asked``, and the difference of the second to the
    first with 95% intervals from resampling users.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # small batches; the same bits on every machine of a kind
    try:
        trainers = [
            Trainer(settings.model_copy(update={"shadow": False}), frame, catalogue) for settings in (in_force, asked)
        ]
        scores: Columns = {"user": [], "clicked": [], "0": [], "1": []}
        ranks: Columns = {"user": [], "tail": [], "0": [], "1": []}
        labels, records = spool.labels(), 0
        while batch := list(islice(labels, in_force.batch_records)):
            records += len(batch)
            for place, trainer in enumerate(trainers):
                _collect(trainer.step(batch), place, scores, ranks)
    finally:
        torch.set_num_threads(threads)
    said = [_figures(place, scores, ranks) for place in (0, 1)]
    for figures, trainer, settings in zip(said, trainers, (in_force, asked), strict=True):
        # What scaled lambda in the end; at 0 the pseudo-labels counted for nothing, whatever lambda says.
        figures["evidence"] = float(trainer.evidence().weight) if settings.evidence else 1.0
    return {
        "records": records,
        "steps": trainers[0].step_count,
        "clicks": len(ranks["user"]),
        "in_force": said[0],
        "asked": said[1],
        "difference": _difference(scores, ranks),
    }


def _collect(lines: list[dict[str, Any]], place: int, scores: Columns, ranks: Columns) -> None:
    """Both trainers admit the same records, so their lines are parallel."""
    for line in lines:
        columns, value = (scores, line["score"]) if line["kind"] == "score" else (ranks, line["rank"])
        columns[str(place)].append(value[MAIN])
        if place == 0:
            columns["user"].append(line["user_id"])
            if columns is scores:
                columns["clicked"].append(line["clicked"])
            else:
                columns["tail"].append(line["tail"])


def _figures(place: int, scores: Columns, ranks: Columns) -> dict[str, float | None]:
    clicked, users = np.array(scores["clicked"]), np.array(scores["user"])
    logits = np.array(scores[str(place)], np.float64)
    hits, tail = _hits(place, ranks), np.array(ranks["tail"], bool)
    figures: dict[str, float | None] = dict.fromkeys(("auc", "gauc", "log_loss", "hr10", "hr10_tail"))
    if len(clicked):
        figures["auc"] = auc(clicked, logits)
        figures["gauc"] = gauc(clicked, logits, users)
        figures["log_loss"] = log_loss(clicked, sigmoid(logits))
    if len(hits):
        figures["hr10"] = float(hits.mean())
    if tail.any():
        figures["hr10_tail"] = float(hits[tail].mean())
    return {name: value if value is None or np.isfinite(value) else None for name, value in figures.items()}


def _hits(place: int, ranks: Columns) -> NDArray[np.float64]:
    return np.array([rank <= TOP for rank in ranks[str(place)]], np.float64)


def _difference(scores: Columns, ranks: Columns) -> dict[str, list[float | None]]:
    """Asked less in force: estimate, low, high."""
    found: dict[str, list[float | None]] = {}
    users, tail = np.array(ranks["user"]), np.array(ranks["tail"], bool)
    for name, chosen in (("hr10", np.ones(len(tail), bool)), ("hr10_tail", tail)):
        interval = paired_difference_ci(_hits(1, ranks)[chosen], _hits(0, ranks)[chosen], users[chosen], seed=0)
        found[name] = [value if np.isfinite(value) else None for value in interval]
    clicked = np.array(scores["clicked"], np.float64)
    losses = [np.logaddexp(0, x) - clicked * x for x in (np.array(scores[p], np.float64) for p in ("1", "0"))]
    interval = bootstrap_mean_ci(losses[0] - losses[1], np.array(scores["user"]), seed=0)
    found["log_loss"] = [value if np.isfinite(value) else None for value in interval]
    return found
