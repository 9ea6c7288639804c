"""The scorer against the formula in numpy, and what it does with changes, bad models and bad records.

Records go in by the handlers that the scorer gives to its log view; the way over the real Kafka is in
tests/integration/test_trainer_kafka.py.
"""

import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import REGISTRY

from gpl.labels import labeller
from gpl.labels.labeller import PreparedAnchors
from gpl.preranker.model import PreRanker
from streams import models
from streams.contracts import ItemVector, ModelUpdate, Record, UserAnchors, encode
from streams.frame import Frame
from streams.metrics import Health
from streams.scoring.anchors import anchor_scores
from streams.scoring.scorer import READ_SECONDS, RETRY_SECONDS, NotReadyError, Scorer, best_first
from streams.settings import Settings, TrainerSettings
from streams.views import vector_bytes

DIM, LEVELS = 8, 2
FRAME = Frame(DIM, LEVELS, "encoder-1", "quantiser-1")
ITEMS = [f"i{n}" for n in range(12)]
USERS = ["u1", "u2"]
HISTORY = ["i2", "i9", "gone", "i5"]  # of users with anchors; the model knows the first and the last


@dataclass
class Message:
    key: bytes
    value: bytes | None
    topic: str = "state"
    partition: int = 0
    offset: int = 0


def unit(rows: int, seed: int) -> np.ndarray:
    vectors = np.random.default_rng(seed).normal(size=(rows, DIM)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


VECTORS = dict(zip(ITEMS, unit(len(ITEMS), 1), strict=True))


class World:
    """A scorer, and the hands that write its topics."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.health = Health()
        settings = Settings(trainer=TrainerSettings(models=directory, dim=4))
        self.scorer = Scorer(settings, FRAME, self.health)

    def write(self, topic: str, key: str, record: Record | None) -> None:
        self.scorer.handlers[topic](Message(key.encode(), None if record is None else encode(record)))

    def item(self, item_id: str, vector: np.ndarray, encoder: str = FRAME.encoder) -> None:
        record = ItemVector(item_id, vector_bytes(vector), [1, 2], "hash", encoder, FRAME.quantiser)
        self.write("item-vectors", item_id, record)

    def anchors(self, user_id: str, ts: int, vectors: np.ndarray) -> None:
        k = len(vectors)
        record = UserAnchors(
            user_id,
            ts,
            ts,
            [[0, 0]] * k,
            [-1.0] * k,
            vector_bytes(vectors),
            [0.5] * k,
            HISTORY,
            "g",
            "quantiser-1",
            "encoder-1",
        )
        self.write("user-anchors", user_id, record)

    def model(self, seed: int, encoder: str = FRAME.encoder, users: list[str] = USERS) -> tuple[PreRanker, ModelUpdate]:
        """A pre-ranker with every weight off its start, published; not yet announced."""
        network = PreRanker(DIM, 4, seed)
        network.grow(3, 8)
        rng = np.random.default_rng(seed)
        network.observe(rng.normal(size=50).astype(np.float32))
        for name, parameter in network.named_parameters():
            rows = {"users": 3, "items": 8, "history": 8, "item_bias": 8}.get(name)
            values = parameter.data if rows is None else parameter.data[1:rows]
            values += values.new_tensor(rng.normal(size=tuple(values.shape)))
        number = 1 + len(models.ModelStore(self.directory).versions())
        manifest = models.Manifest(
            model="preranker",
            version=models.version_name(number, seed),
            step=seed,
            config={"dim": 4, "dim_content": DIM},
            encoder=encoder,
            quantiser=FRAME.quantiser,
            source_offsets={},
            newest_event_ts=0,
            published_at=0,
            metrics={},
        )
        uri, checksum = models.ModelStore(self.directory).write(
            manifest, network.state_tensors(), models.Ids(users, ITEMS[:7])
        )
        return network, ModelUpdate("preranker", manifest.version, uri, checksum, {}, 0, {})

    def announce(self, update: ModelUpdate) -> None:
        self.write("model-updates", update.model, update)
        self.scorer.refresh()


@pytest.fixture
def world(tmp_path: Path) -> World:
    made = World(tmp_path)
    for item_id in ITEMS[:10]:
        made.item(item_id, VECTORS[item_id])
    made.anchors("u1", 100, unit(3, 7))
    return made


def by_formula(network: PreRanker, user_id: str, item_id: str, anchors: np.ndarray | None) -> float:
    weights = {name: tensor.double().numpy() for name, tensor in network.state_tensors().items()}
    user_row = USERS.index(user_id) + 1 if user_id in USERS else 0
    item_row = ITEMS.index(item_id) + 1 if item_id in ITEMS[:7] else 0
    vector = VECTORS[item_id].astype(np.float64)
    user = weights["default"] + weights["users"][user_row]
    if anchors is not None:
        user = user + (weights["history"][3] + weights["history"][6]) / np.sqrt(2)
    tower = user @ (weights["content"] @ vector + weights["items"][item_row])
    tower += weights["item_bias"][item_row, 0] + weights["bias"]
    if anchors is None:
        return float(tower + weights["w_missing"])
    count, mean, squares = weights["score_moments"]
    cosine = (anchors.astype(np.float64) @ vector).max()
    return float(tower + weights["w_score"] * (cosine - mean) / np.sqrt(squares / count))


@pytest.mark.parametrize(("user_id", "anchors"), [("u1", unit(3, 7)), ("u2", None), ("nobody", None)])
def test_scores_are_those_of_the_formula(world: World, user_id: str, anchors: np.ndarray | None) -> None:
    network, update = world.model(5)
    world.announce(update)
    scored = world.scorer.score(user_id, ITEMS[:10])
    assert scored.model_version == update.version and scored.unknown == []
    expected = {item: by_formula(network, user_id, item, anchors) for item in ITEMS[:10]}
    assert scored.items == sorted(expected, key=lambda item: -expected[item])
    assert scored.scores == pytest.approx([expected[item] for item in scored.items], abs=1e-5)


def test_items_without_a_vector_come_last_and_are_named(world: World) -> None:
    world.announce(world.model(5)[1])
    scored = world.scorer.score("u1", ["i11", "i1", "gone", "i2"])
    assert scored.items[2:] == scored.unknown == ["i11", "gone"]
    assert sorted(scored.items[:2]) == ["i1", "i2"]
    assert scored.scores[2:] == [None, None] and None not in scored.scores[:2]
    nothing = world.scorer.score("u1", ["gone"])
    assert (nothing.items, nothing.scores, nothing.unknown) == (["gone"], [None], ["gone"])


def test_a_new_item_scores_from_content_as_soon_as_it_has_a_vector(world: World) -> None:
    network, update = world.model(5)
    world.announce(update)
    world.item("i11", VECTORS["i11"])
    scored = world.scorer.score("u1", ["i11"])
    assert scored.scores == pytest.approx([by_formula(network, "u1", "i11", unit(3, 7))], abs=1e-5)
    world.write("item-vectors", "i11", None)
    assert world.scorer.score("u1", ["i11"]).unknown == ["i11"]


def test_the_newest_anchors_by_event_time_are_used(world: World) -> None:
    network, update = world.model(5)
    world.announce(update)
    world.anchors("u1", 300, unit(2, 8))
    world.anchors("u1", 200, unit(2, 9))  # arrives late
    expected = by_formula(network, "u1", "i1", unit(2, 8))
    assert world.scorer.score("u1", ["i1"]).scores == pytest.approx([expected], abs=1e-5)
    world.write("user-anchors", "u1", None)
    expected = by_formula(network, "u1", "i1", None)
    assert world.scorer.score("u1", ["i1"]).scores == pytest.approx([expected], abs=1e-5)


def test_without_a_model_it_is_not_ready(world: World) -> None:
    assert world.health.waiting() == ["model"]
    with pytest.raises(NotReadyError):
        world.scorer.score("u1", ["i1"])
    world.announce(world.model(5)[1])
    assert world.health.waiting() == []


@given(st.lists(st.one_of(st.floats(width=32, allow_nan=False), st.sampled_from([0.0, -0.0, 1.0, -1.0])), max_size=50))
def test_best_first_is_the_stable_order(logits: list[float]) -> None:
    values = np.array(logits, np.float32)
    assert best_first(values).tolist() == np.argsort(-values, kind="stable").tolist()


def test_a_user_who_comes_again_is_scored_on_what_holds_then(world: World) -> None:
    network, update = world.model(5)
    world.announce(update)
    first = world.scorer.score("u1", ITEMS[:6])
    assert world.scorer.score("u1", ITEMS[:6]) == first
    world.item("i1", VECTORS["i11"])  # content moves
    world.write("item-vectors", "i2", None)
    world.item("i10", VECTORS["i10"])  # takes the row of i2
    scored = world.scorer.score("u1", ["i0", "i1", "i2", "i10", "i7"])
    by_item = dict(zip(scored.items, scored.scores, strict=True))
    assert by_item["i0"] == dict(zip(first.items, first.scores, strict=True))["i0"]
    assert by_item["i2"] is None
    for item_id in ("i10", "i7"):
        assert by_item[item_id] == pytest.approx(by_formula(network, "u1", item_id, unit(3, 7)), abs=1e-5)
    cosine = (VECTORS["i11"] @ unit(3, 7).T).max(keepdims=True)
    moved = network.score(1, np.array([2]), VECTORS["i11"][None], cosine, np.array([3, 6]))
    assert by_item["i1"] == pytest.approx(float(moved[0]), abs=1e-5)


@given(
    n=st.integers(1, 700),
    anchors=st.integers(1, 11),
    matching=st.sampled_from(["max", "kernel"]),
    seed=st.integers(0, 99),
)
def test_anchor_scores_are_those_of_labels(n: int, anchors: int, matching: Any, seed: int) -> None:
    rng = np.random.default_rng(seed)
    config = labeller.Config(matching=matching)
    logprobs = -rng.exponential(size=anchors).astype(np.float32)
    prepared = PreparedAnchors.build(unit(anchors, seed), logprobs, np.ones(anchors, np.float32), LEVELS, config)
    items, rows = unit(50, seed + 1), rng.integers(50, size=n)
    np.testing.assert_allclose(
        anchor_scores(prepared, items, rows), labeller.score(prepared, items[rows])[0], rtol=0, atol=2e-6
    )


def test_what_the_model_does_not_know_is_told(world: World) -> None:
    world.announce(world.model(5)[1])
    for user, known, anchors in (("u1", True, True), ("u2", True, False), ("nobody", False, False)):
        scored = world.scorer.score(user, ["i1"])
        assert (scored.known_user, scored.anchors) == (known, anchors)


def test_the_catalogue_may_outgrow_the_layout_of_the_model(world: World) -> None:
    network, update = world.model(5)
    world.announce(update)
    late = unit(1500, 11)
    for n, vector in enumerate(late):
        world.item(f"late-{n}", vector)
    scored = world.scorer.score("u2", [f"late-{n}" for n in range(1500)])
    assert scored.unknown == []
    expected = network.score(2, np.zeros(1500, np.int64), late, None)
    by_item = dict(zip(scored.items, scored.scores, strict=True))
    assert [by_item[f"late-{n}"] for n in range(1500)] == pytest.approx(expected.tolist(), abs=1e-5)


def refusals() -> float:
    return REGISTRY.get_sample_value("gpl_models_refused_total") or 0.0


def test_a_damaged_model_is_refused_and_the_old_one_stays(world: World) -> None:
    _, good = world.model(5)
    world.announce(good)
    before = world.scorer.score("u1", ITEMS)
    _, bad = world.model(6)
    weights = models.path_of(bad.uri) / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-3] ^= 4
    weights.write_bytes(data)
    count = refusals()
    world.announce(bad)
    assert refusals() == count + 1
    assert world.scorer.score("u1", ITEMS) == before


def test_models_that_do_not_fit_are_refused(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID", raising=False)  # a store that cannot be read for want of credentials
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    _, good = world.model(5)
    world.announce(good)
    _, elsewhere = world.model(6, encoder="encoder-2")
    _, short = world.model(7, users=["u1"])
    _, gone = world.model(8)
    remote = ModelUpdate("preranker", "v9", "s3://bucket/v9", "0" * 64, {}, 0, {})
    unseen = ModelUpdate("preranker", "v9", gone.uri + "-gone", gone.checksum, {}, 0, {})
    for update in (elsewhere, short, remote, unseen):
        count = refusals()
        world.announce(update)
        assert refusals() == count + 1
        assert world.scorer.model_version == good.version


def test_a_model_that_could_not_be_read_for_a_while_is_tried_again(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, update = world.model(5)
    directory = models.path_of(update.uri)
    away = directory.rename(directory.with_name("away"))
    world.announce(update)
    assert world.scorer.model_version is None
    away.rename(directory)
    world.scorer.refresh()
    assert world.scorer.model_version is None, "not at once again"
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + RETRY_SECONDS)
    world.scorer.refresh()
    assert world.scorer.model_version == update.version


def test_a_storage_that_hangs_holds_nothing_else_up(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.announce(world.model(5)[1])
    _, update = world.model(6)
    go_on, read = threading.Event(), models.read

    def slow(*arguments: Any) -> models.Published:
        assert go_on.wait(60)
        return read(*arguments)

    monkeypatch.setattr(models, "read", slow)
    world.write("model-updates", update.model, update)
    for _ in range(3):
        world.scorer.refresh(wait=False)
    assert world.scorer.model_version != update.version
    # A vector that comes meanwhile is in the old model at once, and in the new one when that comes.
    world.item("late", VECTORS["i1"])
    assert world.scorer.score("u1", ["late"]).unknown == []
    go_on.set()
    world.scorer.refresh()
    assert world.scorer.model_version == update.version and world.scorer.score("u1", ["late"]).unknown == []


def test_a_model_whose_reading_takes_too_long_is_asked_for_again(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    _, hangs = world.model(5)
    never, read = threading.Event(), models.read

    def slow(uri: str, checksum: str) -> models.Published:
        assert uri != hangs.uri or never.wait(60)
        return read(uri, checksum)

    monkeypatch.setattr(models, "read", slow)
    world.write("model-updates", hangs.model, hangs)
    world.scorer.refresh(wait=False)
    _, newer = world.model(6)
    world.write("model-updates", newer.model, newer)
    now = time.perf_counter()
    monkeypatch.setattr(time, "perf_counter", lambda: now + READ_SECONDS + 1)
    world.scorer.refresh(wait=False)
    world.scorer.refresh()
    assert world.scorer.model_version == newer.version
    never.set()


def test_only_the_announcements_of_the_served_name_count(world: World) -> None:
    _, update = world.model(5)
    world.announce(ModelUpdate("other", update.version, update.uri, update.checksum, {}, 0, {}))
    assert world.scorer.model_version is None


@pytest.mark.parametrize("topic", ["item-vectors", "user-anchors", "model-updates"])
@pytest.mark.parametrize("value", [b"{", b'{"item_id": 3}', b"\xff"])
def test_a_record_that_cannot_be_read_is_skipped(world: World, topic: str, value: bytes) -> None:
    world.announce(world.model(5)[1])
    before = world.scorer.score("u1", ITEMS)
    world.scorer.handlers[topic](Message(b"preranker", value))
    world.item("i1", 3 * VECTORS["i1"])  # not of unit length
    world.item("i2", VECTORS["i3"], encoder="encoder-2")  # of another space
    assert world.scorer.score("u1", ITEMS) == before


def test_a_request_never_mixes_two_versions(world: World) -> None:
    updates = [world.model(seed)[1] for seed in (5, 6)]
    expected = {}
    for update in updates:
        world.announce(update)
        expected[update.version] = world.scorer.score("u1", ITEMS)
    done = threading.Event()

    def reload() -> None:
        for _ in range(40):
            for update in updates:
                world.announce(update)
        done.set()

    thread = threading.Thread(target=reload)
    thread.start()
    seen = set()
    while not done.is_set() or len(seen) < 2:
        scored = world.scorer.score("u1", ITEMS)
        assert scored == expected[scored.model_version]
        seen.add(scored.model_version)
        if done.is_set():
            break
    thread.join()
    assert world.scorer.model_version == updates[1].version
