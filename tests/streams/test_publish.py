"""The gate, the published directory and its checks, and announcements on the real Kafka."""

import dataclasses
import errno
import json
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import structlog
import torch
from kafka.errors import KafkaError
from prometheus_client import REGISTRY
from typer.testing import CliRunner

from streams import kafka as clients
from streams import models
from streams.cli import app
from streams.contracts import ModelUpdate, decode
from streams.log_view import LogView
from streams.settings import KafkaSettings, Settings, TrainerSettings
from streams.trainer import publish, versions
from streams.trainer.gate import RULES, Feed, gate, levels
from streams.trainer.publish import Announced, Candidate, Publisher, announce, update_of

SETTINGS = TrainerSettings(publish_min_records=10, publish_max_regression=0.1)


FEED = Feed(requests=10, exposures=100, clicks=20, of_one_user=2)
ASKED = models.Probe(["u1"], [["i9"]], [["i1", "i2", "i3", "i4"]], [[0.1, None, 0.3, 0.2]], [])


def scores(logits: list[float]) -> Any:
    """A model that scores whatever it is asked so, and knows i1 to i4."""

    def score(user: str, history: list[str], items: list[str], raw: Any) -> Any:
        return np.array([logits[int(item[1:]) - 1] for item in items], np.float32), np.ones(len(items), bool)

    return score


def candidate(step: int = 3, **changes: Any) -> Candidate:
    changes = {"trained": changes.get("records", 10 * step), **changes}
    whole = Candidate(
        step=step,
        run=1,
        records=10 * step,
        trained=0,
        weights={"w": torch.arange(6.0).reshape(2, 3), "count": torch.tensor([4])},
        ids=models.Ids(["u1", "ü2"], ["i1"]),
        config={"dim": 3, "dim_content": 8},
        versions={"encoder": "e", "quantiser": "q"},
        positions={1: 7, 0: 5 * step},
        metrics={"log_loss": 0.5, "auc": 0.7, "click_rate": 0.2},
        evaluated=10,
        newest_event_ts=1000,
        newest_at=1_000_000,
        feed=lambda newest: FEED,
        asked=ASKED,
        score=scores([0.5, 1.5, -1.0, 0.0]),
    )
    return dataclasses.replace(whole, **changes)


def judged(
    changes: dict[str, Any] | None = None, last: dict[str, float] | None = None, moved: dict[str, float] | None = None
) -> str | None:
    """Reason of the refusal."""
    c = candidate(**(changes or {}))
    refusal = gate(c.weights, c.metrics, c.evaluated, [c.feed(10)], last or {}, moved or {}, SETTINGS)
    assert refusal is None or (refusal.reason in RULES and refusal.why)
    return refusal and refusal.reason


def test_the_gate_lets_a_sound_model_through() -> None:
    assert judged() is None
    last = {"log_loss": 0.41, "auc": 0.79, "click_rate": 0.1}
    assert judged(last=last, moved={"finite": 1.0, "psi": 0.9, "agreement": 0.4}) is None
    assert judged({"metrics": {}}, last) is None  # a window without exposed items
    quiet = Feed(requests=3, exposures=6, clicks=0, of_one_user=3)
    assert judged({"feed": lambda newest: quiet}, last) is None  # too few to say anything


