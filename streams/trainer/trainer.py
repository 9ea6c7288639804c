"""One step of training, and everything that must survive it. No Kafka, no wall clock.

The weights after a step are a function of the settings, the item vectors and the sequence of batches, so a trainer
that is killed and resumed ends where an undisturbed one does, and a model can be made again from the batch journal.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
import torch

from gpl.arrays import grown
from gpl.catalogue import Catalogue
from gpl.labels.evidence import Reading
from gpl.labels.matching import Floats, Ints
from gpl.labels.mixed import MixedCalibration
from gpl.preranker.batch import Batch
from gpl.preranker.division import Division, Each
from gpl.preranker.ids import GrowingIds
from gpl.preranker.learner import Learner
from gpl.preranker.loss import LossConfig
from gpl.preranker.model import ROWS_OF, PreRanker
from streams import metrics, models
from streams.contracts import Label
from streams.frame import Frame
from streams.settings import TrainerSettings
from streams.trainer import probe
from streams.trainer.batch import Prepared, Request, Rows, prepare
from streams.trainer.calibration import CalibrationWindow
from streams.trainer.checkpoint import Checkpoint, CheckpointError
from streams.trainer.columns import Columns, columns
from streams.trainer.dedup import DedupWindow, Known, Trained
from streams.trainer.evidence import SourcedEvidence
from streams.trainer.journal import journal_lines
from streams.trainer.publish import Candidate
from streams.trainer.validation import Bools, ProgressiveWindow, evaluate, tail_threshold

MAIN, SHADOW = "gpl", "exposed"
"""Model names in metrics and in the journal: trained with pseudo-labels, and on exposed labels only."""

_FILES = {MAIN: "model", SHADOW: "shadow"}
_EXPIRY_STEPS = 256  # between looks for ids that were not seen for long; it costs as much as there are ids
_TAIL_STEPS = 64  # between looks at what is the less popular half of the items,
_FEW_ITEMS = 4096  # unless there are so few that it costs nothing


_START: Mapping[int, int] = {}


class _State(msgspec.Struct):
    """What a checkpoint holds beside tensors. ``journal``: length of the evaluation journal in bytes."""

    users: list[str | None]
    items: list[str | None]
    dedup: list[tuple[str, Trained]]
    window: list[str]
    tail: float
    records: int
    newest_at: int | None
    journal: int
    evidence_sources: list[str] | None = None  # of checkpoints that kept one evidence for all
    mixed_sources: list[str] | None = None  # without pointwise labels there are none
    asked: models.Probe = models.NO_PROBE  # older checkpoints have none
    forgot: bool = False


class Trainer:
    """The pre-ranker being trained, its exposed-only twin where wanted, and the state around them.

    ``catalogue`` is read only, at each step as it is then. ``loss``: of the main model's last step, None when there was
    nothing to train on.
    """

    def __init__(
        self,
        settings: TrainerSettings,
        frame: Frame,
        catalogue: Catalogue,
        evaluations: bool = True,
        each: Each | None = None,
    ) -> None:
        """``evaluations``: whether ``step`` returns lines for the evaluation journal. ``each``: how the gradients of
        the ranks of a group come together, None without one."""
        self._lines = evaluations
        self._each = each
        self._settings = settings
        self._frame = frame
        self._catalogue = catalogue
        self._learners = {MAIN: self._learner(settings.pseudo_weight, settings.negatives_weight)}
        if settings.shadow:
            self._learners[SHADOW] = self._learner(0.0, 0.0)
        ttl = None if settings.id_ttl_seconds is None else max(1, int(settings.id_ttl_seconds * 1000))
        self._users, self._items = GrowingIds(settings.max_users, ttl), GrowingIds(settings.max_items, ttl)
        self._rows = Rows(self._users, self._items, catalogue)
        self._exposures = np.zeros(1, np.int64)  # by item row; row 0 is the unknown item
        self._tail = 0.0  # exposures up to which an item counts to the tail
        self._dedup = DedupWindow(settings.dedup_requests)
        self._window = ProgressiveWindow(settings.window_records, list(self._learners))
        self._calibration = CalibrationWindow()
        self._evidence = SourcedEvidence()
        self._mixed = MixedCalibration() if settings.loss == "pointwise" else None
        self._recent: deque[probe.Asked] = deque(maxlen=probe.REQUESTS)
        self._newest_at: int | None = None
        self.loss: float | None = None
        self.step_count = 0
        self.records = 0
        self.newest_event_ts = 0

    def step(self, labels: Sequence[Label], newest_at: int | None = None) -> list[dict[str, Any]]:
        """Score, then train on, one mini-batch of checked label records; see :meth:`train`."""
        return self.train(columns(labels), newest_at)

    def train(self, labels: Sequence[Columns], newest_at: int | None = None) -> list[dict[str, Any]]:
        """Score, then train on, one mini-batch of checked label records; redeliveries in it are dropped.

        ``newest_at``: the newest source record of the batch, wall milliseconds. Returns the evaluation journal's lines.
        Raises FloatingPointError when the model scores the batch with what is not a number.
        """
        self.step_count += 1
        self.loss = None
        prepared, records = self._admit(labels)
        if newest_at is not None:
            self._newest_at = max(newest_at, self._newest_at or 0)
        batch = prepared.batch
        lines: list[dict[str, Any]] = []
        if batch is not None:
            self._grow()
            exposed_rows = batch.item_row[batch.item[batch.exposed]]
            new, tail = self._exposures[exposed_rows] == 0, self._exposures[exposed_rows] <= self._tail
            sources = [r.source for r in prepared.requests]
            logits = self._train(batch, [r.rank for r in prepared.requests], sources)
            lines = self._validate(prepared.requests, batch, logits, new, tail)
            np.add.at(self._exposures, exposed_rows, 1)
            self._calibration.add(batch.score[batch.exposed], batch.clicked[batch.exposed])
            self._evidence.observe(batch, sources)
            if self._mixed is not None:
                self._mixed.observe(*_pairs(batch), sources, batch.exposed, batch.clicked)
            self._recent.extend(
                probe.Asked(r.user_id, r.history, r.items[: probe.ITEMS], r.score[: probe.ITEMS])
                for r in prepared.requests
            )
        self._expire()
        self.records += records
        metrics.TRAINER_STEPS.inc()
        metrics.TRAINER_RECORDS.inc(records)
        return lines

    def figures(self) -> dict[str, dict[str, float]]:
        """Progressive validation by model name, over the present window."""
        return {name: self._window.summary(name) for name in self._learners}

    def slices(self) -> dict[str, dict[str, dict[str, dict[str, float]]]]:
        """All figures, by window (``whole``, ``recent``), model, slice and name."""
        return {
            window: {name: self._window.slices(name, newest) for name in self._learners}
            for window, newest in (("whole", None), ("recent", self._settings.recent_records))
        }

    def evidence(self) -> Reading:
        """How much the anchor scores tell about clicks beyond user and item, those that came last; its weight scales
        lambda."""
        return self._evidence.read()

    def ids(self) -> dict[str, int]:
        """How many users and items live in the tables."""
        return {"users": len(self._users), "items": len(self._items)}

    def checkpoint(
        self, positions: Mapping[int, int], journal: int, run: int = 0, vectors: Mapping[int, int] = _START
    ) -> Checkpoint:
        """Everything after the last step, with the log positions and the journals' places that belong to it.

        Raises FloatingPointError when training has diverged: nothing can be resumed from such weights.
        """
        tensors = {_FILES[name]: learner.state_tensors() for name, learner in self._learners.items()}
        for model, part in tensors.items():
            for name, tensor in part.items():
                if not bool(torch.isfinite(tensor).all()):
                    raise FloatingPointError(f"{model}, {name}: not finite at step {self.step_count}")
        users, users_seen = self._users.state()
        items, items_seen = self._items.state()
        requests, window = self._window.state()
        tensors["window"] = window
        tensors["calibration"] = self._calibration.state()
        evidence_sources, tensors["evidence"] = self._evidence.state()
        mixed_sources = None
        if self._mixed is not None:
            mixed_sources, mixed = self._mixed.state()
            tensors["mixed"] = {name: torch.from_numpy(array) for name, array in mixed.items()}
        tensors["ids"] = {
            "users_seen": torch.from_numpy(users_seen),
            "items_seen": torch.from_numpy(items_seen),
            "exposures": torch.from_numpy(self._exposures.copy()),
        }
        state = _State(
            users=users,
            items=items,
            dedup=self._dedup.state(),
            forgot=self._dedup.forgot,
            window=requests,
            tail=self._tail,
            records=self.records,
            newest_at=self._newest_at,
            journal=journal,
            evidence_sources=evidence_sources,
            mixed_sources=mixed_sources,
            asked=probe.of(self._recent),
        )
        return Checkpoint(
            step=self.step_count,
            run=run,
            positions=dict(positions),
            vectors=dict(vectors),
            tensors=tensors,
            state=msgspec.json.encode(state),
            versions=self._frame.versions,
            metrics=self._window.summary(MAIN),
            newest_event_ts=self.newest_event_ts,
            figures=msgspec.json.encode(
                {
                    **self.slices(),
                    "calibration": self._calibration.fit().to_dict(),
                    "evidence": {
                        name: float(value) for name, value in dataclasses.asdict(self._evidence.read()).items()
                    },
                }
            ),
        )

    def restore(self, checkpoint: Checkpoint) -> int:
        """Take over a checkpoint. Returns the evaluation journal's length.

        Raises CheckpointError, naming what differs, when it belongs to another space or to other settings.
        """
        self._check_fits(checkpoint)
        state = msgspec.json.decode(checkpoint.state, type=_State)
        for name, learner in self._learners.items():
            learner.load_state_tensors(checkpoint.tensors[_FILES[name]])
        by_id = {name: tensor.numpy() for name, tensor in checkpoint.tensors["ids"].items()}
        self._users.restore(state.users, by_id["users_seen"])
        self._items.restore(state.items, by_id["items_seen"])
        self._rows.forget()
        self._exposures = by_id["exposures"].copy()
        self._dedup.restore(state.dedup, state.forgot)
        self._window.restore(state.window, checkpoint.tensors["window"])
        self._calibration.restore(checkpoint.tensors["calibration"])
        self._evidence.restore(state.evidence_sources, checkpoint.tensors["evidence"])
        if self._mixed is not None:
            self._mixed = MixedCalibration()  # trained with listwise labels so far, there is none
            if state.mixed_sources is not None:
                mixed = {name: tensor.numpy() for name, tensor in checkpoint.tensors["mixed"].items()}
                self._mixed.restore(state.mixed_sources, mixed)
        self._recent.clear()
        self._recent.extend(probe.asked(state.asked))
        self._tail = state.tail
        self._newest_at = state.newest_at
        self.records = state.records
        self.step_count = checkpoint.step
        self.newest_event_ts = checkpoint.newest_event_ts
        return state.journal

    def _check_fits(self, checkpoint: Checkpoint) -> None:
        which = f"the checkpoint of step {checkpoint.step}"
        if dict(checkpoint.versions) != self._frame.versions:
            raise CheckpointError(
                f"artefacts: versions {self._frame.versions}, {which} has {dict(checkpoint.versions)}; a new space "
                "needs new trainer.checkpoints"
            )
        dim = checkpoint.tensors[_FILES[MAIN]]["users"].shape[1]
        if dim != self._settings.dim:
            raise CheckpointError(
                f"trainer.dim: {self._settings.dim}, {which} has {dim}; another width needs new trainer.checkpoints"
            )
        if SHADOW in self._learners and _FILES[SHADOW] not in checkpoint.tensors:
            raise CheckpointError(
                f"trainer.shadow: true, {which} was made without a shadow, which cannot catch up; set it to false, "
                "or it needs new trainer.checkpoints"
            )

    def model(self) -> tuple[dict[str, torch.Tensor], models.Ids]:
        """The main model's weights, a copy, with the rows of the ids that live, and those ids."""
        weights = self._learners[MAIN].model.state_tensors()
        tables = {"users": self._users, "items": self._items}
        live = {name: torch.from_numpy(np.r_[0, table.live_rows()]) for name, table in tables.items()}
        for name, ids in ROWS_OF.items():
            weights[name] = weights[name][live[ids]]
        return weights, models.Ids(self._users.live_ids(), self._items.live_ids())

    def candidate(self, positions: Mapping[int, int], run: int = 0) -> Candidate:
        """The main model as it could be published now."""
        weights, ids = self.model()
        return Candidate(
            step=self.step_count,
            run=run,
            records=self.records,
            trained=self._learners[MAIN].steps,
            weights=weights,
            ids=ids,
            config={"dim": self._settings.dim, "dim_content": self._frame.dim},
            versions=self._frame.versions,
            positions=dict(positions),
            metrics={**self._window.summary(MAIN), "evidence": float(self._evidence.read().weight)},
            evaluated=len(self._window),
            newest_event_ts=self.newest_event_ts,
            newest_at=self._newest_at,
            feed=self._window.feed,
            asked=probe.of(self._recent),
            score=self._score,
        )

    def _learner(self, pseudo_weight: float, negatives_weight: float) -> Learner:
        settings = self._settings
        # The same seed for both: they start from the same weights.
        model = PreRanker(self._frame.dim, settings.dim, settings.seed)
        loss = LossConfig(
            settings.loss,
            pseudo_weight,
            negatives_weight,
            settings.negatives,
            temperature=settings.temperature,
            personal=settings.personal,
        )
        return Learner(model, loss, settings.learning_rate, settings.weight_decay)

    def _admit(self, labels: Sequence[Columns]) -> tuple[Prepared, int]:
        """What is new, and how many records had something new."""
        kept: list[Columns] = []
        first: list[bool] = []
        for label in labels:
            if label.space != self._frame.space:
                metrics.TRAINER_SKIPPED.labels("other_space").inc()  # its scores mean nothing beside these vectors
                continue
            new = self._dedup.admit(label)
            if new is Known.REPEATED:
                metrics.DUPLICATES.labels("labels").inc()
            elif new is Known.FORGOTTEN:
                metrics.TRAINER_SKIPPED.labels("late_correction").inc()
            else:
                kept.append(label.only(new.exposed, new.pseudo))
                first.append(new.first)
                self.newest_event_ts = max(self.newest_event_ts, label.ts)
        prepared = prepare(kept, first, self._rows)
        metrics.TRAINER_SKIPPED.labels("no_vector").inc(prepared.skipped)
        return prepared, len(kept)

    def _grow(self) -> None:
        for learner in self._learners.values():
            learner.model.grow(self._users.size, self._items.size)
        self._exposures = grown(self._exposures, self._items.size)
        if self.step_count % _TAIL_STEPS == 1 or self._items.size < _FEW_ITEMS:
            self._tail = tail_threshold(self._exposures[self._items.live_rows()])

    def _expire(self) -> None:
        due = self.step_count % _EXPIRY_STEPS == 0
        users, items = (
            table.expire(self.newest_event_ts) if due or table.over else _NO_ROWS
            for table in (self._users, self._items)
        )
        if len(users) or len(items):
            for learner in self._learners.values():
                learner.forget(users, items)
            self._rows.forget()
            self._evidence.forget(items)
            if self._mixed is not None:
                self._mixed.forget(users, items)
            self._exposures[items] = 0
            metrics.IDS_FORGOTTEN.labels("users").inc(len(users))
            metrics.IDS_FORGOTTEN.labels("items").inc(len(items))

    def _train(self, batch: Batch, ranks: Sequence[int], sources: Sequence[str]) -> dict[str, Floats]:
        """Train every model on the batch, with the ranks and sources of its requests. Returns the logits (P,) that each
        gave its pairs before that. Pointwise labels are calibrated for their user and item, once enough was exposed."""
        content, logits = self._catalogue.vectors, {}
        division = None if self._each is None else Division(np.array(ranks, np.int64), self._each)
        # Of earlier batches: what this one teaches must not depend on its own clicks twice.
        weight = sharpness = 1.0
        if self._settings.evidence:
            reading = self._evidence.read(sources)
            weight, sharpness = reading.weight, reading.sharpness
        if self._mixed is not None:
            label = self._mixed.label(*_pairs(batch), sources)
            batch = dataclasses.replace(batch, label=np.where(batch.exposed | np.isnan(label), batch.label, label))
        for name, learner in self._learners.items():
            exposed_only = learner.loss.scaled(weight).exposed_only  # its step leaves the unexposed pairs out
            if exposed_only:
                with torch.no_grad():
                    logits[name] = learner.model(batch, content).full.numpy()
            loss = learner.step(batch, content, weight, division, sharpness)
            if not exposed_only:
                logits[name] = learner.logits
            if name == MAIN and loss is not None:
                self.loss = float(loss.total)
            if not np.isfinite(logits[name]).all():
                raise FloatingPointError(f"{name}: training has diverged before step {self.step_count}")
        return logits

    def _validate(
        self, requests: Sequence[Request], batch: Batch, logits: Mapping[str, Floats], new: Bools, tail: Bools
    ) -> list[dict[str, Any]]:
        evaluated = evaluate([r.user_id for r in requests], batch, logits, new, tail)
        first = np.array([r.first for r in requests])
        self._window.add(evaluated if first.all() else evaluated.with_corrections(first))
        if not self._lines:
            return []
        return list(journal_lines([r for r in requests if r.first], evaluated.of(first)))

    def _score(self, user: str, history: Sequence[str], items: Sequence[str], score: Floats) -> tuple[Floats, Bools]:
        content_row = self._catalogue.rows(items)
        known = content_row >= 0
        if not known.any():
            return np.zeros(len(items), np.float32), known
        content = self._catalogue.vectors[content_row] * known[:, None]
        rows, liked = self._items.rows(items), self._items.rows(history)
        return self._learners[MAIN].model.score(self._users.row(user), rows, content, score, liked[liked > 0]), known


def _pairs(batch: Batch) -> tuple[Ints, Ints, Ints, Floats]:
    """Users by request, and of each pair its item, its request and its score."""
    return batch.user_row, batch.item_row[batch.item], batch.request, batch.score


_NO_ROWS = np.zeros(0, np.int64)
