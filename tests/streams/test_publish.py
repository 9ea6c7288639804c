"""The gate, the published directory and its checks, and announcements on the real Kafka."""

import dataclasses
import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from prometheus_client import REGISTRY

from streams import kafka as clients
from streams import models
from streams.contracts import ModelUpdate, decode
from streams.log_view import LogView
from streams.settings import KafkaSettings, TrainerSettings
from streams.trainer.publish import Candidate, Publisher, gate

SETTINGS = TrainerSettings(publish_min_records=10, publish_max_regression=0.1)


def candidate(step: int = 3, **changes: Any) -> Candidate:
    whole = Candidate(
        step=step,
        weights={"w": torch.arange(6.0).reshape(2, 3), "count": torch.tensor([4])},
        ids=models.Ids(["u1", "ü2"], ["i1"]),
        config={"dim": 3, "dim_content": 8},
        versions={"encoder": "e", "quantiser": "q"},
        positions={1: 7, 0: 5 * step},
        metrics={"log_loss": 0.5, "auc": 0.7},
        evaluated=10,
        newest_event_ts=1000,
        newest_at=1_000_000,
    )
    return dataclasses.replace(whole, **changes)


def test_the_gate_lets_a_sound_model_through() -> None:
    assert gate(candidate(), None, SETTINGS) is None
    assert gate(candidate(), {"log_loss": 0.41}, SETTINGS) is None
    assert gate(candidate(metrics={}), {"log_loss": 0.41}, SETTINGS) is None  # a window without exposed items


@pytest.mark.parametrize(
    ("changes", "last", "reason"),
    [
        ({"weights": {"w": torch.tensor([1.0, float("nan")])}}, None, "not_finite"),
        ({"weights": {"w": torch.tensor([1.0, float("-inf")])}}, None, "not_finite"),
        ({"evaluated": 9}, None, "few_records"),
        ({"metrics": {"log_loss": 0.61}}, {"log_loss": 0.5}, "regression"),
        ({"metrics": {"log_loss": float("nan")}}, {"log_loss": 0.5}, "regression"),
    ],
)
def test_the_gate_refuses(changes: dict[str, Any], last: dict[str, float] | None, reason: str) -> None:
    refusal = gate(candidate(**changes), last, SETTINGS)
    assert refusal is not None and refusal.reason == reason


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


def write(tmp_path: Path) -> tuple[Path, str]:
    return models.write(tmp_path, manifest(), candidate().weights, candidate().ids)


def test_a_published_model_reads_back_exactly(tmp_path: Path) -> None:
    directory, checksum = write(tmp_path)
    published = models.read(directory, checksum)
    assert published.ids == candidate().ids
    assert all(torch.equal(published.weights[name], tensor) for name, tensor in candidate().weights.items())
    assert dataclasses.asdict(candidate())["metrics"]["auc"] == published.manifest.metrics["auc"]
    assert set(published.manifest.files) == {"model.safetensors", "ids.json"}
    with pytest.raises(FileExistsError, match="never changed"):
        write(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "ids.json", "manifest.json"])
def test_any_changed_or_missing_file_is_noticed(tmp_path: Path, name: str) -> None:
    directory, checksum = write(tmp_path)
    data = bytearray((directory / name).read_bytes())
    data[-1] ^= 1
    (directory / name).write_bytes(data)
    with pytest.raises(models.ModelError, match=name):
        models.read(directory, checksum)
    (directory / name).unlink()
    with pytest.raises(models.ModelError, match=name):
        models.read(directory, checksum)


def test_versions_are_numbered_upwards_whatever_is_on_disk(tmp_path: Path) -> None:
    assert models.next_number(tmp_path) == 1
    for name in ("v000009-00000001", "v000010-00000000", "v000002-99999999", "vacation", "v12-x"):
        (tmp_path / name).mkdir()
    assert models.next_number(tmp_path) == 11
    assert [path.name[:7] for path in models.versions(tmp_path)] == ["v000010", "v000009", "v000002"]
    assert models.number_of(models.version_name(1_234_567, 5)) == 1_234_567


