"""The trainer without Kafka: what is let in, what is new, one step, and that a resumed trainer is the same trainer."""

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from prometheus_client import REGISTRY

from gpl.catalogue import Catalogue
from gpl.labels.mixed import MIN_EXPOSURES
from streams.contracts import Exposed, Label, Provenance, Unexposed, encode
from streams.dead_letters import Refused
from streams.frame import Frame
from streams.scoring.served import Served
from streams.settings import TrainerSettings
from streams.trainer import intake, probe
from streams.trainer.checkpoint import Checkpoint, CheckpointError, CheckpointStore
from streams.trainer.columns import Columns, columns
from streams.trainer.dedup import DedupWindow, Fresh, Known
from streams.trainer.journal import Journal
from streams.trainer.trainer import Trainer

DIM, ITEMS, USERS = 16, 60, 40
FRAME = Frame(DIM, 1, "encoder-1", "quantiser-1")
SETTINGS = TrainerSettings(dim=8, learning_rate=0.02, window_records=100, dedup_requests=1000)


def taste(users: int = USERS) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors of the items and of what each user likes."""
    rng = np.random.default_rng(11)
    both = rng.normal(size=(ITEMS + users, DIM)).astype(np.float32)
    both /= np.linalg.norm(both, axis=1, keepdims=True)
    return both[:ITEMS], both[ITEMS:]


VECTORS, LIKES = taste()


@pytest.fixture
def catalogue() -> Catalogue:
    made = Catalogue(DIM, 1)
    for n in range(ITEMS):
        made.put(f"i{n}", VECTORS[n], [n])
    return made


def label(
    request_id: str,
    exposed: dict[str, int],
    unexposed: list[str],
    user_id: str = "u0",
    revision: int = 0,
    encoder: str = "encoder-1",
    ts: int = 1000,
) -> Label:
    likes = LIKES[int(user_id[1:])]
    cosine = {f"i{n}": round(float(VECTORS[n] @ likes), 6) for n in range(ITEMS)}
    liked = np.argsort(-(VECTORS @ likes))[: 1 + len(request_id) % 4]  # some of what is near the user's taste
    return Label(
        request_id=request_id,
        revision=revision,
        user_id=user_id,
        ts=ts,
        outcome="labelled" if unexposed else "no_anchors",
        history=[f"i{n}" for n in liked.tolist()] if unexposed else [],
        exposed=Exposed(list(exposed), list(exposed.values()), [cosine.get(item) for item in exposed]),
        unexposed=Unexposed(
            item=list(unexposed),
            score=[cosine.get(item, 0.0) for item in unexposed],
            label=[round((1 + cosine.get(item, 0.0)) / 2, 6) for item in unexposed],
            confidence=[0.5] * len(unexposed),
        ),
        provenance=Provenance(
            recall=(0, 0),
            feedback=[],
            candidates=len(exposed) + len(unexposed),
            unknown=0,
            anchors_ts=None,
            anchors_version=None,
            encoder=encoder,
            quantiser="quantiser-1",
            generator=None,
            calibration=None,
            config="",
            correction=None,
        ),
    )


def stream(count: int, seed: int = 0) -> list[Label]:
    """Requests of users who click what lies near their taste."""
    rng = np.random.default_rng(seed)
    made = []
    for n in range(count):
        user = int(rng.integers(USERS))
        items = rng.permutation(ITEMS)[:20]
        clicked = VECTORS[items] @ LIKES[user] + 0.1 * rng.normal(size=20) > 0.15
        exposed = {f"i{i}": int(c) for i, c in zip(items[:6], clicked[:6], strict=True)}
        made.append(label(f"r{n}", exposed, [f"i{i}" for i in items[6:]], f"u{user}", ts=1000 + n))
    return made


def train(trainer: Trainer, labels: list[Label], size: int = 8) -> list[dict[str, Any]]:
    lines = []
    for start in range(0, len(labels), size):
        lines += trainer.step(labels[start : start + size])
    return lines


def final(trainer: Trainer) -> dict[str, torch.Tensor]:
    parts = trainer.checkpoint({}, 0).tensors
    return {f"{part}.{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()}


def assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


# Intake


def parse(value: bytes | None) -> Columns:
    """One record, between two sound ones, which must pass whatever it is."""
    sound = encode(label("sound", {"i7": 1}, ["i8", "i9"]))
    before, found, after = intake.read([sound, value, sound])
    for other in (before, after):
        assert isinstance(other, Columns)
        assert (other.request_id, other.items, other.clicked.tolist()) == ("sound", ["i7", "i8", "i9"], [1.0])
        assert (len(other.score), other.confidence.tolist()) == (3, [0.5, 0.5])
    if isinstance(found, ValueError):
        raise found
    return found


def test_a_sound_label_becomes_its_columns() -> None:
    sound = label("r", {"i1": 1, "i2": 0}, ["i3"])
    found = parse(encode(sound))
    assert (found.request_id, found.revision, found.user_id, found.ts) == ("r", 0, "u0", 1000)
    assert (found.space, found.items, found.shown) == (("encoder-1", "quantiser-1"), ["i1", "i2", "i3"], 2)
    assert np.array_equal(found.score, np.array(sound.exposed.score + sound.unexposed.score, np.float32))
    assert found.clicked.tolist() == [1, 0] and found.confidence.tolist() == [0.5]
    assert len(sound.history) > 0 and found.history == sound.history
    older = json.loads(encode(sound))
    del older["history"]  # a record from before there was this field
    assert parse(json.dumps(older).encode()).history == []
    assert np.array_equal(found.label, np.array(sound.unexposed.label, np.float32))
    scoreless = parse(encode(msgspec.structs.replace(sound, exposed=Exposed(["i1"], [0], [None]))))
    assert np.isnan(scoreless.score[0]) and scoreless.clicked.tolist() == [0]
    empty = parse(encode(label("r", {}, [])))
    assert (empty.items, empty.shown, len(empty.label)) == ([], 0, 0)


@pytest.mark.parametrize(
    ("path", "value", "field"),
    [
        (["request_id"], "", "request_id"),
        # What is let in stays: in id tables, dedup window, probe, and so in checkpoints and models.
        (["request_id"], "r" * 257, "request_id"),
        (["user_id"], "u" * 257, "user_id"),
        (["history"], ["i1", "i" * 257], "history"),
        (["exposed", "item"], ["i1", "i" * 257], "exposed.item"),
        (["unexposed", "item"], ["i" * 257], "unexposed.item"),
        (["revision"], -1, "revision"),
        (["ts"], -5, "ts"),
        (["history"], ["i1", ""], "history"),
        (["exposed", "clicked"], [2, 0], "exposed.clicked"),
        (["exposed", "clicked"], [1], "exposed.clicked"),
        (["exposed", "clicked"], [10**400, 0], "exposed.clicked"),
        (["exposed", "score"], [0.1, 1.2], "exposed.score"),
        (["exposed", "score"], [0.1, -1.0011], "exposed.score"),
        (["unexposed", "score"], [None], "unexposed.score"),
        (["exposed", "item"], ["i1", "i3"], "exposed.item"),
        (["exposed", "item"], ["i1", ""], "exposed.item"),
        (["unexposed", "score"], [-7.0], "unexposed.score"),
        (["unexposed", "label"], [1.000001], "unexposed.label"),
        (["unexposed", "label"], [1e308], "unexposed.label"),
        (["unexposed", "confidence"], [-0.1], "unexposed.confidence"),
        (["unexposed", "confidence"], [], "unexposed.confidence"),
        (["unexposed", "label"], None, "unexposed.label"),
        (["extra"], 1, "extra"),
    ],
)
def test_a_label_that_contradicts_its_contract_is_refused_by_field(path: list[str], value: Any, field: str) -> None:
    document = json.loads(encode(label("r", {"i1": 1, "i2": 0}, ["i3"])))
    at = document
    for step in path[:-1]:
        at = at[step]
    at[path[-1]] = value
    with pytest.raises((ValueError, msgspec.ValidationError), match=field):
        parse(json.dumps(document).encode())


@pytest.mark.parametrize("number", [b"NaN", b"1e999", b"-Infinity"])
def test_numbers_that_are_not_finite_are_refused(number: bytes) -> None:
    sound = encode(label("r", {"i1": 1}, ["i3"]))
    poisoned = sound.replace(b'"confidence":[0.5]', b'"confidence":[' + number + b"]")
    assert poisoned != sound
    with pytest.raises(msgspec.DecodeError):
        parse(poisoned)


def test_null_and_headers() -> None:
    with pytest.raises(ValueError, match="null"):
        parse(None)
    assert intake.newest_at([("gpl-closed-at", b"7"), ("gpl-newest-at", b"12")]) == 12
    assert intake.newest_at([("gpl-newest-at", b"-")]) is None
    assert intake.newest_at([("gpl-newest-at", None), ("gpl-newest-at", b"7")]) == 7
    assert intake.newest_at(None) is None


# Deduplication


def admit(window: DedupWindow, record: Label) -> Fresh | None:
    found = window.admit(*columns([record]))
    return found if isinstance(found, Fresh) else None


def test_corrections_train_what_is_new_and_nothing_twice() -> None:
    window = DedupWindow(10)
    first = admit(window, label("r", {"i1": 0}, []))
    assert first is not None and (first.first, [*first.exposed], first.pseudo) == (True, [0], False)
    assert admit(window, label("r", {"i1": 0}, [])) is None
    anchors_came = admit(window, label("r", {"i1": 1, "i2": 1}, ["i3"], revision=1))
    assert anchors_came is not None
    assert (anchors_came.first, anchors_came.exposed, anchors_came.pseudo) == (False, [1], True)
    again = admit(window, label("r", {"i1": 1, "i2": 1, "i3": 0}, ["i4"], revision=3))
    assert again is not None and (again.exposed, again.pseudo) == ([2], False)
    assert admit(window, label("r", {"i9": 1}, [], revision=2)) is None


@given(st.data())
@hypothesis_settings(max_examples=60)
def test_whatever_is_redelivered_each_label_is_trained_once(data: st.DataObject) -> None:
    revisions = []
    for request in range(data.draw(st.integers(1, 4))):
        exposed: dict[str, int] = {}
        for revision in range(data.draw(st.integers(1, 4))):
            exposed |= dict.fromkeys(data.draw(st.lists(st.sampled_from(["a", "b", "c", "d"]), max_size=3)), 0)
            pseudo = data.draw(st.booleans())
            revisions.append(label(f"r{request}", dict(exposed), ["z"] if pseudo else [], revision=revision))
    # Each revision in order at first, then any of them again at any later place.
    order = list(range(len(revisions)))
    for n in data.draw(st.lists(st.integers(0, len(revisions) - 1), max_size=8)):
        order.insert(data.draw(st.integers(order.index(n) + 1, len(order))), n)
    window = DedupWindow(100)
    trained: list[tuple[str, str]] = []
    for position, n in enumerate(order):
        if data.draw(st.booleans()):
            restored = DedupWindow(100)
            restored.restore(window.state(), window.forgot)
            window = restored
        fresh = admit(window, revisions[n])
        if n in order[:position]:
            assert fresh is None
        if fresh is not None:
            trained += [(revisions[n].request_id, revisions[n].exposed.item[i]) for i in fresh.exposed]
            trained += [(revisions[n].request_id, "pseudo")] * fresh.pseudo
    assert len(trained) == len(set(trained))
    expected = {(r.request_id, item) for r in revisions for item in r.exposed.item}
    expected |= {(r.request_id, "pseudo") for r in revisions if r.unexposed.item}
    assert set(trained) == expected


def test_the_window_is_bounded_and_the_oldest_leaves() -> None:
    window = DedupWindow(2)
    for request in ("a", "b", "c"):
        assert admit(window, label(request, {"i1": 0}, [])) is not None
    assert len(window) == 2
    assert admit(window, label("b", {"i1": 0}, [])) is None
    assert admit(window, label("a", {"i1": 0}, [])) is not None


def test_a_correction_of_what_is_forgotten_is_not_trained_and_counted() -> None:
    window = DedupWindow(2)
    # As long as nothing was forgotten, training began behind the first revision.
    assert admit(window, label("early", {"i1": 0}, ["i2"], revision=1)) is not None
    for request in ("a", "b"):
        assert admit(window, label(request, {"i1": 0}, ["i2"])) is not None
    late = label("early", {"i1": 1}, ["i2"], revision=2)
    wider = DedupWindow(9)
    wider.restore(window.state(), window.forgot)
    narrower = DedupWindow(1)
    narrower.restore(window.state(), False)
    for one in (window, wider, narrower):
        assert one.admit(*columns([late])) is Known.FORGOTTEN
    assert admit(window, label("b", {"i1": 0, "i3": 1}, [], revision=1)) is not None
    assert [name for name, _ in window.state()] == ["a", "b"]
    with pytest.raises(ValueError, match="capacity: 0"):
        DedupWindow(0)


# Steps


def test_it_learns(catalogue: Catalogue) -> None:
    trainer = Trainer(SETTINGS, FRAME, catalogue)
    train(trainer, stream(100))
    early = trainer.figures()["gpl"]
    for seed in range(1, 6):
        renamed = [msgspec.structs.replace(r, request_id=f"{seed}-{r.request_id}") for r in stream(100, seed)]
        train(trainer, renamed)
    late = trainer.figures()["gpl"]
    assert late["auc"] > 0.8 and late["auc"] > early["auc"]
    rate = late["click_rate"]
    assert late["log_loss"] < -rate * np.log(rate) - (1 - rate) * np.log(1 - rate) - 0.05  # of one who says the rate
    assert {"gauc", "hr10", "hr10_tail"} <= late.keys()


def test_a_model_says_what_its_trainer_says_also_when_ids_were_forgotten(catalogue: Catalogue) -> None:
    trainer = Trainer(SETTINGS.model_copy(update={"max_users": USERS - 10, "max_items": ITEMS - 5}), FRAME, catalogue)
    # The last ones leave no room for all, and the rows of those that leave lie between those that stay.
    train(trainer, stream(160))
    candidate = trainer.candidate({})
    served = Served("v1", 0, candidate.weights, candidate.ids, FRAME, catalogue)
    assert len(candidate.ids.users) < USERS and len(candidate.ids.items) < ITEMS
    assert candidate.weights["history"].abs().amax(dim=1).count_nonzero() > 10
    items = [f"i{n}" for n in range(ITEMS)]
    anchor_score = np.linspace(-1, 1, ITEMS, dtype=np.float32)
    for user in (f"u{n}" for n in range(USERS)):
        expected, known = candidate.score(user, items[7:27], items, anchor_score)
        assert known.all()
        found = served.logits(served.towers(user, items[7:27], catalogue.rows(items)), anchor_score)
        assert found == pytest.approx(expected, abs=1e-5)


def test_redelivery_changes_nothing_but_the_step(catalogue: Catalogue) -> None:
    trainer, labels = Trainer(SETTINGS, FRAME, catalogue), stream(40)
    train(trainer, labels)
    before, figures = final(trainer), trainer.figures()
    assert train(trainer, labels) == []
    assert_equal(final(trainer), before)
    assert trainer.figures() == figures
    assert trainer.step_count == 10


@pytest.mark.parametrize("stopped_after", [1, 3, 7])
def test_a_resumed_trainer_ends_with_the_same_bits(catalogue: Catalogue, tmp_path: Path, stopped_after: int) -> None:
    settings = SETTINGS.model_copy(update={"shadow": True})
    labels = stream(72)
    undisturbed = Trainer(settings, FRAME, catalogue)
    lines = train(undisturbed, labels)

    first = Trainer(settings, FRAME, catalogue)
    lines_before = train(first, labels[: 8 * stopped_after])
    store = CheckpointStore(tmp_path, keep=1)
    store.save(first.checkpoint({0: 8 * stopped_after}, journal=17, run=3, vectors={0: 60}))
    loaded = store.load_newest()
    assert loaded is not None and loaded.positions == {0: 8 * stopped_after}
    assert (loaded.run, loaded.vectors) == (3, {0: 60})
    second = Trainer(settings, FRAME, catalogue)
    assert second.restore(loaded) == 17
    asked = second.candidate({}).asked
    assert asked == first.candidate({}).asked and len(asked.users) == min(8 * stopped_after, probe.REQUESTS)
    lines_after = train(second, labels[8 * stopped_after :])

    assert_equal(final(second), final(undisturbed))
    assert lines_before + lines_after == lines
    assert second.checkpoint({}, 0).state == undisturbed.checkpoint({}, 0).state
    assert second.newest_event_ts == undisturbed.newest_event_ts == 1071


def test_the_shadow_is_what_training_on_exposed_labels_alone_gives(catalogue: Catalogue) -> None:
    both = Trainer(SETTINGS.model_copy(update={"shadow": True}), FRAME, catalogue)
    alone = Trainer(SETTINGS.model_copy(update={"pseudo_weight": 0.0, "negatives_weight": 0.0}), FRAME, catalogue)
    train(both, stream(40))
    train(alone, stream(40))
    parts = both.checkpoint({}, 0).tensors
    assert_equal(dict(parts["shadow"]), dict(alone.checkpoint({}, 0).tensors["model"]))
    assert not torch.equal(parts["shadow"]["content"], parts["model"]["content"])
    assert both.figures()["exposed"] == alone.figures()["gpl"]


def test_without_evidence_training_is_bit_for_bit_that_without_pseudo_labels(catalogue: Catalogue) -> None:
    rng = np.random.default_rng(0)
    with_labels = Trainer(SETTINGS, FRAME, catalogue)
    without = Trainer(SETTINGS.model_copy(update={"pseudo_weight": 0.0}), FRAME, catalogue)
    for start in range(0, 400, 8):
        # Anchors of somebody else: every request has the scores of another taste.
        strangers = []
        for record in stream(8, seed=start):
            order = rng.permutation(ITEMS)
            score = dict(zip((f"i{n}" for n in order), record.exposed.score + record.unexposed.score, strict=False))
            strangers.append(
                msgspec.structs.replace(
                    record,
                    request_id=f"{start}-{record.request_id}",
                    exposed=Exposed(
                        record.exposed.item, record.exposed.clicked, [score.get(i, 0.0) for i in record.exposed.item]
                    ),
                )
            )
        with_labels.step(strangers)
        without.step(strangers)
    assert with_labels.evidence().weight == 0.0
    assert_equal(final(with_labels), final(without))


def test_evidence_lets_pseudo_labels_through_and_is_part_of_a_checkpoint(catalogue: Catalogue) -> None:
    trainer = Trainer(SETTINGS, FRAME, catalogue)
    train(trainer, stream(400))
    reading = trainer.evidence()
    assert reading.weight > 0.1 and reading.effect > 0.5
    resumed = Trainer(SETTINGS, FRAME, catalogue)
    resumed.restore(trainer.checkpoint({}, 0))
    assert resumed.evidence() == reading
    labels = [msgspec.structs.replace(record, request_id=f"late-{record.request_id}") for record in stream(16, seed=9)]
    without = Trainer(SETTINGS.model_copy(update={"pseudo_weight": 0.0}), FRAME, catalogue)
    without.restore(trainer.checkpoint({}, 0))
    for each in (trainer, resumed, without):
        train(each, labels)
    assert_equal(final(resumed), final(trainer))
    assert not torch.equal(final(without)["model.content"], final(trainer)["model.content"])


def test_pointwise_labels_are_of_their_user_and_item_and_survive_a_restart(catalogue: Catalogue) -> None:
    """Items of which some are clicked by everybody and some by nobody, whatever the anchors say."""
    settings = SETTINGS.model_copy(update={"loss": "pointwise", "negatives_weight": 0.0, "evidence": False})
    good = {f"i{n}": int(n % 2 == 0) for n in range(ITEMS)}
    labels = [
        label(f"r{n}", {i: good[i] for i in record.exposed.item}, record.unexposed.item, record.user_id, ts=1000 + n)
        for n, record in enumerate(stream(480))
    ]

    def gap(trainer: Trainer) -> float:
        """Log-odds by which the model has the good items above the others."""
        nothing = np.full(ITEMS, np.nan, np.float32)
        logits = np.mean([trainer._score(f"u{n}", [], list(good), nothing)[0] for n in range(USERS)], axis=0)
        return float(logits[::2].mean() - logits[1::2].mean())

    trainer = Trainer(settings, FRAME, catalogue)
    train(trainer, labels[:320])
    state = trainer.checkpoint({}, 0)
    assert float(state.tensors["mixed"]["sources"][0, 4]) > MIN_EXPOSURES
    resumed, published = Trainer(settings, FRAME, catalogue), Trainer(settings, FRAME, catalogue)
    resumed.restore(state)
    # Without its state labels are as they were published until enough was exposed: the test can fail.
    told = {**json.loads(state.state), "mixed_sources": None}
    published.restore(dataclasses.replace(state, state=json.dumps(told).encode()))
    for each in (trainer, resumed, published):
        train(each, labels[320:])
    assert_equal(final(resumed), final(trainer))
    assert gap(trainer) > gap(published) + 0.05
    rows = trainer._items.rows(list(good))
    value = trainer.checkpoint({}, 0).tensors["mixed"]["items"][rows, 0]
    assert float(value[::2].min()) > float(value[1::2].max()) + 2


def test_labels_of_user_and_item_are_forgotten_with_their_rows(catalogue: Catalogue) -> None:
    update = {"loss": "pointwise", "max_items": ITEMS - 5, "max_users": USERS - 5}
    trainer = Trainer(SETTINGS.model_copy(update=update), FRAME, catalogue)
    train(trainer, stream(160))
    tensors = trainer.checkpoint({}, 0).tensors
    known = tensors["mixed"]["items"][1:, 1] > 0
    assert torch.equal(known, tensors["ids"]["exposures"][1:][: len(known)] > 0)
    gone = sorted({*range(1, trainer._users.size)} - {*trainer._users.live_rows().tolist()})
    assert gone and not tensors["mixed"]["users"][[row for row in gone if row < len(tensors["mixed"]["users"])]].any()
    assert tensors["mixed"]["users"][1:, 1].count_nonzero() > USERS // 2


def test_every_batch_is_scored_before_it_is_trained_on(catalogue: Catalogue) -> None:
    trainer = Trainer(SETTINGS, FRAME, catalogue)
    train(trainer, stream(16))
    asked = label("asked", {"i1": 1, "i2": 0, "i3": 1}, [f"i{n}" for n in range(4, 40)], "u3")
    network = trainer._learners["gpl"].model  # as it is before the step
    items = asked.exposed.item + asked.unexposed.item
    scores = np.array([s or 0.0 for s in asked.exposed.score] + asked.unexposed.score, np.float32)
    rows = trainer._items.add(items, 0)
    trainer._users.add(["u3"], 0)
    network.grow(trainer._users.size, trainer._items.size)
    network = copy.deepcopy(network)
    network.observe(scores)  # the step standardises by what it has seen, the batch included
    liked = trainer._items.rows(asked.history)
    assert len(liked) and liked.all()
    logits = network.score(trainer._users.row("u3"), rows, catalogue.lookup(items)[1], scores, liked)
    lines = trainer.step([asked])
    shown = [line for line in lines if line["kind"] == "score"]
    assert [(line["item"], line["clicked"]) for line in shown] == [("i1", 1), ("i2", 0), ("i3", 1)]
    assert [line["score"]["gpl"] for line in shown] == pytest.approx(logits[:3].tolist(), abs=1e-5)
    ranked = {line["item"]: line for line in lines if line["kind"] == "rank"}
    assert {item: line["rank"]["gpl"] for item, line in ranked.items()} == {
        "i1": int((logits >= logits[0]).sum()),
        "i3": int((logits >= logits[2]).sum()),
    }
    assert all(
        line["n"] == 39 and line["request_id"] == "asked" and line["user_id"] == "u3" for line in lines if "n" in line
    )


def test_a_correction_is_trained_but_not_evaluated_again(catalogue: Catalogue) -> None:
    trainer = Trainer(SETTINGS, FRAME, catalogue)
    assert train(trainer, [label("r", {"i1": 1}, ["i2", "i3"])]) != []
    before = final(trainer)
    assert train(trainer, [label("r", {"i1": 1, "i2": 1}, ["i3"], revision=1)]) == []
    assert not torch.equal(final(trainer)["model.default"], before["model.default"])


def test_what_corrections_expose_counts_for_the_gate(catalogue: Catalogue) -> None:
    trainer = Trainer(SETTINGS.model_copy(update={"window_records": 1000}), FRAME, catalogue)
    train(trainer, stream(80))
    clean = trainer.candidate({}).feed(1000)
    hidden = [f"i{n}" for n in range(ITEMS)]
    again = [
        label(of.request_id, {item: 1 for item in hidden if item not in of.exposed.item}, [], of.user_id, revision=1)
        for of in stream(80)
    ]
    assert train(trainer, again) == [], "no line of the journal"
    candidate = trainer.candidate({})
    both = candidate.feed(1000)
    assert both.exposures - clean.exposures == both.clicks - clean.clicks == 80 * (ITEMS - 6)
    assert candidate.metrics["click_rate"] > 0.8


def test_a_label_from_the_future_is_refused() -> None:
    sound, ahead = (encode(label("r", {"i1": 1}, [], ts=ts)) for ts in (1000, 1001))
    first, second = intake.read([sound, ahead], latest=[1000, 1000])
    assert isinstance(first, Columns)
    assert isinstance(second, Refused) and second.reason == "future" and "ts: 1001" in str(second)
    beyond = encode(label("r", {"i1": 1}, [])).replace(b'"ts":1000', b'"ts":%d' % 2**63)
    assert isinstance(intake.read([beyond])[0], ValueError)


def test_evidence_forgets_items_with_their_rows(catalogue: Catalogue) -> None:
    trainer = Trainer(SETTINGS.model_copy(update={"max_items": ITEMS - 5}), FRAME, catalogue)
    train(trainer, stream(160))
    tensors = trainer.checkpoint({}, 0).tensors
    # Every pair has a score, and effects are known to forget: candidacies with one, by row.
    effects = next(t for name, t in tensors["model"].items() if name.endswith("effects.items"))
    seen = tensors["evidence"]["0.items"]
    assert torch.equal(seen[:, 0], effects[: len(seen), 1])
    assert float(tensors["evidence"]["0.total"][0]) == float(seen[:, 0].sum())


def test_without_pseudo_labels_there_is_nothing_to_rank_among(catalogue: Catalogue) -> None:
    trainer = Trainer(SETTINGS, FRAME, catalogue)
    lines = trainer.step([label("r", {"i1": 1, "i2": 0}, [])])
    assert [line["kind"] for line in lines] == ["score", "score"]
    assert "hr10" not in trainer.figures()["gpl"]


def skipped(reason: str) -> float:
    return REGISTRY.get_sample_value("gpl_trainer_skipped_total", {"reason": reason}) or 0.0


def test_items_without_a_vector_are_left_out_and_counted(catalogue: Catalogue) -> None:
    catalogue.remove("i2")
    some, none = Trainer(SETTINGS, FRAME, catalogue), Trainer(SETTINGS, FRAME, catalogue)
    before = skipped("no_vector")
    some.step([label("r", {"i1": 1, "i2": 1, "nowhere": 0}, ["i3", "i4", "gone"])])
    assert skipped("no_vector") == before + 3
    none.step([label("r", {"i1": 1}, ["i3", "i4"])])
    assert_equal(final(some), final(none))
    untouched = final(some)
    some.step([label("s", {"nowhere": 1}, ["gone"], "u5")])
    assert_equal(final(some), untouched)


def test_labels_of_another_space_are_not_trained_on(catalogue: Catalogue) -> None:
    trainer = Trainer(SETTINGS, FRAME, catalogue)
    before = skipped("other_space")
    untouched = final(trainer)
    assert trainer.step([label("r", {"i1": 1}, ["i3"], encoder="encoder-2")]) == []
    assert skipped("other_space") == before + 1
    assert_equal(final(trainer), untouched)


def test_a_checkpoint_of_another_space_or_without_the_shadow_is_refused(catalogue: Catalogue) -> None:
    trainer = Trainer(SETTINGS, FRAME, catalogue)
    train(trainer, stream(8))
    saved = trainer.checkpoint({}, 0)
    with pytest.raises(CheckpointError, match=r"artefacts: versions .*encoder-2.* new trainer.checkpoints"):
        Trainer(SETTINGS, dataclasses.replace(FRAME, encoder="encoder-2"), catalogue).restore(saved)
    with pytest.raises(CheckpointError, match=r"trainer\.shadow: true"):
        Trainer(SETTINGS.model_copy(update={"shadow": True}), FRAME, catalogue).restore(saved)
    with pytest.raises(CheckpointError, match=f"trainer.dim: {SETTINGS.dim + 1}, .* has {SETTINGS.dim};"):
        Trainer(SETTINGS.model_copy(update={"dim": SETTINGS.dim + 1}), FRAME, catalogue).restore(saved)


def test_diverged_training_is_neither_saved_nor_continued(catalogue: Catalogue) -> None:
    trainer = Trainer(SETTINGS, FRAME, catalogue)
    train(trainer, stream(8))
    with torch.no_grad():
        trainer._learners["gpl"].model.bias.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="bias"):
        trainer.checkpoint({}, 0)
    with pytest.raises(FloatingPointError, match="diverged before step 2"):
        trainer.step([label("new", {"i1": 1}, ["i3"])])


def test_the_tail_follows_the_exposures_counted_so_far(catalogue: Catalogue) -> None:
    trainer = Trainer(SETTINGS, FRAME, catalogue)
    popular = [label(f"p{n}", {"i1": 0, "i2": 0}, ["i3"]) for n in range(3)]
    train(trainer, [*popular, label("q", {"i4": 0}, ["i5", "i6"])], size=1)
    lines = trainer.step([label("r", {"i1": 1, "i5": 1}, ["i2", "i3", "i4"])])
    assert {line["item"]: line["tail"] for line in lines if line["kind"] == "rank"} == {"i1": False, "i5": True}


# The evaluation journal


def test_the_journal_goes_back_to_what_the_checkpoint_knew(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "journal.jsonl"
    journal = Journal(path)
    journal.cut(0)
    journal.append([{"n": 1}, {"n": 2}])
    known = journal.sync()
    journal.append([{"n": 3}])
    journal.sync()
    journal.close()
    resumed = Journal(path)
    resumed.cut(known)
    resumed.append([{"n": 4}])
    resumed.sync()
    resumed.close()
    assert [json.loads(line)["n"] for line in path.read_text().splitlines()] == [1, 2, 4]


def test_the_journal_of_another_history_is_moved_aside(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    for n in range(3):
        journal = Journal(path)
        journal.cut(0)
        journal.append([{"n": n}])
        assert journal.sync() == path.stat().st_size == 8
        journal.close()
    found = {file.name: json.loads(file.read_text())["n"] for file in tmp_path.iterdir()}
    assert found == {"journal.jsonl.before-1": 0, "journal.jsonl.before-2": 1, "journal.jsonl": 2}


def test_checkpoint_carries_what_it_says(catalogue: Catalogue) -> None:
    trainer = Trainer(SETTINGS, FRAME, catalogue)
    trainer.step(stream(8), newest_at=77)
    saved = trainer.checkpoint({2: 5}, 9)
    assert isinstance(saved, Checkpoint)
    assert (saved.step, saved.positions, saved.newest_event_ts) == (1, {2: 5}, 1007)
    candidate = trainer.candidate({2: 5})
    assert candidate.newest_at == 77 and candidate.evaluated == 8
    assert len(candidate.weights["users"]) == len(candidate.ids.users) + 1
    assert len(candidate.weights["items"]) == len(candidate.ids.items) + 1


def test_a_batch_of_nothing_but_what_cannot_be_read_is_refused_record_by_record():
    found = intake.read([b"{", None, b'{"request_id": NaN}'])
    assert all(isinstance(error, ValueError) for error in found) and len(found) == 3
    assert intake.read([]) == []
