"""From items and past feedback to everything that labelling needs, in the order in which the parts build on each
other: raw vectors -> space -> quantiser -> generator -> calibration."""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from gpl.anchors.base import AnchorGenerator, History, anchors_of
from gpl.anchors.base_models import SMOLLM2
from gpl.anchors.beam import Decoding
from gpl.anchors.history import HistoryClusters
from gpl.anchors.lora_lm import LoraConfig, LoraLM, choose_device
from gpl.anchors.near_history import NearHistory, choose_weight
from gpl.anchors.small_lm import SmallLM, SmallLMConfig
from gpl.anchors.training import Resume, Schedule
from gpl.artefacts import Artefacts
from gpl.catalogue import ItemContent, rows_by_id
from gpl.codes.quantiser import Quantiser, suggest_codebook_size, suggest_levels
from gpl.codes.rq_kmeans import ResidualKMeans
from gpl.codes.rq_vae import ResidualVAE
from gpl.codes.trie import SidTrie
from gpl.labels import calibration, labeller
from gpl.space import PRECOMPUTED, Encoder, Space, raw_vectors

Say = Callable[[str], None]
MIN_SEQUENCES = 20
"""Users with at least two positives below which a language model is not trained."""
MIN_CALIBRATION = 50
"""Exposures, and fewest clicks and non-clicks, below which nothing is calibrated (the classes need a tenth of it)."""
_KINDS: dict[str, tuple[str, ...]] = {
    "generator": (SmallLM.kind, LoraLM.kind, HistoryClusters.kind),
    "quantiser": (ResidualKMeans.kind, ResidualVAE.kind),
    "calibration": get_args(calibration.Kind),
}
CANDIDATES = {SmallLM.kind: 10, LoraLM.kind: 2}
"""SIDs that a language model is asked for, for each anchor near the history. Of a large one more would be most of its
time."""
_CHOSEN = ("dim", "levels", "codebook_size", "epochs")  # where None is a value


class Event(NamedTuple):
    """One past exposure. ``ts`` orders a user's events, in any unit; ``clicked_ts``: of the click, None: at ``ts``."""

    user_id: str
    item_id: str
    ts: int
    clicked: bool
    clicked_ts: int | None = None

    @property
    def known_ts(self) -> int:
        """From when on it is known what became of it: before its click, an exposure is no positive."""
        return self.ts if self.clicked_ts is None else self.clicked_ts


@dataclass(frozen=True)
class FitOptions:
    """``dim``: dimensions of the vectors that the space keeps, None: all. ``levels`` and ``codebook_size`` None: chosen
    from the catalogue. ``history``: most recent positives that anchors are made from. ``base_model``: of lora-lm, see
    `load_backbone`. ``history_weight``: of nearness to the history in a language model's anchors (`NearHistory`), 0 for
    none, None: chosen by users that it was not trained on. ``epochs`` None: what suits the generator.
    ``calibration``: its form, fitted on the exposures of ``calibration_users`` users, as ``labelling`` scores.
    ``resume``: directory where the training of a language model keeps its state, to go on after an interruption.
    ``device``: of that training, as torch names it; None: the CPU for small-lm, a GPU if there is one for lora-lm.

    Raises ValueError naming the field and value that cannot be.
    """

    generator: Literal["small-lm", "lora-lm", "history"] = "small-lm"
    base_model: str = SMOLLM2
    dim: int | None = None
    quantiser: Literal["rq-kmeans", "rq-vae"] = "rq-kmeans"
    levels: int | None = None
    codebook_size: int | None = None
    beams: int = 10
    history: int = 50
    history_weight: float | None = None
    epochs: int | None = None
    downsample_threshold: float = 1e-3
    exclude_seen: bool = False
    temperature: float = 1.0
    calibration: calibration.Kind = "platt"
    calibration_users: int = 500
    labelling: labeller.Config = field(default_factory=labeller.Config)
    resume: Path | None = None
    device: str | None = None

    def __post_init__(self) -> None:
        for name, known in _KINDS.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: {getattr(self, name)!r}, expected one of {', '.join(known)}")
        for name in ("dim", "levels", "codebook_size", "beams", "history", "epochs", "calibration_users"):
            value = getattr(self, name)
            if value is None and name in _CHOSEN:
                continue
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: {value!r}, must be an integer of at least 1")
        for name in ("downsample_threshold", "temperature"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}: {getattr(self, name)}, must be a positive number")
        if self.history_weight is not None and not 0 <= self.history_weight < math.inf:
            raise ValueError(f"history_weight: {self.history_weight}, must be finite and not negative")
        if self.device is not None:
            choose_device(self.device)