@pytest.mark.parametrize("uri", ["https://host/model", "relative/path", "file://other-host/models/v1"])
def test_only_local_file_uris_are_read(uri: str) -> None:
    with pytest.raises(models.ModelError, match="uri"):
        models.path_of(uri)


def test_uris_survive_odd_names(tmp_path: Path) -> None:
    odd = tmp_path / "a b#c%d ü"
    assert models.path_of(odd.as_uri()) == odd


@pytest.fixture
def producer(kafka_settings: KafkaSettings) -> Iterator[Any]:
    with closing(clients.producer(kafka_settings)) as made:
        yield made


def announced(kafka: KafkaSettings) -> list[ModelUpdate]:
    found: list[ModelUpdate] = []
    with closing(LogView(kafka, {"model-updates": lambda r: found.append(decode(ModelUpdate, r.value))})) as view:
        view.warm_up()
    return found


def test_publication_is_announced_and_continues_after_a_restart(
    kafka_settings: KafkaSettings, producer: Any, tmp_path: Path
) -> None:
    settings = SETTINGS.model_copy(update={"models": tmp_path, "keep_models": 2})
    publisher = Publisher(kafka_settings, settings, producer, clock=lambda: 1042.5)
    first = publisher.publish(candidate())
    assert first is not None and first.version == "v000001-00000003"
    assert first.source_offsets == {"0": 15, "1": 7}
    assert first.metrics == {"log_loss": 0.5, "auc": 0.7, "model_age_seconds": 42.5}
    assert REGISTRY.get_sample_value("gpl_model_age_seconds") == 42.5
    assert publisher.publish(candidate()) is None  # nothing new
    assert models.read(models.path_of(first.uri), first.checksum).manifest.version == first.version

    # Another trainer of the same name takes over: same numbering, same memory of what is out.
    other = Publisher(kafka_settings, settings, producer, clock=lambda: 1042.5)
    assert other.last == first
    assert other.publish(candidate()) is None
    refused = {"reason": "regression"}
    before = REGISTRY.get_sample_value("gpl_publications_refused_total", refused) or 0.0
    assert other.publish(candidate(4, metrics={"log_loss": 0.7})) is None
    assert REGISTRY.get_sample_value("gpl_publications_refused_total", refused) == before + 1
    second, third = other.publish(candidate(5)), other.publish(candidate(6))
    assert second is not None and second.version == "v000002-00000005"
    assert third is not None and announced(kafka_settings) == [first, second, third]
    assert sorted(path.name for path in tmp_path.iterdir()) == [second.version, third.version]


def test_another_models_announcements_are_not_mistaken_for_ones_own(
    kafka_settings: KafkaSettings, producer: Any, tmp_path: Path
) -> None:
    theirs = SETTINGS.model_copy(update={"models": tmp_path / "theirs", "model_name": "theirs"})
    assert Publisher(kafka_settings, theirs, producer).publish(candidate()) is not None
    mine = SETTINGS.model_copy(update={"models": tmp_path / "mine"})
    assert Publisher(kafka_settings, mine, producer).last is None


def test_a_number_is_not_used_again_when_the_directory_is_gone(
    kafka_settings: KafkaSettings, producer: Any, tmp_path: Path
) -> None:
    first = Publisher(kafka_settings, SETTINGS.model_copy(update={"models": tmp_path / "a"}), producer)
    assert first.publish(candidate()) is not None
    moved = Publisher(kafka_settings, SETTINGS.model_copy(update={"models": tmp_path / "b"}), producer)
    update = moved.publish(candidate(8))
    assert update is not None and update.version == "v000002-00000008"
    document = json.loads((models.path_of(update.uri) / "manifest.json").read_text())
    assert document["version"] == update.version and document["published_at"] > 1_600_000_000_000
