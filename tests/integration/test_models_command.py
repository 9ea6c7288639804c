"""Poisoned labels against a real trainer, and ``gpl models`` as an operator uses it, on the real Kafka."""

import itertools
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from gpl.catalogue import Catalogue
from streams import kafka as clients
from streams import models
from streams.cli import app
from streams.contracts import Exposed, ItemVector, Label, ModelUpdate, Provenance, Unexposed, encode
from streams.frame import Frame
from streams.settings import KafkaSettings, LabelSettings, Settings, TrainerSettings
from streams.topics import full_name
from streams.trainer import loop, rebuild
from streams.trainer.checkpoint import CheckpointError, CheckpointStore
from streams.trainer.publish import Announced
from streams.trainer.trainer import Trainer
from streams.views import vector_bytes

DIM, ITEMS, USERS = 16, 80, 60
FRAME = Frame(DIM, 1, "encoder-1", "quantiser-1")
_RNG = np.random.default_rng(3)
VECTORS, LIKES = (
    (v / np.linalg.norm(v, axis=1, keepdims=True)).astype(np.float32)
    for v in (_RNG.normal(size=(ITEMS, DIM)), _RNG.normal(size=(USERS, DIM)))
)


class Site:
    """A feed of labels, and a trainer that can be run beside it."""

    def __init__(self, kafka: KafkaSettings, directory: Path) -> None:
        self.settings = Settings(
            kafka=kafka,
            trainer=TrainerSettings(
                checkpoints=directory / "checkpoints",
                models=directory / "models",
                dim=8,
                batch_records=8,
                learning_rate=0.01,
                window_records=200,
                recent_records=50,
                publish_min_records=50,
                publish_every_wall_seconds=0.2,
                keep_checkpoints=200,
                keep_models=200,
            ),
        )
        self.store = models.ModelStore(directory / "models")
        self.checkpoints = CheckpointStore(directory / "checkpoints", 200)
        self.numbers = itertools.count()
        self.rng = np.random.default_rng(5)
        self.producer = clients.producer(kafka)
        self.sent = 0
        for n in range(ITEMS):
            item = ItemVector(f"i{n}", vector_bytes(VECTORS[n]), [n], "hash", FRAME.encoder, FRAME.quantiser)
            self.producer.send(full_name(kafka, "item-vectors"), key=item.item_id.encode(), value=encode(item))
        self.producer.flush()

    def label(self) -> Label:
        n, user = next(self.numbers), int(self.rng.integers(USERS))
        items = self.rng.permutation(ITEMS)[:20]
        cosine = (VECTORS[items] @ LIKES[user]).round(6).astype(float)
        clicked = cosine[:6] + 0.2 * self.rng.normal(size=6) > 0.2
        names = [f"i{i}" for i in items]
        return Label(
            request_id=f"r{n}",
            revision=0,
            user_id=f"u{user}",
            ts=1_000 + n,
            outcome="labelled",
            exposed=Exposed(names[:6], clicked.astype(int).tolist(), cosine[:6].tolist()),
            unexposed=Unexposed(names[6:], cosine[6:].tolist(), ((1 + cosine[6:]) / 2).tolist(), [0.5] * 14),
            provenance=Provenance((0, n), [], 20, 0, None, None, FRAME.encoder, FRAME.quantiser, None, None, "", None),
        )

    def feed(self, count: int, change: Callable[[Label], Label | bytes] = lambda label: label) -> None:
        for _ in range(count):
            record = self.label()
            made = change(record)
            value = made if isinstance(made, bytes) else encode(made)
            self.producer.send(full_name(self.settings.kafka, "labels"), key=record.user_id.encode(), value=value)
        self.producer.flush()
        self.sent += count

    @contextmanager
    def trainer(self, start_from: str = "latest", skip_to: str | None = None, **changes: Any) -> Iterator[None]:
        own = self.settings.trainer.model_copy(update=changes)
        settings, stop = self.settings.model_copy(update={"trainer": own}), threading.Event()
        failures: list[BaseException] = []

        def train() -> None:
            try:
                loop.run(settings, stop, frame=FRAME, start_from=start_from, skip_to=skip_to)
            except BaseException as error:
                failures.append(error)

        thread = threading.Thread(target=train)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join(120)
            assert not thread.is_alive()
        if failures:
            raise failures[0]

    def trained(self) -> bool:
        """Whether a checkpoint covers all that was sent."""
        steps = self.checkpoints.steps()
        try:
            return bool(steps) and sum(self.checkpoints.manifest(steps[-1]).positions.values()) == self.sent
        except CheckpointError:  # just discarded
            return False

    def serving(self) -> ModelUpdate:
        with Announced(self.settings.kafka, "preranker") as announced:
            assert announced.last is not None
            return announced.last

    def reasons(self) -> list[str]:
        """Of refusals but for those at the beginning, when there is too little to judge by."""
        return [refused.reason for refused in self.store.refusals() if refused.reason != "few_records"]