def fit(
    items: Sequence[ItemContent],
    events: Sequence[Event],
    encoder: Encoder | None,
    options: FitOptions | None = None,
    seed: int = 0,
    say: Say | None = None,
) -> Artefacts:
    """Fit all parts. ``encoder`` None: vectors come with the items.

    Users with too few positives for a language model get ``HistoryClusters``, and the report says so; too few or
    one-sided exposures leave ``NoCalibration``. Events of unknown items are passed over and counted in the report.
    Deterministic for a seed on one machine. Raises ValueError naming the item and field for content that cannot be
    encoded, and for an id that comes twice.
    """
    options, say = options or FitOptions(), say or (lambda _: None)
    warnings: list[str] = []
    row_of = rows_by_id(items)
    raw = raw_vectors(items, encoder)
    name, identity = (PRECOMPUTED, None) if encoder is None else (encoder.name, encoder.identity)
    space = Space.fit(name, raw, identity, options.dim)
    vectors = space.project(raw, list(row_of))
    quantiser = fit_quantiser(vectors, options, seed)
    sids = quantiser.encode(vectors)
    say(f"space of {len(items):,} items in {space.dim} dimensions")
    say(f"codes {quantiser.levels} x {quantiser.codebook_size} by {quantiser.kind}")
    trie = SidTrie(sids, quantiser.codebook_size, vectors)
    known = [event for event in events if event.item_id in row_of]
    positives = _positives(known, row_of)
    generator, losses, unseen = _generator(items, positives, sids, trie, quantiser, options, seed, warnings, say)
    # A language model scores the later clicks of users that it was trained on too well.
    judged = {user: positives[user] for user in unseen}
    fitted = _calibration(known, judged, row_of, vectors, sids, trie, generator, options, seed, warnings)
    report: dict[str, Any] = {
        "items": len(items),
        "events": len(events),
        "events_of_unknown_items": len(events) - len(known),
        "users_with_positives": len(positives),
        "positives": sum(len(user.rows) for user in positives.values()),
        "quantiser": quantiser.report(vectors),
        "generator_losses": list(losses),
        "newest_ts": max((int(event.known_ts) for event in events), default=None),
        "seed": seed,
        "warnings": warnings,
    }
    for warning in warnings:
        say(f"warning: {warning}")
    return Artefacts(space, quantiser, generator, fitted, report)


def fit_quantiser(vectors: NDArray[np.float32], options: FitOptions, seed: int) -> Quantiser:
    """The quantiser that ``options`` name, on unit vectors (n, dim)."""
    size = suggest_codebook_size(len(vectors)) if options.codebook_size is None else options.codebook_size
    levels = suggest_levels(len(vectors), size) if options.levels is None else options.levels
    kind = ResidualVAE if options.quantiser == ResidualVAE.kind else ResidualKMeans
    return kind.fit(vectors, levels, size, seed)


class _Positives(NamedTuple):
    """A user's clicked items as catalogue rows, oldest first, and when they were clicked."""

    rows: list[int]
    times: list[int]


def _positives(events: Sequence[Event], row_of: dict[str, int]) -> dict[str, _Positives]:
    users: dict[str, _Positives] = {}
    # Ties in time keep an order that does not depend on how the events came.
    for event in sorted((e for e in events if e.clicked), key=lambda e: (e.known_ts, e.user_id, e.item_id)):
        user = users.setdefault(event.user_id, _Positives([], []))
        user.rows.append(row_of[event.item_id])
        user.times.append(event.known_ts)
    return users


def _generator(
    items: Sequence[ItemContent],
    positives: dict[str, _Positives],
    sids: NDArray[np.int32],
    trie: SidTrie,
    quantiser: Quantiser,
    options: FitOptions,
    seed: int,
    warnings: list[str],
    say: Say,
) -> tuple[AnchorGenerator, tuple[float, ...], list[str]]:
    """The generator, its validation losses, and the users that it was not trained on."""
    # By user id: the seed then decides the split into trained and held-out users, not the order of the events.
    users = [user for user in sorted(positives) if len(positives[user].rows) >= 2]
    if options.generator != "history" and len(users) < MIN_SEQUENCES:
        warnings.append(
            f"{len(users)} users have two or more positives, a language model needs {MIN_SEQUENCES}: "
            "anchors are history clusters"
        )
        options = replace(options, generator="history")
    sequences = [sids[positives[user].rows] for user in users]
    generator, losses, held_out = train_generator(sequences, items, sids, trie, quantiser, options, seed, say)
    return generator, losses, list(positives) if held_out is None else [users[i] for i in held_out]