@pytest.mark.parametrize(
    ("changes", "last", "moved", "reason"),
    [
        ({"weights": {"w": torch.tensor([1.0, float("nan")])}}, {}, {}, "not_finite"),
        ({"weights": {"w": torch.tensor([1.0, float("-inf")])}}, {}, {}, "not_finite"),
        ({}, {}, {"finite": 0.0}, "not_finite"),
        ({"evaluated": 9}, {}, {}, "few_records"),
        ({"metrics": {"log_loss": 0.61}}, {"log_loss": 0.5}, {}, "regression"),
        ({"metrics": {"log_loss": float("nan")}}, {"log_loss": 0.5}, {}, "regression"),
        ({"metrics": {"auc": 0.59}}, {"auc": 0.7}, {}, "regression"),
        ({"feed": lambda n: Feed(10, 100, 100, 2)}, {}, {}, "one_class"),
        ({"feed": lambda n: Feed(10, 100, 0, 2)}, {}, {}, "one_class"),
        ({"feed": lambda n: Feed(10, 100, 100, 2)}, {"click_rate": 0.2}, {}, "one_class"),
        ({"feed": lambda n: Feed(10, 100, 80, 2)}, {"click_rate": 0.1}, {}, "click_rate"),
        ({"feed": lambda n: Feed(50, 1000, 0, 2)}, {"click_rate": 0.2}, {}, "one_class"),
        ({"feed": lambda n: Feed(50, 1000, 5, 2)}, {"click_rate": 0.2}, {}, "click_rate"),
        ({"feed": lambda n: Feed(50, 500, 400, 2)}, {"click_rate": 0.6, "level_click_rate": 0.2}, {}, "click_rate"),
        ({"metrics": {"log_loss": 0.1, "click_rate": 0.0}}, {"auc": 0.7, "log_loss": 0.5}, {}, "regression"),
        ({}, {"auc": 0.75, "level_auc": 0.85}, {}, "regression"),
        # The entropy of .2 is .50: nothing is known any more of what gave .15 nats.
        ({}, {"log_loss": 0.5, "level_excess_log_loss": -0.15}, {}, "regression"),
        ({"feed": lambda n: Feed(60, 100, 20, 31)}, {"click_rate": 0.2}, {}, "one_user"),
        ({}, {}, {"psi": 1.1}, "drift"),
        ({}, {}, {"psi": float("nan")}, "drift"),
        ({}, {}, {"psi": 0.1, "agreement": 0.2}, "drift"),
    ],
)
def test_the_gate_refuses(
    changes: dict[str, Any], last: dict[str, float], moved: dict[str, float], reason: str
) -> None:
    assert judged(changes, last, moved) == reason


def test_levels_keep_the_best_and_come_slowly_to_what_is() -> None:
    day, own = 24 * 3600.0, TrainerSettings(recent_records=50)
    figures = {"auc": 0.8, "log_loss": 0.4, "click_rate": 0.5}
    assert levels(figures, 49, {}, 0, own) == {}  # the best of small windows is luck
    first = levels(figures, 50, {}, 0, own)
    assert first == {"level_auc": 0.8, "level_click_rate": 0.5, "level_excess_log_loss": 0.4 - np.log(2)}
    worse, better = {"auc": 0.7, "log_loss": 0.5, "click_rate": 0.5}, {"auc": 0.9, "log_loss": 0.3, "click_rate": 0.5}
    assert levels(worse, 50, first, 0, own) == first
    assert levels(better, 50, first, 0, own)["level_auc"] == 0.9
    later = levels({**worse, "click_rate": 0.25}, 50, first, day, own)
    assert later["level_auc"] == pytest.approx(0.75) and later["level_click_rate"] == pytest.approx(0.375)
    assert levels({"click_rate": 1.0}, 50, first, 0, own) == first  # what is not defined stays as it was
    assert levels(figures, 50, {"auc": 0.8, "psi": 0.1}, 0, own) == first


def manifest(version: str = "v000001-00000003") -> models.Manifest:
    return models.Manifest(
        model="preranker",
        version=version,
        step=3,
        config={"dim": 3},
        encoder="e",
        quantiser="q",
        source_offsets={"0": 15},
        newest_event_ts=1000,
        published_at=2000,
        metrics={"auc": 0.7},
    )


