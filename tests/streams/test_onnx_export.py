"""ONNX export of really trained models: under onnxruntime the graph gives the network's scores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnxruntime
import pytest
from typer.testing import CliRunner

from gpl.labels import labeller
from gpl.labels.labeller import PreparedAnchors
from gpl.preranker.batch import Batch, Example
from gpl.preranker.learner import Learner
from gpl.preranker.loss import LossConfig
from gpl.preranker.model import PreRanker
from streams import models
from streams.cli import app
from streams.onnx_export import export

DIM, USERS, ITEMS = 16, 12, 40


def unit(rows: int, seed: int) -> np.ndarray:
    vectors = np.random.default_rng(seed).normal(size=(rows, DIM)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


CONTENT = unit(ITEMS + 1, 1)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> models.ModelStore:
    """A store with one model, trained for 200 steps on labels that follow the content."""
    rng = np.random.default_rng(2)
    likes = unit(USERS + 1, 3)
    model = PreRanker(DIM, 6, seed=0)
    model.grow(USERS + 1, ITEMS + 1)
    learner = Learner(model, LossConfig(), 0.01, 0.0)
    for _ in range(200):
        examples = []
        for user in rng.integers(1, USERS + 1, size=8):
            rows = 1 + rng.permutation(ITEMS)[:12]
            score = (CONTENT[rows] @ likes[user]).astype(np.float32)
            label, confidence = (1 + score[4:]) / 2, np.full(8, 0.5, np.float32)
            examples.append(
                Example(
                    int(user),
                    rows,
                    rows,
                    score,
                    (score[:4] > 0).astype(np.float32),
                    label,
                    confidence,
                    history=rng.integers(1, ITEMS + 1, size=rng.integers(0, 4)),
                )
            )
        learner.step(Batch.collate(examples), CONTENT)
    store = models.ModelStore(tmp_path_factory.mktemp("models"))
    manifest = models.Manifest(
        model="preranker",
        version=models.version_name(1, 200),
        step=200,
        config={"dim": 6, "dim_content": DIM},
        encoder="e",
        quantiser="q",
        source_offsets={},
        newest_event_ts=0,
        published_at=0,
        metrics={},
    )
    ids = models.Ids([f"u{n}" for n in range(USERS)], [f"i{n}" for n in range(ITEMS)])
    store.write(manifest, model.state_tensors(), ids)
    return store


@pytest.mark.parametrize("matching", [labeller.Config(), labeller.Config(matching="kernel", kernel_tau=0.2)])
def test_the_graph_gives_the_networks_scores(
    trained: models.ModelStore, tmp_path: Path, matching: labeller.Config, capfd: pytest.CaptureFixture[str]
) -> None:
    published = trained.read(trained.versions()[0])
    ids_path = export(published, matching, tmp_path / "out" / "model.onnx")
    ids = msgspec.json.decode(ids_path.read_bytes())
    assert (ids["users"], ids["items"]) == (published.ids.users, published.ids.items)
    session = onnxruntime.InferenceSession(str(tmp_path / "out" / "model.onnx"))
    assert "not used" not in capfd.readouterr().err  # a warning of onnxruntime's, at every start of who serves it
    network = PreRanker.of_state(published.weights, DIM)
    assert network.history.abs().max() > 0.01
    rng = np.random.default_rng(5)
    known = np.array([1 + ids["items"].index(f"i{n}") for n in (3, 0, 39)])
    for user_row in (1 + ids["users"].index("u5"), 0):  # of the table, unknown
        for item_row in (known, np.array([0, 7, 0, 0]), np.array([0])):  # known, new items among them, one
            for k in (0, 1, 5):
                content = CONTENT[item_row] if item_row.all() else unit(len(item_row), 8)
                logprobs = -np.arange(1, k + 1, dtype=np.float32)
                cross = None
                if k:
                    anchors = PreparedAnchors.build(unit(k, 4), logprobs, np.ones(k, np.float32), 1, matching)
                    cross = labeller.score(anchors, content)[0]
                liked = rng.integers(1, ITEMS + 1, size=k)
                fed: dict[str, Any] = {
                    "user_row": np.array(user_row),
                    "history_row": liked,
                    "item_row": item_row,
                    "content": content,
                    "anchors": unit(k, 4) if k else np.zeros((0, DIM), np.float32),
                }
                if matching.matching == "kernel":
                    fed["anchor_logprob"] = logprobs
                expected = network.score(user_row, item_row, content, cross, liked)
                np.testing.assert_allclose(session.run(None, fed)[0], expected, rtol=0, atol=1e-5)


def test_from_the_command_line(trained: models.ModelStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPL_TRAINER__MODELS", trained.storage.uri(""))
    done = CliRunner().invoke(app, ["models", "export", "1", "--out", str(tmp_path / "m.onnx")])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "m.onnx").is_file() and (tmp_path / "m.ids.json").is_file()
    missing = CliRunner().invoke(app, ["models", "export", "7", "--out", str(tmp_path / "n.onnx")])
    assert missing.exit_code == 1 and "7" in missing.output


def test_a_graph_does_not_come_without_its_table(trained: models.ModelStore, tmp_path: Path) -> None:
    published = trained.read(trained.versions()[0])
    (tmp_path / "m.onnx").write_bytes(b"earlier")
    (tmp_path / "m.ids.json").mkdir()  # which no file can take the place of
    with pytest.raises(IsADirectoryError):
        export(published, labeller.Config(), tmp_path / "m.onnx")
    assert (tmp_path / "m.onnx").read_bytes() == b"earlier"
    (tmp_path / "m.ids.json").rmdir()
    ids = msgspec.json.decode(export(published, labeller.Config(), tmp_path / "m.onnx").read_bytes())
    session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"))
    assert session.get_modelmeta().custom_metadata_map["version"] == ids["model"] == published.manifest.version
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.ids.json", "m.onnx"]


def test_a_graph_that_differs_is_refused(
    trained: models.ModelStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    published = trained.read(trained.versions()[0])
    original = PreRanker.score

    def other(self: PreRanker, *args: Any) -> np.ndarray:
        return original(self, *args) + np.float32(1e-3)

    monkeypatch.setattr(PreRanker, "score", other)
    with pytest.raises(models.ModelError, match="off by"):
        export(published, labeller.Config(), tmp_path / "m.onnx")
    assert not (tmp_path / "m.onnx").exists()
