"""``gpl train`` with checkpoints, batch journal and models in an object store: s3fs against an S3 server."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from gpl.catalogue import ItemContent
from gpl.fit import Event, FitOptions, fit
from streams import kafka as clients
from streams.contracts import Exposed, ItemVector, Label, ModelUpdate, Provenance, Unexposed, decode, encode
from streams.frame import Frame
from streams.scoring.scorer import Scorer
from streams.settings import KafkaSettings, Settings
from streams.topics import full_name
from streams.trainer.checkpoint import CheckpointError, CheckpointStore
from streams.trainer.rebuild import rebuild
from streams.views import vector_bytes
from tests.integration.pipeline import Process, kafka_section, read_all, wait_for

DIM, ITEMS, USERS = 16, 60, 30


def labels(frame: Frame, vectors: np.ndarray) -> Iterator[Label]:
    rng = np.random.default_rng(4)
    for n in itertools.count():
        items, user = rng.permutation(ITEMS)[:15], n % USERS
        cosine = (vectors[items] @ vectors[user]).round(6).astype(float).tolist()
        names = [f"i{i}" for i in items]
        yield Label(
            request_id=f"r{n}",
            revision=0,
            user_id=f"u{user}",
            ts=1000 + n,
            outcome="labelled",
            exposed=Exposed(names[:4], [int(score > 0.1) for score in cosine[:4]], cosine[:4]),
            unexposed=Unexposed(names[4:], cosine[4:], [(1 + score) / 2 for score in cosine[4:]], [0.5] * 11),
            provenance=Provenance((0, n), [], 15, 0, None, None, frame.encoder, frame.quantiser, None, None, "", None),
        )


def trained(checkpoints: CheckpointStore) -> int:
    """Label records behind the newest checkpoint."""
    try:
        return sum(checkpoints.manifest(checkpoints.steps()[-1]).positions.values())
    except (IndexError, CheckpointError):  # none yet, or just retired
        return 0


@pytest.mark.kafka
def test_a_killed_gpl_train_goes_on_and_its_model_is_served_and_made_again(
    kafka_settings: KafkaSettings, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vectors = np.random.default_rng(3).standard_normal((ITEMS, DIM)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    items = [ItemContent(f"i{n}", "", row.tolist()) for n, row in enumerate(vectors)]
    past = [Event(f"u{n % USERS}", f"i{n % ITEMS}", n, True) for n in range(120)]
    artefacts = tmp_path / "artefacts"
    fit(items, past, None, FitOptions(generator="history", levels=1, codebook_size=8), seed=0).save(artefacts)
    frame = Frame.load(artefacts)
    config = tmp_path / "gpl.toml"
    config.write_text(f"""\
artefacts = "{artefacts}"
{kafka_section(kafka_settings)}
[trainer]
checkpoints = "{bucket}/checkpoints"
models = "{bucket}/models"
dim = 8
batch_records = 4
publish_min_records = 50
publish_every_wall_seconds = 0.5
checkpoint_every_wall_seconds = 0.5
""")
    monkeypatch.setenv("GPL_CONFIG", str(config))
    settings = Settings()
    made, store = labels(frame, vectors), CheckpointStore(settings.trainer.checkpoints, 3)

    with clients.producer(kafka_settings) as producer:
        for n, row in enumerate(vectors):
            item = ItemVector(f"i{n}", vector_bytes(row), [0], "hash", frame.encoder, frame.quantiser)
            producer.send(full_name(kafka_settings, "item-vectors"), key=f"i{n}".encode(), value=encode(item))

        def feed(count: int) -> None:
            for label in itertools.islice(made, count):
                producer.send(full_name(kafka_settings, "labels"), key=label.user_id.encode(), value=encode(label))
            producer.flush()

        feed(120)
        killed = Process(["train"], config, tmp_path / "train.log")
        try:
            wait_for("a checkpoint", lambda: killed.popen.poll() is not None or trained(store) > 0)
        finally:
            killed.kill()
        feed(120)
        trainer = Process(["train"], config, tmp_path / "train.log")
        try:
            wait_for("all labels", lambda: trainer.popen.poll() is not None or trained(store) == 240)
        finally:
            code = trainer.stop()
    assert code == 0, trainer.log.read_text()[-4000:]
    update = decode(ModelUpdate, read_all(kafka_settings, "model-updates")[-1].value)
    assert update.uri.startswith(bucket) and sum(update.source_offsets.values()) == 240
    with Scorer(settings, frame) as scorer:
        wait_for("the model", lambda: scorer.model_version == update.version)
        assert len(scorer.score("u7", [item.item_id for item in items]).scores) == ITEMS
    rebuilt = rebuild(settings, update.version, frame=frame)
    assert (rebuilt.differing, rebuilt.first_difference) == ([], None)
