"""One step of training, and everything that must survive it. No Kafka, no wall clock.

The weights after a step are a function of the settings, the item vectors and the sequence of batches, so a trainer
that is killed and resumed ends where an undisturbed one does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
import torch

from gpl.catalogue import Catalogue
from gpl.labels.matching import Floats
from gpl.preranker.batch import Batch
from gpl.preranker.ids import IdTable
from gpl.preranker.learner import Learner
from gpl.preranker.loss import LossConfig
from gpl.preranker.model import PreRanker
from streams import metrics, models
from streams.contracts import Label
from streams.frame import Frame
from streams.settings import TrainerSettings
from streams.trainer.batch import Prepared, prepare
from streams.trainer.checkpoint import Checkpoint
from streams.trainer.dedup import DedupWindow, Trained
from streams.trainer.publish import Candidate
from streams.trainer.validation import Evaluated, ProgressiveWindow, ranks, tail_threshold

MAIN, SHADOW = "gpl", "exposed"
"""Model names in metrics and in the journal: trained with pseudo-labels, and on exposed labels only."""

_FILES = {MAIN: "model", SHADOW: "shadow"}


class _State(msgspec.Struct):
    """What a checkpoint holds beside tensors. ``journal``: its length in bytes."""

    users: list[str]
    items: list[str]
    exposures: list[int]
    dedup: list[tuple[str, Trained]]
    window: list[Evaluated]
    newest_at: int | None
    journal: int


class Trainer:
    """The pre-ranker being trained, its exposed-only twin where wanted, and the state around them.

    ``catalogue`` is read only, at each step as it is then.
    """

    def __init__(self, settings: TrainerSettings, frame: Frame, catalogue: Catalogue) -> None:
        self._settings = settings
        self._frame = frame
        self._catalogue = catalogue
        self._learners = {MAIN: self._learner(settings.pseudo_weight, settings.negatives_weight)}
        if settings.shadow:
            self._learners[SHADOW] = self._learner(0.0, 0.0)
        self._users, self._items = IdTable(), IdTable()
        self._exposures = np.zeros(1, np.int64)  # by item row; row 0 is the unknown item
        self._dedup = DedupWindow(settings.dedup_requests)
        self._window = ProgressiveWindow(settings.window_records)
        self._newest_at: int | None = None
        self.step_count = 0
        self.newest_event_ts = 0

    def step(self, labels: Sequence[Label], newest_at: int | None = None) -> list[dict[str, Any]]:
        """Score, then train on, one mini-batch of checked label records; redeliveries in it are dropped.

        ``newest_at``: the newest source record of the batch, wall milliseconds. Returns the journal's lines.
        Raises FloatingPointError when the model scores the batch with what is not a number.
        """
        self.step_count += 1
        prepared = [p for label in labels if (p := self._admit(label)) is not None]
        if newest_at is not None:
            self._newest_at = max(newest_at, self._newest_at or 0)
        trainable = [p for p in prepared if p.items]
        lines: list[dict[str, Any]] = []
        if trainable:
            batch = Batch.collate([p.example for p in trainable])
            content = self._catalogue.vectors
            self._grow()
            lines = self._validate(trainable, batch, content)
            for learner in self._learners.values():
                learner.step(batch, content)
            for p in trainable:
                np.add.at(self._exposures, p.example.item_row[: p.exposed], 1)
        metrics.TRAINER_STEPS.inc()
        metrics.TRAINER_RECORDS.inc(len(prepared))
        return lines

    def figures(self) -> dict[str, dict[str, float]]:
        """Progressive validation by model name, over the present window."""
        return {name: self._window.summary(name) for name in self._learners}

    def checkpoint(self, positions: Mapping[int, int], journal: int) -> Checkpoint:
        """Everything after the last step, with the log positions and the journal's length that belong to it.

        Raises FloatingPointError when training has diverged: nothing can be resumed from such weights.
        """
        tensors = {_FILES[name]: learner.state_tensors() for name, learner in self._learners.items()}
        for model, part in tensors.items():
            for name, tensor in part.items():
                if not bool(torch.isfinite(tensor).all()):
                    raise FloatingPointError(f"{model}, {name}: not finite at step {self.step_count}")
        state = _State(
            users=self._users.to_list(),
            items=self._items.to_list(),
            exposures=self._exposures.tolist(),
            dedup=self._dedup.state(),
            window=self._window.state(),
            newest_at=self._newest_at,
            journal=journal,
        )
        return Checkpoint(
            step=self.step_count,
            positions=dict(positions),
            tensors=tensors,
            state=msgspec.json.encode(state),
            versions=self._frame.versions,
            metrics=self._window.summary(MAIN),
            newest_event_ts=self.newest_event_ts,
        )

    def restore(self, checkpoint: Checkpoint) -> int:
        """Take over a checkpoint. Returns the journal's length.

        Raises ValueError, naming what differs, when it belongs to another space or to other settings.
        """
        if dict(checkpoint.versions) != self._frame.versions:
            raise ValueError(
                f"checkpoint of step {checkpoint.step}: versions {dict(checkpoint.versions)}, the artefacts have "
                f"{self._frame.versions}; a new space needs new trainer.checkpoints"
            )
        state = msgspec.json.decode(checkpoint.state, type=_State)
        for name, learner in self._learners.items():
            if _FILES[name] not in checkpoint.tensors:
                raise ValueError(
                    f"trainer.shadow: true, but the checkpoint of step {checkpoint.step} was made without a shadow, "
                    "which cannot catch up; set it to false or start from other trainer.checkpoints"
                )
            learner.load_state_tensors(checkpoint.tensors[_FILES[name]])
        self._users, self._items = IdTable.from_list(state.users), IdTable.from_list(state.items)
        self._exposures = np.array(state.exposures, np.int64)
        self._dedup.restore(state.dedup)
        self._window.restore(state.window)
        self._newest_at = state.newest_at
        self.step_count = checkpoint.step
        self.newest_event_ts = checkpoint.newest_event_ts
        return state.journal

    def candidate(self, positions: Mapping[int, int]) -> Candidate:
        """The main model as it could be published now."""
        return Candidate(
            step=self.step_count,
            weights=self._learners[MAIN].model.state_tensors(),
            ids=models.Ids(self._users.to_list(), self._items.to_list()),
            config={"dim": self._settings.dim, "dim_content": self._frame.dim},
            versions=self._frame.versions,
            positions=dict(positions),
            metrics=self._window.summary(MAIN),
            evaluated=len(self._window),
            newest_event_ts=self.newest_event_ts,
            newest_at=self._newest_at,
        )

    def _learner(self, pseudo_weight: float, negatives_weight: float) -> Learner:
        settings = self._settings
        # The same seed for both: they start from the same weights.
        model = PreRanker(self._frame.dim, settings.dim, settings.seed)
        loss = LossConfig(settings.loss, pseudo_weight, negatives_weight)
        return Learner(model, loss, settings.learning_rate, settings.weight_decay)

    def _admit(self, label: Label) -> Prepared | None:
        space = (label.provenance.encoder, label.provenance.quantiser)
        if space != (self._frame.encoder, self._frame.quantiser):
            metrics.TRAINER_SKIPPED.labels("other_space").inc()  # its scores mean nothing beside these vectors
            return None
        fresh = self._dedup.admit(label)
        if fresh is None:
            metrics.DUPLICATES.labels("labels").inc()
            return None
        prepared = prepare(label, fresh, self._users, self._items, self._catalogue)
        metrics.TRAINER_SKIPPED.labels("no_vector").inc(prepared.skipped)
        self.newest_event_ts = max(self.newest_event_ts, label.ts)
        return prepared

    def _grow(self) -> None:
        rows = len(self._items) + 1
        for learner in self._learners.values():
            learner.model.grow(len(self._users) + 1, rows)
        if rows > len(self._exposures):
            self._exposures = np.concatenate([self._exposures, np.zeros(rows - len(self._exposures), np.int64)])

    def _validate(self, prepared: Sequence[Prepared], batch: Batch, content: Floats) -> list[dict[str, Any]]:
        with torch.no_grad():
            logits = {name: learner.model(batch, content).full.numpy() for name, learner in self._learners.items()}
        for name, values in logits.items():
            if not np.isfinite(values).all():
                raise FloatingPointError(f"{name}: training has diverged before step {self.step_count}")
        threshold = tail_threshold(self._exposures[1:])
        lines: list[dict[str, Any]] = []
        start = 0
        for p in prepared:
            end = start + len(p.items)
            if p.first:
                own = {name: values[start:end] for name, values in logits.items()}
                evaluated = self._evaluate(p, own, threshold)
                self._window.add([evaluated])
                lines += _journal_lines(p, evaluated)
            start = end
        return lines

    def _evaluate(self, p: Prepared, logits: Mapping[str, Floats], threshold: float) -> Evaluated:
        # Without pseudo-labels a record does not name the other candidates, so there is nothing to rank among.
        ranked = len(p.items) > p.exposed
        clicked = np.flatnonzero(p.example.clicked) if ranked else np.zeros(0, np.int64)
        return Evaluated(
            user=p.label.user_id,
            clicked=p.example.clicked.astype(int).tolist(),
            logits={name: values[: p.exposed].tolist() for name, values in logits.items()},
            tail=(self._exposures[p.example.item_row[clicked]] <= threshold).tolist(),
            ranks={name: ranks(values, clicked.tolist()) for name, values in logits.items()},
        )


def _journal_lines(p: Prepared, evaluated: Evaluated) -> Iterator[dict[str, Any]]:
    about = {"request_id": p.label.request_id, "user_id": p.label.user_id, "ts": p.label.ts}
    for i, clicked in enumerate(evaluated.clicked):
        scores = {name: values[i] for name, values in evaluated.logits.items()}
        yield {"kind": "score", **about, "item": p.items[i], "clicked": clicked, "score": scores}
    if evaluated.tail:
        items = [item for item, clicked in zip(p.items, evaluated.clicked, strict=False) if clicked]
        for i, item in enumerate(items):
            rank = {name: values[i] for name, values in evaluated.ranks.items()}
            tail = evaluated.tail[i]
            yield {"kind": "rank", **about, "item": item, "tail": tail, "n": len(p.items), "rank": rank}