def until(condition: Callable[[], bool], timeout: float = 120.0) -> None:
    for _ in range(int(timeout / 0.02)):
        if condition():
            return
        threading.Event().wait(0.02)
    raise TimeoutError(f"not within {timeout} s")


@pytest.fixture
def site(kafka_settings: KafkaSettings, tmp_path: Path) -> Iterator[Site]:
    made = Site(kafka_settings, tmp_path)
    yield made
    made.producer.close()


def with_clicks(label: Label, clicked: int) -> Label:
    exposed = msgspec.structs.replace(label.exposed, clicked=[clicked] * len(label.exposed.item))
    return msgspec.structs.replace(label, exposed=exposed)


def elsewhere(label: Label) -> Label:
    return msgspec.structs.replace(label, provenance=msgspec.structs.replace(label.provenance, encoder="encoder-2"))


def of_another_catalogue(label: Label) -> Label:
    exposed, unexposed = (
        msgspec.structs.replace(part, item=[f"other-{item}" for item in part.item])
        for part in (label.exposed, label.unexposed)
    )
    return msgspec.structs.replace(label, exposed=exposed, unexposed=unexposed)


def not_numbers(label: Label) -> bytes:
    return encode(label).replace(b'"confidence":[0.5', b'"confidence":[NaN')


def of_one_user(label: Label) -> Label:
    return msgspec.structs.replace(label, user_id="u0")


def turned_round(label: Label) -> Label:
    """Clicks on what the user dislikes, and scores that say so: as random as it gets, but consistent."""
    clicked = [1 - click for click in label.exposed.clicked]
    return msgspec.structs.replace(label, exposed=msgspec.structs.replace(label.exposed, clicked=clicked))


@pytest.mark.parametrize(
    ("poison", "reasons"),
    [
        (lambda label: with_clicks(label, 1), {"one_class", "click_rate", "regression", "drift"}),
        (of_one_user, {"one_user"}),
        (turned_round, {"regression", "click_rate", "drift"}),
    ],
    ids=["all ones", "one user", "turned round"],
)
def test_nothing_is_published_while_the_labels_are_poison(
    site: Site, poison: Callable[[Label], Label], reasons: set[str]
) -> None:
    site.feed(600)
    with site.trainer():
        until(site.trained)
    good = site.serving()
    sound = site.checkpoints.steps()[-1]
    assert site.reasons() == []
    site.feed(400, poison)
    over = int(time.time() * 1000) + 1
    with site.trainer():
        until(site.trained)
    # Of a few requests nothing can be told; where the machine is slow a model may have been made with those.
    served = site.serving()
    assert served == good or served.metrics["records"] - good.metrics["records"] < 50, "poison is in service"
    assert set(site.reasons()) <= reasons and site.reasons()
    # The feed is put right: back to before the poison, past it, and models come again, without the poison in them.
    site.feed(300)
    before = site.checkpoints.manifest(sound)
    with site.trainer(f"step-{sound}", skip_to=f"ts={over}"):
        until(site.trained)
    assert site.checkpoints.manifest(sound) == before, "the place to go back to"
    manifest = models.read(site.serving().uri, site.serving().checksum).manifest
    assert (manifest.run, manifest.records) == (3, 900)
    assert rebuild.rebuild(site.settings, manifest.version, frame=FRAME).differing == []


