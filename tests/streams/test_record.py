"""A label record against a plain numpy recomputation from the same inputs."""

from __future__ import annotations

import json

import numpy as np
import pytest

from gpl.labels.calibration import Isotonic
from gpl.labels.labeller import Config
from streams import contracts
from streams.labels.code import code_version
from streams.labels.joiner import Joined
from streams.labels.record import Versions, anchor_set, calibration_of, corrected, digest, make_label
from streams.views import vector_bytes

DIM, LEVELS = 16, 3
VERSIONS = Versions("space-1", "codes-1", "config-1")
SPACE = VERSIONS.space


def unit(rng: np.random.Generator, n: int) -> np.ndarray:
    rows = rng.normal(size=(n, DIM))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def anchors_record(rng: np.random.Generator, k: int) -> contracts.UserAnchors:
    return contracts.UserAnchors(
        user_id="u",
        ts=50,
        version=3,
        sid=[[i, 0, 0] for i in range(k)],
        logprob=np.round(-rng.uniform(1, 6, size=k), 6).tolist(),
        vectors=vector_bytes(unit(rng, k)),
        history_factor=np.round(rng.uniform(0, 1, size=k), 6).tolist(),
        history=["i0"],
        generator="lm-1",
        quantiser="codes-1",
        encoder="space-1",
    )


class World:
    def __init__(self, seed: int = 0, items: int = 40) -> None:
        self.rng = np.random.default_rng(seed)
        self.vectors = dict(zip([f"i{n}" for n in range(items)], unit(self.rng, items), strict=True))
        self.anchors = anchors_record(self.rng, 5)

    def lookup(self, ids):
        known = [i for i in ids if i in self.vectors]
        return known, np.array([self.vectors[i] for i in known], dtype=np.float32).reshape(-1, DIM)


def joined(candidates: list[str], exposed: dict[str, bool]) -> Joined:
    return Joined(contracts.Recall("r", "u", 100, candidates), exposed, 7, [1, 2], 1234)


def expected(world: World, items: list[str], calibration: contracts.Calibration) -> list[tuple[float, float, float]]:
    """Score, label and confidence as docs and method say them, one loop at a time."""
    a = np.frombuffer(world.anchors.vectors, "<f4").reshape(-1, DIM).astype(np.float64)
    logprob = np.array(world.anchors.logprob)
    p = np.exp(logprob) / np.exp(logprob).sum()
    pairs = [(j, k) for j in range(len(a)) for k in range(j + 1, len(a))]
    mass = sum(p[j] * p[k] for j, k in pairs)
    spread = sum(p[j] * p[k] * (1 - a[j] @ a[k]) for j, k in pairs) / mass
    dispersion = 1 - min(max(spread, 0), 1)
    rows = []
    for item in items:
        cosines = a @ world.vectors[item].astype(np.float64)
        best = int(np.argmax(cosines))
        label = 1 / (1 + np.exp(-(calibration.slope * cosines[best] + calibration.intercept)))
        confidence = np.cbrt(dispersion * world.anchors.history_factor[best] * np.exp(logprob[best] / LEVELS))
        rows.append((cosines[best], label, confidence))
    return rows


@pytest.mark.parametrize("seed", range(5))
def test_equals_a_plain_recomputation(seed):
    world = World(seed)
    calibration = contracts.Calibration("c1", 0, "platt", 3.0, -1.0)
    candidates = [f"i{n}" for n in range(30)] + ["nobody knows", "i3"]
    exposed = {"i2": True, "i5": False, "i35": False, "not in the catalogue": True}
    anchors = anchor_set(world.anchors, SPACE, DIM, LEVELS, Config())
    label = make_label(joined(candidates, exposed), 4, anchors, calibration, world.lookup, VERSIONS)

    assert label.outcome == "labelled"
    assert label.unexposed.item == [f"i{n}" for n in range(30) if n not in (2, 5)]
    rows = expected(world, label.unexposed.item, calibration)
    for column, values in zip(
        (label.unexposed.score, label.unexposed.label, label.unexposed.confidence), zip(*rows, strict=True), strict=True
    ):
        np.testing.assert_allclose(column, values, atol=1e-5)
    assert label.exposed.item == list(exposed)
    assert label.exposed.clicked == [1, 0, 0, 1]
    assert label.exposed.score[3] is None
    known_scores = [row[0] for row in expected(world, ["i2", "i5", "i35"], calibration)]
    np.testing.assert_allclose(label.exposed.score[:3], known_scores, atol=1e-5)
    assert label.history == world.anchors.history == ["i0"]
    assert label.provenance.recall == (4, 7)
    assert label.provenance.candidates == 31
    assert label.provenance.unknown == 2
    assert (label.provenance.anchors_ts, label.provenance.anchors_version) == (50, 3)
    assert label.provenance.calibration == "c1"


@pytest.mark.parametrize("empty_record", [True, False])
def test_without_anchors_nothing_is_pseudo_labelled_and_the_record_says_so(empty_record):
    world = World()
    anchors = None
    if empty_record:
        nothing = contracts.UserAnchors("u", 1, 1, [], [], b"", [], ["i3"], "g", "q", "e")
        anchors = anchor_set(nothing, SPACE, DIM, LEVELS, Config())
    label = make_label(joined(["i1", "i2"], {"i1": True}), 0, anchors, None, world.lookup, VERSIONS)
    assert label.outcome == "no_anchors"
    assert label.unexposed.item == []
    assert label.history == []
    assert label.exposed.score == [None]
    assert label.provenance.generator is None
    assert label.provenance.calibration is None


