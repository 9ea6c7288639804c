"""``gpl train`` as an operator meets it: one a checkpoints directory, and clear errors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from gpl.catalogue import ItemContent
from gpl.fit import Event, FitOptions, fit
from streams import kafka as clients
from streams.contracts import Exposed, ItemVector, Label, Provenance, Unexposed, encode
from streams.frame import Frame
from streams.settings import KafkaSettings
from streams.topics import full_name
from streams.trainer.checkpoint import CheckpointStore
from streams.views import vector_bytes
from tests.integration.pipeline import Process, kafka_section, wait_for

DIM, ITEMS = 4, 12


@pytest.fixture
def config(kafka_settings: KafkaSettings, tmp_path: Path) -> Path:
    """A configuration with artefacts, and a few labels on the topic."""
    vectors = np.random.default_rng(3).standard_normal((ITEMS, DIM)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    items = [ItemContent(f"i{n}", "", row.tolist()) for n, row in enumerate(vectors)]
    past = [Event(f"u{n % 5}", f"i{n % ITEMS}", n, True) for n in range(60)]
    artefacts = tmp_path / "artefacts"
    fit(items, past, None, FitOptions(generator="history", levels=1, codebook_size=4), seed=0).save(artefacts)
    frame = Frame.load(artefacts)
    with clients.producer(kafka_settings) as producer:
        for n, row in enumerate(vectors):
            item = ItemVector(f"i{n}", vector_bytes(row), [0], "hash", frame.encoder, frame.quantiser)
            producer.send(full_name(kafka_settings, "item-vectors"), key=f"i{n}".encode(), value=encode(item))
        for n in range(8):
            label = Label(
                request_id=f"r{n}",
                revision=0,
                user_id=f"u{n % 5}",
                ts=1000 + n,
                outcome="labelled",
                exposed=Exposed(["i0", "i1"], [1, 0], [0.5, 0.1]),
                unexposed=Unexposed(["i2"], [0.2], [0.6], [0.5]),
                provenance=Provenance(
                    (0, n), [], 3, 0, None, None, frame.encoder, frame.quantiser, None, None, "", None
                ),
            )
            producer.send(full_name(kafka_settings, "labels"), key=label.user_id.encode(), value=encode(label))
    path = tmp_path / "gpl.toml"
    path.write_text(f"""\
artefacts = "{artefacts}"
{kafka_section(kafka_settings)}
[trainer]
checkpoints = "{tmp_path}/checkpoints"
models = "{tmp_path}/models"
dim = 8
checkpoint_every_wall_seconds = 0.2
""")
    return path


@pytest.mark.kafka
def test_one_trainer_a_directory_and_settings_that_fit_it(config: Path, tmp_path: Path) -> None:
    def start(name: str, *arguments: str, **env: str) -> Process:
        return Process(list(arguments or ["train"]), config, tmp_path / f"{name}.log", **env)

    def refused(process: Process) -> str:
        """What a process that has ended by itself said last; its exit status is 1 and there is no traceback."""
        try:
            assert process.popen.wait(timeout=240) == 1, process.log.read_text()[-4000:]
        finally:
            process.kill()
        said = process.log.read_text()
        assert "Traceback" not in said, said[-4000:]
        return said

    checkpoints = CheckpointStore(tmp_path / "checkpoints", 3)
    first = start("first")
    try:
        wait_for("a checkpoint", lambda: first.popen.poll() is not None or checkpoints.steps())
        # The first holds both directories, and its port.
        elsewhere = {"GPL_TRAINER__CHECKPOINTS": str(tmp_path / "other")}
        port = {
            **elsewhere,
            "GPL_METRICS__PORT": str(first.metrics_port),
            "GPL_TRAINER__MODELS": str(tmp_path / "other models"),
        }
        beside = [start("second"), start("ranks", "train", "--ranks", "2"), start("models", **elsewhere)]
        beside += [start("port", **port), start("worker", "worker", "profiles", **port)]
        said = [refused(process) for process in beside]
        for text, name in zip(said[:3], ("checkpoints", "checkpoints", "models"), strict=True):
            assert text.count(f"error: trainer.{name}: {tmp_path}/{name} is in use") == 1
            assert f"exactly one `gpl train` per trainer.{name}" in text
        for text in said[3:]:
            assert f"error: metrics.host, metrics.port: 127.0.0.1:{first.metrics_port}: Address already in use" in text
        assert first.popen.poll() is None, first.log.read_text()[-4000:]
    finally:
        first.kill()
    # The kernel has let go of the directory. One for both is held once.
    trainer = start("third", GPL_TRAINER__MODELS=f"{tmp_path}/deep/../checkpoints")
    try:
        wait_for("the next trainer", trainer.ready)
    finally:
        assert trainer.stop() == 0, trainer.log.read_text()[-4000:]

    for name, value, said_of in (("dim", "16", "16, the"), ("shadow", "true", "true, the")):
        text = refused(start(name, **{f"GPL_TRAINER__{name.upper()}": value}))
        assert f"error: trainer.{name}: {said_of} checkpoint of step" in text and "new trainer.checkpoints" in text
    # New weights need no other directory.
    anew = start("anew", "train", "--start-from", "earliest", GPL_TRAINER__DIM="16")
    try:
        wait_for("new weights", anew.ready)
    finally:
        assert anew.stop() == 0, anew.log.read_text()[-4000:]
    newest = checkpoints.load_newest()
    assert newest is not None and newest.tensors["model"]["users"].shape[1] == 16