@pytest.mark.parametrize(
    ("poison", "counted"),
    [(elsewhere, 0), (not_numbers, 0), (of_another_catalogue, 60)],
    ids=["another encoder", "NaN", "another catalogue"],
)
def test_labels_that_cannot_be_used_change_nothing(
    site: Site, poison: Callable[[Label], Label | bytes], counted: int
) -> None:
    site.feed(200)
    with site.trainer():
        until(site.trained)
    good = site.serving()
    before = models.read(good.uri, good.checksum).weights
    site.feed(60, poison)
    with site.trainer():
        until(site.trained)
    assert site.serving() == good and site.reasons() == []
    site.feed(1)
    with site.trainer():
        until(site.trained)
    now = models.read(site.serving().uri, site.serving().checksum)
    assert now.manifest.records == 201 + counted and not torch.equal(now.weights["content"], before["content"])


def test_training_that_blows_up_stops_and_publishes_nothing(site: Site) -> None:
    site.feed(200)
    with site.trainer():
        until(site.trained)
    good, sound = site.serving(), site.checkpoints.steps()[-1]
    site.feed(200)
    stopped = threading.Event()
    with pytest.raises(loop.TrainingDivergedError, match="learning_rate"), site.trainer(learning_rate=1e30):
        until(lambda: "not_finite" in site.reasons() or stopped.is_set())
    assert site.serving() == good and site.reasons() == ["not_finite"]
    assert site.checkpoints.steps()[-1] == sound
    with site.trainer():  # with the old settings it goes on from where it was sound
        until(site.trained)
    assert models.number_of(site.serving().version) > models.number_of(good.version)


def test_the_model_after_a_backfill_is_made_again_from_its_checkpoint(site: Site) -> None:
    catalogue = Catalogue(DIM, 1)
    for n in range(ITEMS):
        catalogue.put(f"i{n}", VECTORS[n], [n])
    trainer = Trainer(site.settings.trainer, FRAME, catalogue)
    for _ in range(10):
        trainer.step([site.label() for _ in range(8)])
    site.checkpoints.save(trainer.checkpoint({}, 0))  # as `gpl backfill`: of no run, at no positions
    site.feed(200)
    with site.trainer():
        until(site.trained)
    version = site.serving().version
    made = rebuild.rebuild(site.settings, version, frame=FRAME)
    assert (made.base, made.differing, made.first_difference) == (10, [], None)
    assert sum(made.candidate.positions.values()) == 200
    with pytest.raises(rebuild.RebuildError, match="goes on from step 10"):
        rebuild.rebuild(site.settings, version, from_log=True, frame=FRAME)


def test_a_first_run_without_a_batch_and_other_settings_since_are_no_obstacle_to_a_rebuild(site: Site) -> None:
    with site.trainer("earliest"):  # and stopped before there is anything to train on
        until(lambda: site.checkpoints.steps() == [0])
    in_200_s = int(time.time() * 1000) + 200_000
    site.feed(40)
    site.feed(20, lambda label: msgspec.structs.replace(label, ts=in_200_s))
    site.feed(40)
    with site.trainer():
        until(site.trained)
    version = site.serving().version
    assert site.store.manifest(version)[0].run == 2
    stricter = site.settings.model_copy(update={"labels": LabelSettings(max_ahead_seconds=0)})
    made = rebuild.rebuild(stricter, version, from_log=True, frame=FRAME)
    assert (made.differing, made.first_difference) == ([], None)


