"""Interest anchors of a world's users, from any generator, as of every request and as of the judging.

A language model is trained crosswise: users fall into folds, and a user's anchors come from a model that was trained on
the other folds. Otherwise anchors of the log's requests would have seen the very clicks that they are to explain.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from gpl.anchors.base import Anchors, Beams, History, anchors_of
from gpl.anchors.history import HistoryClusters
from gpl.anchors.near_history import choose_weight, held_near
from gpl.anchors.small_lm import SmallLM, SmallLMConfig
from gpl.anchors.training import Schedule
from gpl.codes.quantiser import Quantiser
from gpl.codes.trie import SidTrie
from gpl.evaluation.dataset import Floats, Ints
from gpl.evaluation.world import World
from gpl.fit import CANDIDATES, MIN_SEQUENCES, FitOptions, fit_quantiser

FOLDS = 2
_CANDIDATES = CANDIDATES[SmallLM.kind]
HISTORY = 50
"""Most recent positives that anchors are made of."""


Generator = Literal["small-lm", "history", "mean", "random"]


@dataclass(frozen=True)
class AnchorSpec:
    """Where anchors come from.

    ``small-lm``: where fewer than ``MIN_SEQUENCES`` users have two positives, ``history`` instead. ``mean``: one
    anchor, the mean of the centred history. ``random``: SIDs drawn from the catalogue. ``shuffled``: every user has the
    anchors of another. ``centred`` False: the space is left as the encoder made it. ``downsample``
    False: popular items are not thinned when the language model is trained. ``near_history`` False: the language
    model's anchors are not held near the history.
    """

    generator: Generator = "small-lm"
    beams: int = 10
    centred: bool = True
    downsample: bool = True
    near_history: bool = True
    shuffled: bool = False


@dataclass(frozen=True)
class AnchorSets:
    """Anchors of C cases, at most K each, as indices into a table, since cases share them.

    ``index`` (C, K) into ``table`` (A, d), -1 where a case has fewer; ``logprob`` and ``history_factor`` (C, K).
    """

    table: Floats
    index: Ints
    logprob: Floats
    history_factor: Floats
    levels: int

    def of(self, case: int) -> tuple[Floats, Floats, Floats] | None:
        """``(vectors, logprobs, history_factor)`` of a case; None where it has no anchors."""
        count = int((self.index[case] >= 0).sum())
        if count == 0:
            return None
        return (
            self.table[self.index[case, :count]],
            self.logprob[case, :count],
            self.history_factor[case, :count],
        )


class Cases:
    """The different (user, number of positives known) of a world: anchors are generated once for each.

    Anchors are refreshed when a user's positives have grown by half, not with every click, as in the stream.
    """

    def __init__(self, world: World) -> None:
        everything = world.positives.sizes
        log_known = refreshed(world.known)
        user = np.concatenate([world.log.user, world.held_out.user, np.arange(world.n_users)])
        known = np.concatenate([log_known, everything[world.held_out.user], everything])
        pairs, case = np.unique(np.stack([user, known], axis=1), axis=0, return_inverse=True)
        self.user, self.known = pairs.T
        self.log, self.held_out, self.final = np.split(
            case.ravel(), np.cumsum([len(world.log.user), len(world.held_out.user)])
        )
        """Case of each request of the log, each held-out request, each user when judged."""

    def __len__(self) -> int:
        return len(self.user)


def refreshed(known: Ints) -> Ints:
    """(R,) how many positives the anchors in force are made of: the largest of 0, 1, 2, 3, 5, 8, 12, ... at most
    ``known``."""
    grid = [0, 1]
    while grid[-1] < known.max(initial=0):
        grid.append(grid[-1] + (grid[-1] + 1) // 2)
    steps = np.array(grid, dtype=np.int64)
    result: Ints = steps[np.searchsorted(steps, known, side="right") - 1]
    return result


def make_anchors(world: World, cases: Cases, spec: AnchorSpec, seed: int) -> AnchorSets:
    """Anchors of every case. Deterministic for a seed."""
    rng = np.random.default_rng(seed)
    vectors = world.vectors if spec.centred else world.raw
    if spec.shuffled:
        return _shuffled(make_anchors(world, cases, replace(spec, shuffled=False), seed), cases, world.n_users, rng)
    content = np.flatnonzero(world.has_content)
    quantiser = fit_quantiser(vectors[content], FitOptions(), seed)
    sids = np.full((world.n_items, quantiser.levels), -1, dtype=np.int32)
    sids[content] = quantiser.encode(vectors[content])
    histories = [
        _history(world.positives[user][:known], sids, vectors)
        for user, known in zip(cases.user.tolist(), cases.known.tolist(), strict=True)
    ]
    if spec.generator == "mean":
        return _means(histories, vectors.shape[1], quantiser.levels)
    trie = SidTrie(sids[content], quantiser.codebook_size, vectors[content])
    beams = _beams(world, cases, histories, sids, quantiser, trie, spec, seed, rng)
    made = [anchors_of(b, trie.centroids, h) for b, h in zip(beams, histories, strict=True)]
    return _packed(made, spec.beams, vectors.shape[1], quantiser.levels)


def _beams(
    world: World,
    cases: Cases,
    histories: list[History],
    sids: npt.NDArray[np.int32],
    quantiser: Quantiser,
    trie: SidTrie,
    spec: AnchorSpec,
    seed: int,
    rng: np.random.Generator,
) -> list[Beams]:
    asked = [case for case, history in enumerate(histories) if len(history)]
    none = Beams(np.zeros((0, quantiser.levels), dtype=np.int32), np.zeros(0, dtype=np.float32))
    beams = [none] * len(histories)
    if spec.generator == "random":
        distinct = np.unique(sids[sids[:, 0] >= 0], axis=0)
        for case in asked:
            count = min(spec.beams, len(distinct))
            drawn = distinct[np.sort(rng.choice(len(distinct), count, replace=False))]
            beams[case] = Beams(drawn, np.full(count, -np.log(len(distinct)), dtype=np.float32))
        return beams
    # Too few to train a language model on: history clusters, as `fit` has it.
    if spec.generator == "history" or (world.positives.sizes >= 2).sum() < MIN_SEQUENCES:
        made = HistoryClusters(HISTORY).generate([histories[case] for case in asked], trie, spec.beams)
        for case, found in zip(asked, made, strict=True):
            beams[case] = found
        return beams
    fold_of = rng.permutation(world.n_users) % FOLDS
    for fold in range(FOLDS):
        model, weight = _language_model(world, sids, quantiser, trie, np.flatnonzero(fold_of != fold), spec, seed)
        mine = [case for case in asked if fold_of[cases.user[case]] == fold]
        pasts = [histories[case] for case in mine]
        made = model.generate_batched(pasts, trie, spec.beams * (_CANDIDATES if weight else 1))
        if weight:
            made = held_near(made, pasts, trie, weight, spec.beams)
        for case, found in zip(mine, made, strict=True):
            beams[case] = found
    return beams


def _language_model(
    world: World,
    sids: npt.NDArray[np.int32],
    quantiser: Quantiser,
    trie: SidTrie,
    users: Ints,
    spec: AnchorSpec,
    seed: int,
) -> tuple[SmallLM, float]:
    """A model trained on what ``users`` liked, and how near the history its anchors are to be held. One in ten of them
    decides that, and when to stop."""
    sequences = [sids[world.positives[user]] for user in users]
    sequences = [s[s[:, 0] >= 0] for s in sequences]
    sequences = [s for s in sequences if len(s) >= 2]
    held = max(1, len(sequences) // 10)
    order = np.random.default_rng(seed).permutation(len(sequences))
    # A threshold of 1 keeps everything.
    schedule = Schedule() if spec.downsample else Schedule(downsample_threshold=1.0)
    held_out = [sequences[at] for at in order[:held]]
    model = SmallLM.train(
        [sequences[at] for at in order[held:]],
        held_out,
        quantiser.levels,
        quantiser.codebook_size,
        SmallLMConfig(history=HISTORY, schedule=schedule),
        seed,
    )
    if not spec.near_history:
        return model, 0.0
    judged = [sequence[-HISTORY:] for sequence in held_out]
    return model, choose_weight(model, judged, trie, spec.beams, _CANDIDATES).weight


def _history(items: Ints, sids: npt.NDArray[np.int32], vectors: Floats) -> History:
    kept = items[sids[items, 0] >= 0][-HISTORY:]
    return History(sids[kept], vectors[kept])


def _means(histories: list[History], dim: int, levels: int) -> AnchorSets:
    table = np.zeros((len(histories), dim), dtype=np.float32)
    index = np.full((len(histories), 1), -1, dtype=np.int64)
    nearest = np.zeros((len(histories), 1), dtype=np.float32)
    for case, history in enumerate(histories):
        total = history.vectors.sum(axis=0)
        length = float(np.linalg.norm(total))
        if length > 1e-6:
            table[case] = total / length
            index[case] = case
            nearest[case] = max(0.0, min(1.0, float((history.vectors @ table[case]).max())))
    return AnchorSets(table, index, np.zeros_like(nearest), nearest, levels)


def _packed(made: list[Anchors], beams: int, dim: int, levels: int) -> AnchorSets:
    row_of: dict[tuple[int, ...], int] = {}
    table: list[Floats] = []
    index = np.full((len(made), beams), -1, dtype=np.int64)
    logprob, factor = np.zeros((2, len(made), beams), dtype=np.float32)
    for case, anchors in enumerate(made):
        for k, sid in enumerate(map(tuple, anchors.sids.tolist())):
            if sid not in row_of:
                row_of[sid] = len(table)
                table.append(anchors.vectors[k])
            index[case, k] = row_of[sid]
        logprob[case, : len(anchors)] = anchors.logprobs
        factor[case, : len(anchors)] = anchors.history_factor
    return AnchorSets(np.stack(table) if table else np.zeros((0, dim), np.float32), index, logprob, factor, levels)


def _shuffled(sets: AnchorSets, cases: Cases, n_users: int, rng: np.random.Generator) -> AnchorSets:
    """Each user gets the anchors that another one has at the end: a fixed derangement, so that they stay consistent."""
    order = rng.permutation(n_users)
    other = np.empty(n_users, dtype=np.int64)
    other[order] = np.roll(order, 1)
    source = cases.final[other[cases.user]]
    return AnchorSets(sets.table, sets.index[source], sets.logprob[source], sets.history_factor[source], sets.levels)