@pytest.fixture(params=["local", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> models.ModelStore:
    return models.ModelStore(
        tmp_path / "a b#c%d ü" if request.param == "local" else f"{request.getfixturevalue('bucket')}/models"
    )


def test_a_published_model_reads_back_exactly(store: models.ModelStore) -> None:
    probe = models.Probe(["u1"], [["i9"]], [["i1"]], [[None]], [[0.25]])
    uri, checksum = store.write(manifest(), candidate().weights, candidate().ids, probe)
    published = models.read(uri, checksum)
    assert (published.ids, published.probe) == (candidate().ids, probe)
    assert all(torch.equal(published.weights[name], tensor) for name, tensor in candidate().weights.items())
    assert published.manifest.metrics["auc"] == 0.7
    assert set(published.manifest.files) == {"model.safetensors", "ids.json", "probe.json"}
    assert update_of(store, manifest().version).checksum == checksum
    with pytest.raises(FileExistsError, match="never changed"):
        store.write(manifest(), candidate().weights, candidate().ids)


@pytest.mark.parametrize("name", ["model.safetensors", "ids.json", "probe.json", "manifest.json"])
def test_any_changed_or_missing_file_is_noticed(store: models.ModelStore, name: str) -> None:
    uri, checksum = store.write(manifest(), candidate().weights, candidate().ids)
    file = f"{manifest().version}/{name}"
    data = bytearray(store.storage.read(file))
    data[-1] ^= 1
    store.storage.put(file, bytes(data))
    with pytest.raises(models.ModelError, match=name):
        models.read(uri, checksum)
    store.storage.remove(file)
    with pytest.raises(models.ModelError, match=name):
        models.read(uri, checksum)


def test_versions_are_numbered_whatever_is_in_storage(store: models.ModelStore) -> None:
    assert store.versions() == []
    for name in ("v000009-00000001", "v000010-00000000", "v000002-99999999", "vacation", "v12-x"):
        store.storage.put(f"{name}/manifest.json", b"{}")
    assert [version[:7] for version in store.versions()] == ["v000010", "v000009", "v000002"]
    assert models.number_of(models.version_name(1_234_567, 5)) == 1_234_567


@pytest.mark.parametrize("uri", ["nowhere://host/model", "relative/path", "file://other-host/models/v1"])
def test_uris_that_lead_nowhere_are_model_errors(uri: str) -> None:
    with pytest.raises(models.ModelError, match=r"uri|nowhere"):
        models.read(uri, "")


def test_a_pin_and_refusals_stay(store: models.ModelStore) -> None:
    assert store.pinned() is None and store.refusals() == [] and not store.accepted()
    store.pin("v000001-00000003")
    store.accept()
    for reason in ("drift", "drift", "click_rate"):
        store.refuse(reason, f"why {reason}", step=7, at=len(store.refusals()) + 10)
    again = models.ModelStore(store.storage)
    pin = again.pinned()
    assert pin is not None and pin.version == "v000001-00000003"
    assert [(r.reason, r.times) for r in again.refusals()] == [("drift", 2), ("click_rate", 1)]
    assert again.accepted()
    again.clear_acceptance()
    again.unpin()
    assert store.pinned() is None and not store.accepted()
    for n in range(150):
        store.refuse(f"r{n}", "", n, n)
    assert len(store.refusals()) == 100 and store.refusals()[-1].reason == "r149"


def test_an_unreadable_pin_is_not_taken_for_none(store: models.ModelStore) -> None:
    store.storage.put("pin.json", b"{")
    with pytest.raises(models.ModelError, match="pin"):
        store.pinned()


@pytest.fixture
def producer(kafka_settings: KafkaSettings) -> Iterator[Any]:
    with closing(clients.producer(kafka_settings)) as made:
        yield made


def announced(kafka: KafkaSettings) -> list[ModelUpdate]:
    found: list[ModelUpdate] = []
    with closing(LogView(kafka, {"model-updates": lambda r: found.append(decode(ModelUpdate, r.value))})) as view:
        view.warm_up()
    return found


def own(models_at: Path, **changes: Any) -> TrainerSettings:
    return SETTINGS.model_copy(update={"models": models_at, **changes})


def refusals(reason: str) -> float:
    return REGISTRY.get_sample_value("gpl_publications_refused_total", {"reason": reason}) or 0.0


def test_publication_is_announced_and_continues_after_a_restart(
    kafka_settings: KafkaSettings, producer: Any, tmp_path: Path
) -> None:
    settings = own(tmp_path, keep_models=2, keep_hourly_models=0)
    with closing(Publisher(kafka_settings, settings, producer, clock=lambda: 1042.5)) as publisher:
        first = publisher.publish(candidate())
        assert first is not None and first.version == "v000001-00000003"
        assert first.source_offsets == {"0": 15, "1": 7}
        assert first.metrics == {
            "log_loss": 0.5,
            "auc": 0.7,
            "click_rate": 0.2,
            "records": 30,
            "trained": 30,
            "model_age_seconds": 42.5,
        }
        assert REGISTRY.get_sample_value("gpl_model_age_seconds") == 42.5
        assert publisher.publish(candidate()) is None  # nothing new
        published = models.read(first.uri, first.checksum)
        assert (published.manifest.version, published.manifest.run) == (first.version, 1)
        assert published.probe.logits == [[0.5, 1.5, -1.0, 0.0]]

    # Another trainer of the same name takes over: same numbering, same memory of what is out.
    with closing(Publisher(kafka_settings, settings, producer, clock=lambda: 1042.5)) as other:
        assert other.last == first
        assert other.publish(candidate()) is None
        before = refusals("regression"), refusals("drift")
        assert other.publish(candidate(4, metrics={"log_loss": 0.7})) is None
        assert REGISTRY.get_sample_value("gpl_publication_blocked") == 1
        assert other.publish(candidate(4, records=41, score=scores([50, 51, 52, 53]))) is None
        assert (refusals("regression"), refusals("drift")) == (before[0] + 1, before[1] + 1)
        assert [(r.reason, r.step) for r in other.store.refusals()] == [("regression", 4), ("drift", 4)]
        second, third = other.publish(candidate(5)), other.publish(candidate(6))
        assert second is not None and second.version == "v000002-00000005"
        assert second.metrics["psi"] == 0 and second.metrics["agreement"] == pytest.approx(1)
        assert third is not None and announced(kafka_settings) == [first, second, third]
        assert REGISTRY.get_sample_value("gpl_publication_blocked") == 0
        assert other.store.versions() == [third.version, second.version]


@pytest.mark.parametrize("ran_ahead", [False, True])
def test_hourly_models_outlive_the_newest(
    kafka_settings: KafkaSettings, producer: Any, tmp_path: Path, ran_ahead: bool
) -> None:
    now = [(1_000_000 + 9_000 * ran_ahead) * 3600.0]
    settings = own(tmp_path, keep_models=2, keep_hourly_models=2)
    with closing(Publisher(kafka_settings, settings, producer, clock=lambda: now[0])) as publisher:
        first = publisher.publish(candidate(1))
        now[0] = 1_000_000 * 3600.0
        for step in range(2, 11):
            assert publisher.publish(candidate(step)) is not None
            now[0] += 1200
        # Three an hour: hours 0 to 2. Kept: the newest two, the first of hours 1 and 2, what a clock ahead has written.
        kept = ["v000010", "v000009", "v000008", "v000005"]
        assert first is not None
        assert [v[:7] for v in publisher.store.versions()] == kept + ["v000001"] * ran_ahead


@contextmanager
def unreadable(file: Path) -> Iterator[None]:
    """A file that is there and cannot be read for a while."""
    aside = file.with_name("aside")
    file.rename(aside)
    file.mkdir()
    yield
    file.rmdir()
    aside.rename(file)


def test_what_cannot_be_read_for_a_while_is_kept(kafka_settings: KafkaSettings, producer: Any, tmp_path: Path) -> None:
    settings = own(tmp_path, keep_models=1, keep_hourly_models=2)
    with closing(Publisher(kafka_settings, settings, producer)) as publisher:
        for step in (1, 2):
            assert publisher.publish(candidate(step)) is not None
    first = publisher.store.versions()[-1]
    with closing(Publisher(kafka_settings, settings, producer)) as publisher:  # knows no hours yet
        with unreadable(tmp_path / first / "manifest.json"):
            assert publisher.publish(candidate(3)) is not None
        assert publisher.publish(candidate(4)) is not None
        assert publisher.store.versions() == ["v000004-00000004", first]
        # Nor is the last model taken for none: what follows is compared with it.
        drifted = candidate(5, score=scores([50, 51, 52, 53]))
        with unreadable(tmp_path / "v000004-00000004" / "probe.json"):
            assert publisher.publish(drifted) is None
        assert publisher.store.refusals() == [] and publisher.store.versions() == ["v000004-00000004", first]
        assert publisher.publish(drifted) is None and publisher.store.refusals()[0].reason == "drift"
        # What is gone will not come back.
        (tmp_path / "v000004-00000004" / "probe.json").unlink()
        assert publisher.publish(candidate(6, score=scores([50, 51, 52, 53]))) is not None


def test_records_that_move_no_weight_are_not_published(
    kafka_settings: KafkaSettings, producer: Any, tmp_path: Path
) -> None:
    with closing(Publisher(kafka_settings, own(tmp_path), producer)) as publisher:
        assert publisher.publish(candidate(1, trained=0)) is None
        first = publisher.publish(candidate(2))
        assert publisher.publish(candidate(3, trained=20)) is None
    with closing(Publisher(kafka_settings, own(tmp_path), producer)) as publisher:
        assert publisher.publish(candidate(4, trained=20)) is None
        assert announced(kafka_settings) == [first] and publisher.store.refusals() == []
        assert publisher.publish(candidate(4, trained=21)) is not None


def test_a_pin_holds_until_it_is_taken_off_and_outlives_restarts(
    kafka_settings: KafkaSettings, producer: Any, tmp_path: Path
) -> None:
    with closing(Publisher(kafka_settings, own(tmp_path), producer)) as publisher:
        first = publisher.publish(candidate(1))
        assert first is not None
        publisher.store.pin(first.version)
        assert publisher.publish(candidate(2)) is None
    with closing(Publisher(kafka_settings, own(tmp_path), producer)) as publisher:
        assert publisher.publish(candidate(3)) is None
        # Made and kept, not announced.
        assert publisher.store.versions() == ["v000003-00000003", "v000002-00000002", first.version]
        assert announced(kafka_settings) == [first]
        publisher.store.unpin()
        fourth = publisher.publish(candidate(4))
        assert fourth is not None and announced(kafka_settings) == [first, fourth]


@pytest.mark.parametrize(("step", "evaluated"), [(3, 10), (3, 9), (2, 10)], ids=["a model", "refused", "nothing new"])
def test_what_is_pinned_comes_back_when_something_else_was_left_in_service(
    kafka_settings: KafkaSettings, producer: Any, tmp_path: Path, step: int, evaluated: int
) -> None:
    with closing(Publisher(kafka_settings, own(tmp_path), producer)) as publisher:
        first, second = publisher.publish(candidate(1)), publisher.publish(candidate(2))
        assert first is not None and second is not None
        publisher.store.pin(first.version)  # by one that was killed before it announced it
        assert publisher.publish(candidate(step, evaluated=evaluated)) is None
        assert announced(kafka_settings) == [first, second, first] and publisher.last == first
        assert publisher.publish(candidate(4)) is None and publisher.last == first


def test_a_pin_of_what_serves_holds_when_the_next_is_announced_meanwhile(
    kafka_settings: KafkaSettings, producer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with closing(Publisher(kafka_settings, own(tmp_path), producer)) as publisher:
        first = publisher.publish(candidate(1))
        assert first is not None
        pin = publisher.store.pin

        def late(version: str) -> None:
            publisher.publish(candidate(2))
            pin(version)

        store = models.ModelStore(tmp_path)
        monkeypatch.setattr(store, "pin", late)
        versions.hold(Settings(kafka=kafka_settings, trainer=own(tmp_path)), store, first.version)
        served = announced(kafka_settings)
        assert served[1].version == "v000002-00000002" and served[-1] == first


def test_a_pin_that_cannot_be_read_stops_publication_and_can_be_taken_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nothing = SimpleNamespace(last=None, refresh=lambda: None, close=lambda: None)
    monkeypatch.setattr(publish, "Announced", lambda *_: nothing)
    monkeypatch.setattr(publish, "announce", lambda *_: None)
    monkeypatch.setenv("GPL_TRAINER__MODELS", str(tmp_path))
    with closing(Publisher(KafkaSettings(), own(tmp_path), None)) as publisher:
        publisher.store.storage.put("pin.json", b"{")
        with structlog.testing.capture_logs() as logged:
            assert publisher.publish(candidate()) is None
        assert [(line["event"], "gpl models pin" in line["why"]) for line in logged] == [("publication_put_off", True)]
        assert publisher.store.versions() == []
        for said in ("unpinned what could not be read", "nothing was pinned"):
            done = CliRunner().invoke(app, ["models", "unpin"])
            assert done.exit_code == 0 and said in done.output
        assert publisher.publish(candidate()) is not None


@pytest.mark.parametrize(
    ("name", "call"), [("pinned", 1), ("pinned", 2), ("pinned", 3), ("write", 1), ("versions", 1), ("manifest", 1)]
)
def test_a_publication_that_storage_fails_is_put_off(
    kafka_settings: KafkaSettings, producer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, call: int
) -> None:
    with closing(Publisher(kafka_settings, own(tmp_path), producer)) as publisher:
        assert publisher.publish(candidate(1)) is not None
        works, calls = getattr(publisher.store, name), 0

        def fails(*arguments: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == call:
                raise models.UnreadableError("away") if name == "pinned" else OSError(errno.ENOSPC, "No space left")
            return works(*arguments)

        monkeypatch.setattr(publisher.store, name, fails)
        for _ in range(2):  # whichever of the two it meets, nothing new need come for the other
            publisher.publish(candidate(2))
        assert calls >= call
        assert [update.version[-2:] for update in announced(kafka_settings)] == ["01", "02"]
        assert publisher.publish(candidate(3)) is not None


def test_what_failed_publications_left_crowds_out_no_good_one(
    kafka_settings: KafkaSettings, producer: Any, tmp_path: Path
) -> None:
    settings = own(tmp_path, keep_models=2, keep_hourly_models=0)
    with closing(Publisher(kafka_settings, settings, producer)) as publisher:
        for step in (1, 2):
            assert publisher.publish(candidate(step)) is not None
        for number in (3, 4):
            publisher.store.storage.put(f"{models.version_name(number, 3)}/model.safetensors", b"half")
        assert publisher.publish(candidate(5)) is not None
        assert publisher.store.versions() == ["v000005-00000005", "v000002-00000002"]
    # What another release made counts: it may be gone back to.
    manifest = tmp_path / "v000002-00000002" / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "a_new_field": 1}))
    with closing(Publisher(kafka_settings, own(tmp_path, keep_models=3), producer)) as publisher:
        assert publisher.publish(candidate(6)) is not None
        assert [version[:7] for version in publisher.store.versions()] == ["v000006", "v000005", "v000002"]


@pytest.mark.parametrize("name", ["remove", "pinned", "clear_acceptance"])
def test_what_fails_behind_the_announcement_puts_nothing_off(
    kafka_settings: KafkaSettings, producer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    settings = own(tmp_path, keep_models=2, keep_hourly_models=0)
    with closing(Publisher(kafka_settings, settings, producer)) as publisher:
        for step in (1, 2):
            assert publisher.publish(candidate(step)) is not None
        publisher.store.accept()
        works, count = getattr(publisher.store, name), len(announced(kafka_settings))

        def fails(*arguments: Any) -> Any:
            if name == "pinned" and len(announced(kafka_settings)) == count:
                return works(*arguments)
            raise models.UnreadableError("away") if name == "pinned" else OSError(errno.EACCES, "Permission denied")

        monkeypatch.setattr(publisher.store, name, fails)
        assert publisher.publish(candidate(3)) is not None
        assert publisher.publish(candidate(3)) is None
        assert len(announced(kafka_settings)) == count + 1


def test_retention_leaves_what_is_gone_back_to_at_that_moment(
    kafka_settings: KafkaSettings, producer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = own(tmp_path, keep_models=1, keep_hourly_models=0)
    with closing(Publisher(kafka_settings, settings, producer)) as publisher:
        first = publisher.publish(candidate(1))
        assert first is not None
        retain = publisher._retain

        def late(*known: Any) -> None:
            whole = Settings(kafka=kafka_settings, trainer=settings)
            versions.put_into_service(whole, models.ModelStore(tmp_path), first.version, pin=True)
            retain(*known)

        monkeypatch.setattr(publisher, "_retain", late)
        publisher.publish(candidate(2))
        assert publisher.store.read(first.version) and announced(kafka_settings)[-1] == first


def test_a_version_that_is_removed_before_it_is_announced_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, sent = models.ModelStore(tmp_path), list[ModelUpdate]()
    store.write(manifest(), candidate().weights, candidate().ids)
    pin = store.pin

    def late(version: str) -> None:
        pin(version)
        store.remove(version)

    store.storage.put("pin.json", b"{")  # what cannot be read stands in no command's way
    monkeypatch.setattr(store, "pin", late)
    monkeypatch.setattr(versions, "producer", lambda _: SimpleNamespace(close=lambda: None))
    monkeypatch.setattr(versions, "announce", lambda kafka, producer, update: sent.append(update))
    with pytest.raises(models.ModelError, match="removed by the trainer"):
        versions.put_into_service(Settings(trainer=own(tmp_path)), store, manifest().version, pin=True)
    assert store.pinned() is None and sent == []


@pytest.mark.parametrize("pinned", [None, "v000001-00000001"])
def test_a_version_that_could_not_be_announced_leaves_the_pin_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pinned: str | None
) -> None:
    def fails(*_: object) -> None:
        raise KafkaError("no broker")

    monkeypatch.setattr(publish, "Announced", lambda *_: SimpleNamespace(last=None, refresh=lambda: None))
    monkeypatch.setattr(publish, "announce", lambda *_: None)
    publisher = Publisher(KafkaSettings(), own(tmp_path), None)
    for step in (1, 2):
        publisher.publish(candidate(step))
    if pinned is not None:
        publisher.store.pin(pinned)
    monkeypatch.setattr(versions, "producer", lambda _: SimpleNamespace(close=lambda: None))
    monkeypatch.setattr(versions, "announce", fails)
    with pytest.raises(KafkaError):
        versions.put_into_service(Settings(trainer=own(tmp_path)), publisher.store, "v000002-00000002", pin=True)
    kept = publisher.store.pinned()
    assert (kept and kept.version) == pinned


def test_a_pin_shows_from_the_next_attempt_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nothing = SimpleNamespace(last=None, refresh=lambda: None, close=lambda: None)
    monkeypatch.setattr(publish, "Announced", lambda *_: nothing)
    monkeypatch.setattr(publish, "announce", lambda *_: None)
    with closing(Publisher(KafkaSettings(), own(tmp_path), None)) as publisher:
        publisher.publish(candidate(1))
        assert REGISTRY.get_sample_value("gpl_models_pinned") == 0
        publisher.store.pin(publisher.store.versions()[0])
        assert publisher.publish(candidate(2, evaluated=9)) is None  # refused, and pinned all the same
        assert REGISTRY.get_sample_value("gpl_models_pinned") == 1
        publisher.store.unpin()
        assert publisher.publish(candidate(3)) is not None
        assert REGISTRY.get_sample_value("gpl_models_pinned") == 0


def test_a_pin_that_comes_between_look_and_announcement_wins(
    kafka_settings: KafkaSettings, producer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with closing(Publisher(kafka_settings, own(tmp_path), producer)) as publisher:
        first = publisher.publish(candidate(1))
        assert first is not None
        looks: list[models.Pin | None] = []

        def pinned() -> models.Pin | None:
            looks.append(None if len(looks) < 2 else models.Pin(first.version, 0))  # the attempt's, the announcement's
            return looks[-1]

        monkeypatch.setattr(publisher.store, "pinned", pinned)
        assert publisher.publish(candidate(2)) is None
        assert announced(kafka_settings)[-1] == first and publisher.last == first


def test_after_a_rollback_the_next_is_compared_with_what_is_in_service(
    kafka_settings: KafkaSettings, producer: Any, tmp_path: Path
) -> None:
    with closing(Publisher(kafka_settings, own(tmp_path), producer)) as publisher:
        first = publisher.publish(candidate(1))
        second = publisher.publish(candidate(2, metrics={"log_loss": 0.55}))
        assert first is not None and second is not None
        announce(kafka_settings, producer, first)  # as an operator does
        assert publisher.publish(candidate(3, metrics={"log_loss": 0.63})) is None
        assert publisher.last == first
        publisher.store.accept()  # the operator: it is the world that has changed
        third = publisher.publish(candidate(3, records=31, metrics={"log_loss": 0.63}))
        assert third is not None and models.number_of(third.version) == 3
        assert not publisher.store.accepted()


def test_an_acceptance_is_for_a_model_that_comes_into_service(
    kafka_settings: KafkaSettings, producer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise KafkaError("no broker")

    worse = {"log_loss": 2.0}
    with closing(Publisher(kafka_settings, own(tmp_path), producer)) as publisher:
        first = publisher.publish(candidate(1))
        assert first is not None
        publisher.store.accept()
        publisher.store.pin(first.version)
        assert publisher.publish(candidate(2, metrics=worse)) is None and publisher.store.accepted()
        publisher.store.unpin()
        with monkeypatch.context() as patch, pytest.raises(KafkaError):
            patch.setattr(publish, "announce", fails)
            publisher.publish(candidate(3, metrics=worse))
        assert publisher.publish(candidate(4, metrics=worse)) is not None and not publisher.store.accepted()


def test_a_model_of_another_space_is_not_compared_with(
    kafka_settings: KafkaSettings, producer: Any, tmp_path: Path
) -> None:
    worse = {"metrics": {"log_loss": 2.0, "auc": 0.5, "click_rate": 0.2}}
    with closing(Publisher(kafka_settings, own(tmp_path), producer)) as publisher:
        assert publisher.publish(candidate()) is not None
        assert publisher.publish(candidate(step=4, **worse)) is None
        other = {"encoder": "e2", "quantiser": "q"}
        assert publisher.publish(candidate(step=5, versions=other, score=scores([9.0, -9.0, 0.0, 1.0]), **worse))
        assert publisher.last is not None and publisher.last.metrics["auc"] == 0.5


def test_another_models_announcements_are_not_mistaken_for_ones_own(
    kafka_settings: KafkaSettings, producer: Any, tmp_path: Path
) -> None:
    with closing(Publisher(kafka_settings, own(tmp_path / "theirs", model_name="theirs"), producer)) as theirs:
        assert theirs.publish(candidate()) is not None
    with closing(Announced(kafka_settings, "preranker")) as mine:
        assert mine.last is None


def test_a_number_is_not_used_again_when_the_directory_is_gone(
    kafka_settings: KafkaSettings, producer: Any, tmp_path: Path
) -> None:
    with closing(Publisher(kafka_settings, own(tmp_path / "a"), producer)) as first:
        assert first.publish(candidate()) is not None
    with closing(Publisher(kafka_settings, own(tmp_path / "b"), producer)) as moved:
        update = moved.publish(candidate(8))
    assert update is not None and update.version == "v000002-00000008"
    document = json.loads((models.path_of(update.uri) / "manifest.json").read_text())
    assert document["version"] == update.version and document["published_at"] > 1_600_000_000_000