@pytest.mark.parametrize("other", [("space-2", "codes-1"), ("space-1", "codes-2")])
def test_anchors_of_another_space_are_none(other):
    world = World()
    anchors = anchor_set(world.anchors, other, DIM, LEVELS, Config())
    label = make_label(joined(["i1"], {}), 0, anchors, None, world.lookup, VERSIONS)
    assert (label.outcome, label.unexposed.item, label.provenance.anchors_version) == ("no_anchors", [], None)


def test_everything_exposed_or_unknown_is_a_label_without_unexposed_items():
    world = World()
    anchors = anchor_set(world.anchors, SPACE, DIM, LEVELS, Config())
    label = make_label(joined(["i1", "zzz"], {"i1": False}), 0, anchors, None, world.lookup, VERSIONS)
    assert label.unexposed.item == []
    assert label.exposed.score[0] is not None
    label = make_label(joined(["zzz"], {}), 0, anchors, None, world.lookup, VERSIONS)
    assert (label.unexposed.item, label.exposed.item, label.provenance.unknown) == ([], [], 1)


def test_a_score_does_not_depend_on_the_other_candidates():
    world = World()
    anchors = anchor_set(world.anchors, SPACE, DIM, LEVELS, Config())
    every = make_label(joined([f"i{n}" for n in range(40)], {}), 0, anchors, None, world.lookup, VERSIONS)
    for n in (0, 17, 39):
        alone = make_label(joined([f"i{n}"], {}), 0, anchors, None, world.lookup, VERSIONS)
        assert alone.unexposed.score[0] == every.unexposed.score[n]
        assert alone.unexposed.confidence[0] == every.unexposed.confidence[n]


def test_a_revision_keeps_the_digest_and_a_changed_click_does_not():
    world = World()
    anchors = anchor_set(world.anchors, SPACE, DIM, LEVELS, Config())
    args = (0, anchors, None, world.lookup, VERSIONS)
    first = make_label(joined(["i1", "i2"], {"i1": False}), *args)
    again = make_label(joined(["i1", "i2"], {"i1": False}), *args)
    clicked = make_label(joined(["i1", "i2"], {"i1": True}), *args)
    assert digest(first) == digest(again) != digest(clicked)
    revised = corrected(clicked, 1, "feedback")
    assert (revised.revision, revised.provenance.correction) == (1, "feedback")
    assert json.loads(contracts.encode(revised))["exposed"]["clicked"] == [1]


def test_an_isotonic_calibration_travels_as_a_record():
    fitted = Isotonic((-0.2, 0.1, 0.6), (0.1, 0.3, 0.8), 500)
    record = contracts.decode(
        contracts.Calibration, contracts.encode(contracts.calibration_record(fitted.to_dict(), 7))
    )
    assert (record.kind, record.ts) == ("isotonic", 7)
    assert calibration_of(record) == fitted
    with pytest.raises(ValueError, match="labels"):
        calibration_of(contracts.Calibration("bad", 0, "isotonic", scores=[0.1, 0.2], labels=[0.5]))


def test_no_calibration_in_force_is_the_linear_map():
    np.testing.assert_allclose(calibration_of(None).apply(np.array([-1, 0, 1], np.float32)), [0, 0.5, 1])


def test_anchor_columns_that_do_not_fit_are_refused():
    record = anchors_record(np.random.default_rng(0), 3)
    with pytest.raises(ValueError, match="vector"):
        anchor_set(contracts.msgspec.structs.replace(record, vectors=b"123"), SPACE, DIM, LEVELS, Config())
    with pytest.raises(ValueError, match="logprobs"):
        anchor_set(contracts.msgspec.structs.replace(record, logprob=[-1.0]), SPACE, DIM, LEVELS, Config())


def test_provenance_tells_the_anchors_content_and_the_code_that_labelled():
    world = World()
    anchors = anchor_set(world.anchors, SPACE, DIM, LEVELS, Config())
    label = make_label(joined(["i1"], {}), 0, anchors, None, world.lookup, VERSIONS)
    assert (label.provenance.anchors_digest, label.provenance.code) == (anchors.digest, code_version())
    # The same refresh answered twice, over another catalogue.
    other = contracts.msgspec.structs.replace(world.anchors, logprob=[-1.0] * 5)
    assert anchor_set(other, SPACE, DIM, LEVELS, Config()).digest != anchors.digest
    nothing = make_label(joined(["i1"], {}), 0, None, None, world.lookup, VERSIONS)
    assert nothing.provenance.anchors_digest is None


def test_a_record_older_than_a_provenance_field_can_still_be_read():
    label = make_label(joined(["i1"], {}), 0, None, None, World().lookup, VERSIONS)
    old = json.loads(contracts.encode(label))
    del old["provenance"]["anchors_digest"], old["provenance"]["code"]
    assert contracts.decode(contracts.Label, json.dumps(old).encode()).provenance.code is None