def run(site: Site, tmp_path: Path, *arguments: str, code: int = 0) -> str:
    """Output of ``gpl models ...``; read as JSON where ``--json`` is among the arguments."""
    config = tmp_path / "gpl.toml"
    kafka, own = site.settings.kafka, site.settings.trainer
    config.write_text(
        f'[kafka]\nbootstrap_servers = "{kafka.bootstrap_servers}"\nprefix = "{kafka.prefix}"\npartitions = 3\n'
        f'[trainer]\ncheckpoints = "{own.checkpoints}"\nmodels = "{own.models}"\ndim = 8\n'
    )
    result = CliRunner().invoke(app, ["models", *arguments, "--config", str(config)])
    assert result.exit_code == code, result.output
    return result.output


def test_models_are_listed_compared_rolled_back_pinned_and_made_again(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPL_CONFIG", "")
    monkeypatch.setattr(rebuild.Frame, "load", lambda artefacts: FRAME)
    for _ in range(3):
        site.feed(100)
        with site.trainer():
            until(site.trained)
    versions = site.store.versions()
    newest, oldest = versions[0], versions[-1]

    listed = json.loads(run(site, tmp_path, "list", "--json"))
    assert [model["version"] for model in listed["models"]] == versions[:20]
    assert listed["serving"] == newest and listed["pin"] is None
    assert newest in run(site, tmp_path, "list", "--limit", "1")
    shown = json.loads(run(site, tmp_path, "show", str(models.number_of(newest)), "--json"))
    assert (shown["records"], shown["users"], shown["serving"]) == (300, USERS, True)
    assert "sound" in run(site, tmp_path, "show", newest)
    changed = json.loads(run(site, tmp_path, "diff", oldest, newest, "--json"))
    assert changed["records"] == 300 - site.store.manifest(oldest)[0].records
    assert changed["weights"]["content"]["change"] > 0 and changed["ids"]["items"]["removed"] == 0
    assert "relative" in run(site, tmp_path, "diff", oldest, newest)

    run(site, tmp_path, "rollback", oldest)
    assert site.serving().version == oldest
    site.feed(60)
    with site.trainer():
        until(site.trained)
    assert site.serving().version == oldest and len(site.store.versions()) > len(versions)
    run(site, tmp_path, "unpin")
    site.feed(60)
    with site.trainer():
        until(site.trained)
    assert models.number_of(site.serving().version) > models.number_of(newest)
    run(site, tmp_path, "pin")
    assert json.loads(run(site, tmp_path, "list", "--json"))["pin"]["version"] == site.serving().version
    assert "unpinned" in run(site, tmp_path, "unpin")
    run(site, tmp_path, "rollback", newest, "--no-pin")
    assert site.serving().version == newest and site.store.pinned() is None

    made = json.loads(run(site, tmp_path, "rebuild", newest, "--out", str(tmp_path / "again"), "--json"))
    assert made["identical"] and made["first_difference"] is None and made["base"] is None
    again = models.ModelStore(tmp_path / "again").read(newest)
    assert torch.equal(again.weights["users"], site.store.read(newest).weights["users"])
    steps = json.loads(run(site, tmp_path, "checkpoints", "--json"))
    assert "step-" in run(site, tmp_path, "checkpoints")
    assert "identical" in run(site, tmp_path, "rebuild", newest, "--base", str(steps[-1]["step"]))

    # What is wrong is said.
    assert "no such version" in run(site, tmp_path, "show", "999", code=1)
    site.store.storage.put(f"{oldest}/model.safetensors", b"half")
    assert "does not match" in run(site, tmp_path, "rollback", oldest, code=1)
    assert site.serving().version == newest
    monkeypatch.setattr(rebuild, "_same_bits", lambda one, other: False)
    assert "differs" in run(site, tmp_path, "rebuild", newest, code=1)