def train_generator(
    sequences: Sequence[NDArray[np.int32]],
    items: Sequence[ItemContent],
    sids: NDArray[np.int32],
    trie: SidTrie,
    quantiser: Quantiser,
    options: FitOptions,
    seed: int,
    say: Say | None = None,
) -> tuple[AnchorGenerator, tuple[float, ...], list[int] | None]:
    """The generator that ``options`` name, on users' SIDs (n, levels), oldest first.

    ``items`` and their ``sids`` (items, levels) tell a pre-trained model what codes are about; ``trie``, of them and
    with vectors, where SIDs lie. Answers the generator, its validation losses, and which sequences decided when to stop
    and how near the history anchors are held (None where nothing was trained).
    """
    if options.generator == "history":
        return HistoryClusters(options.history, exclude_seen=options.exclude_seen), (), None

    def progress(step: int, total: int, loss: float) -> None:
        if say is not None and (step % 50 == 0 or step == total):
            say(f"language model: step {step} of {total}, loss {loss:.2f}")

    # One user in ten decides when to stop.
    order = np.random.default_rng(seed).permutation(len(sequences)).tolist()
    held = max(1, len(sequences) // 10)
    trained, held_out = [sequences[i] for i in order[held:]], [sequences[i] for i in order[:held]]
    decoding = Decoding(options.temperature, options.exclude_seen)
    resume = None if options.resume is None else Resume(options.resume / "generator.safetensors")
    shape = quantiser.levels, quantiser.codebook_size
    model: SmallLM | LoraLM
    if options.generator == "lora-lm":
        lora = LoraConfig(options.base_model, options.history, decoding=decoding)
        lora = replace(lora, schedule=_schedule(lora.schedule, options))
        texts = [(item.text, sid) for item, sid in zip(items, sids, strict=True) if item.text.strip()]
        model = LoraLM.train(trained, held_out, *shape, lora, seed, options.device, progress, resume, texts)
    else:
        small = SmallLMConfig(options.history, decoding=decoding)
        small = replace(small, schedule=_schedule(small.schedule, options))
        model = SmallLM.train(trained, held_out, *shape, small, seed, options.device or "cpu", progress, resume)
    weight, candidates = options.history_weight, CANDIDATES[options.generator]
    if weight is None:
        judged = [sequence[-options.history :] for sequence in held_out]
        choice = choose_weight(model, judged, trie, options.beams, candidates)
        weight = choice.weight
        if say is not None:
            judged_by = f"what {choice.users:,} users took next is found {choice.near:.3f} near their history"
            judged_by += f", {choice.alone:.3f} by the language model alone"
            say(f"history weight {weight:g}: {judged_by if choice.users else 'the default, nobody can be judged'}")
    generator = NearHistory(model, weight, candidates) if weight else model
    return generator, model.validation_losses, order[:held]


def _schedule(default: Schedule, options: FitOptions) -> Schedule:
    epochs = default.epochs if options.epochs is None else options.epochs
    return replace(default, epochs=epochs, downsample_threshold=options.downsample_threshold)


def _calibration(
    events: Sequence[Event],
    positives: dict[str, _Positives],
    row_of: dict[str, int],
    vectors: NDArray[np.float32],
    sids: NDArray[np.int32],
    trie: SidTrie,
    generator: AnchorGenerator,
    options: FitOptions,
    seed: int,
    warnings: list[str],
) -> calibration.Fitted:
    """Fitted on exposures after their user's anchors, which are made from the earlier half of the positives."""
    enough = sorted(user for user, found in positives.items() if len(found.rows) >= 4)
    if len(enough) > options.calibration_users:
        chosen = np.random.default_rng(seed).choice(len(enough), options.calibration_users, replace=False)
        enough = [enough[i] for i in sorted(chosen)]
    cut: dict[str, int] = {}
    histories: list[History] = []
    for user in enough:
        rows, times = positives[user]
        cut[user] = times[len(rows) // 2 - 1]
        past = rows[: bisect.bisect_right(times, cut[user])][-options.history :]
        histories.append(History(sids[past], vectors[past]))
    anchors = {
        user: anchors_of(beams, trie.centroids, history)
        for user, beams, history in zip(
            enough, generator.generate(histories, trie, options.beams), histories, strict=True
        )
    }
    scores: list[float] = []
    clicks: list[int] = []
    later: dict[str, list[Event]] = {}
    for event in events:
        # By when it was shown: clicks of a page that the cut goes through would come without the rest of the page.
        if event.user_id in cut and event.ts > cut[event.user_id]:
            later.setdefault(event.user_id, []).append(event)
    for user in enough:
        seen = later.get(user, [])
        if seen and len(anchors[user]):
            made = anchors[user]
            prepared = labeller.PreparedAnchors.build(
                made.vectors, made.logprobs, made.history_factor, trie.levels, options.labelling
            )
            score, _ = labeller.score(prepared, vectors[[row_of[event.item_id] for event in seen]])
            scores += score.tolist()
            clicks += [int(event.clicked) for event in seen]
    fewest = min(sum(clicks), len(clicks) - sum(clicks))
    if len(clicks) < MIN_CALIBRATION or fewest < MIN_CALIBRATION // 10:
        warnings.append(
            f"{len(clicks)} exposures after their user's anchors, {fewest} of the rarer kind: no calibration"
        )
        return calibration.NoCalibration()
    return calibration.fit_calibration(options.calibration, np.array(scores), np.array(clicks))
