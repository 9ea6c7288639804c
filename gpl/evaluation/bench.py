"""A world with what its methods share: pairs, anchors and their scores, each made once and kept on disk."""

from __future__ import annotations

import ast
import hashlib
import re
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Literal

import numpy as np

from gpl.evaluation.anchors import AnchorSets, AnchorSpec, Cases, make_anchors
from gpl.evaluation.dataset import Floats, Ints, Ragged
from gpl.evaluation.judge import Judge, Scores
from gpl.evaluation.labels import PairLabels, Scorer
from gpl.evaluation.pairs import Pairs
from gpl.evaluation.training import TrainConfig
from gpl.evaluation.world import World
from gpl.labels.labeller import Config

Source = Literal["recalled", "uniform"]

ANCHOR_SEED = 0
_KEPT = 4
"""Label sets and score matrices held in memory: a score matrix of a large world takes some 100 MB."""


class Bench:
    """One world under one seed. ``cache``: directory for anchors, which take longest; None keeps nothing."""

    def __init__(self, world: World, cache: Path | None, train: TrainConfig) -> None:
        self.world, self.train_config = world, train
        self.seed = world.seed
        self._cache = cache
        self._anchors: dict[AnchorSpec, AnchorSets] = {}
        self._labels: dict[tuple[AnchorSpec, Config, Source], tuple[PairLabels, Scores]] = {}
        self._scores: dict[tuple[AnchorSpec, Config], Scores] = {}
        judged = world.judged
        self.validation = Judge(world, judged[world.validation[judged]])
        self.test = Judge(world, judged[~world.validation[judged]])

    def pairs(self, source: Source) -> Pairs:
        """The log's pairs. ``source`` of the unexposed ones: what the request recalled, or all items alike."""
        return self._recalled if source == "recalled" else self._uniform

    @cached_property
    def _recalled(self) -> Pairs:
        return Pairs.of(self.world.log)

    @cached_property
    def _uniform(self) -> Pairs:
        log, rng = self.world.log, np.random.default_rng(self.seed)
        count = min(2 * self.train_config.hidden, self.world.n_items)
        drawn = []
        for request, user in enumerate(log.user.tolist()):
            items = rng.integers(self.world.n_items, size=count)
            known = np.concatenate([log.exposed[request], self.world.positives[user]])
            drawn.append(np.setdiff1d(items, known))
        return Pairs.of(replace(log, recalled=Ragged.of(drawn)))

    @cached_property
    def cases(self) -> Cases:
        return Cases(self.world)

    @cached_property
    def fingerprint(self) -> str:
        """Of everything that anchors depend on besides their own settings."""
        world, digest = self.world, hashlib.sha256()
        for array in (world.vectors, world.positives.offsets, world.positives.values, world.log.user, world.known):
            digest.update(np.ascontiguousarray(array).tobytes())
        digest.update(code_digest(*sources("gpl.evaluation.anchors")).encode())
        return digest.hexdigest()[:16]

    def anchors(self, spec: AnchorSpec) -> AnchorSets:
        if spec not in self._anchors:
            self._anchors[spec] = self._stored(spec) if self._cache is not None else self._made(spec)
        return self._anchors[spec]

    def labels(self, spec: AnchorSpec, config: Config, source: Source) -> tuple[PairLabels, Scores]:
        """Pseudo-labels of the log's pairs, and raw anchor scores of all items for judged users."""
        key = (spec, config, source)
        if key not in self._labels:
            while len(self._labels) >= _KEPT:
                del self._labels[next(iter(self._labels))]
            scorer = self.scorer(spec, config)
            labels = scorer.label(self.pairs(source), self.cases.log)
            self._labels[key] = (labels, self.scores(spec, config))
        return self._labels[key]

    def scores(self, spec: AnchorSpec, config: Config) -> Scores:
        """Raw anchor scores of all items for judged users."""
        key = (spec, replace(config, dispersion=True, history=True, generation=True))  # confidence has no part in it
        if key not in self._scores:
            while len(self._scores) >= _KEPT:
                del self._scores[next(iter(self._scores))]
            judged = self.world.judged
            matrix = self.scorer(spec, config).matrix(self.cases.final[judged])
            row_of = np.full(self.world.n_users, -1, dtype=np.int64)
            row_of[judged] = np.arange(len(judged))

            def scores_of(users: Ints) -> Floats:
                return matrix[row_of[users]]

            self._scores[key] = scores_of
        return self._scores[key]

    def scorer(self, spec: AnchorSpec, config: Config) -> Scorer:
        """The product's labeller over one set of anchors."""
        vectors = self.world.vectors if spec.centred else self.world.raw
        return Scorer(vectors, self.world.has_content, self.anchors(spec), config)

    def _made(self, spec: AnchorSpec) -> AnchorSets:
        # One seed for all worlds: where only exposures are drawn anew, histories, and so anchors, stay the same.
        return make_anchors(self.world, self.cases, spec, ANCHOR_SEED)

    def _stored(self, spec: AnchorSpec) -> AnchorSets:
        assert self._cache is not None
        name = hashlib.sha256(repr(sorted(asdict(spec).items())).encode()).hexdigest()[:8]
        path = self._cache / f"{file_name(self.world.name)}-{spec.generator}-{name}-{self.fingerprint}.npz"
        if path.is_file():
            with np.load(path) as stored:
                return AnchorSets(
                    stored["table"], stored["index"], stored["logprob"], stored["history_factor"], int(stored["levels"])
                )
        sets = self._made(spec)
        path.parent.mkdir(parents=True, exist_ok=True)
        written_atomically(path, lambda target: np.savez_compressed(target, **vars(sets)))
        return sets


@cache
def code_digest(*parts: str) -> str:
    """Hash of the sources under ``gpl/`` that are named: what is kept on disk is not used after they changed.

    As they were when it was first asked, not as they are edited while a study runs on what it has imported.
    """
    root = Path(__file__).resolve().parent.parent
    digest = hashlib.sha256()
    for part in sorted(parts):
        path = root / part
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            digest.update(file.relative_to(root).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


@cache
def sources(*modules: str) -> frozenset[str]:
    """Files under ``gpl/`` of ``modules`` and of all that they import of ``gpl``, directly or not, also in functions.

    A rule in place of lists of files, from which one is easily missing.
    """
    root = Path(__file__).resolve().parent.parent
    found: set[str] = set()
    waiting = list(modules)
    while waiting:
        at = root.parent.joinpath(*waiting.pop().split("."))
        file = at / "__init__.py" if at.is_dir() else at.with_suffix(".py")
        if not file.is_file() or (name := file.relative_to(root).as_posix()) in found:
            continue  # what is imported from a module is perhaps no module
        found.add(name)
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                named = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module is not None:
                named = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            else:
                continue
            # A module's packages are imported with it.
            parts = [one.split(".") for one in named if one.split(".")[0] == root.name]
            waiting += [".".join(one[:end]) for one in parts for end in range(1, len(one) + 1)]
    return frozenset(found)


def file_name(name: str) -> str:
    """The name of a data set as a part of a file's: without separators, and short enough to add to. Two may become one:
    the key in the rest of the file's name tells them apart."""
    plain = re.sub(r"[/\x00-\x1f\x7f]", "_", name)
    return plain.encode()[:150].decode(errors="ignore")  # of the 255 bytes that a file's name may have


def written_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """A file is there whole or not at all, whenever the process ends."""
    aside = path.with_name(f".{path.name}.{id(path)}{path.suffix}")
    write(aside)
    aside.replace(path)
