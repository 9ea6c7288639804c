"""The HTTP face of the scorer: answers, errors that name the field, readiness, and a real server over a socket."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import pytest
import uvicorn
from fastapi import FastAPI
from fastapi.testclient import TestClient
from prometheus_client import REGISTRY

from gpl.preranker.model import PreRanker
from streams import models
from streams.contracts import ItemVector, ModelUpdate, encode
from streams.frame import Frame
from streams.metrics import Health
from streams.scoring import scorer as scoring
from streams.scoring.scorer import Scorer
from streams.scoring.server import create_app
from streams.settings import ServeSettings, Settings, TrainerSettings
from streams.views import vector_bytes

FRAME = Frame(4, 1, "encoder-1", "quantiser-1")


class Unconnected(Scorer):
    """A scorer whose topics are written by the test instead of a broker."""

    def start(self) -> None:
        self._health.beat("scorer")


class Message:
    topic, partition, offset = "state", 0, 0

    def __init__(self, key: str, value: bytes) -> None:
        self.key, self.value = key.encode(), value


def load_model(scorer: Scorer, directory: Path) -> str:
    for n, vector in enumerate(np.eye(4, dtype=np.float32)):
        item = ItemVector(f"i{n}", vector_bytes(vector), [n], "hash", FRAME.encoder, FRAME.quantiser)
        scorer.handlers["item-vectors"](Message(item.item_id, encode(item)))
    manifest = models.Manifest(
        model="preranker",
        version=models.version_name(1, 1),
        step=1,
        config={"dim": 2, "dim_content": 4},
        encoder=FRAME.encoder,
        quantiser=FRAME.quantiser,
        source_offsets={},
        newest_event_ts=0,
        published_at=0,
        metrics={},
    )
    network = PreRanker(4, 2, seed=0)
    uri, checksum = models.ModelStore(directory).write(manifest, network.state_tensors(), models.Ids([], []))
    update = ModelUpdate("preranker", manifest.version, uri, checksum, {}, 0, {})
    scorer.handlers["model-updates"](Message("preranker", encode(update)))
    scorer.refresh()
    return manifest.version


@pytest.fixture
def health() -> Health:
    return Health()


@pytest.fixture
def scorer(tmp_path: Path, health: Health) -> Scorer:
    return Unconnected(Settings(trainer=TrainerSettings(models=tmp_path, dim=2)), FRAME, health)


@pytest.fixture
def app(scorer: Scorer, health: Health) -> FastAPI:
    return create_app(scorer, ServeSettings(max_candidates=5), health)


@pytest.fixture
def client(app: FastAPI) -> Iterator[TestClient]:
    with TestClient(app) as client:
        yield client


def test_scores_come_ranked_with_the_version(client: TestClient, scorer: Scorer, tmp_path: Path) -> None:
    version = load_model(scorer, tmp_path)
    answer = client.post("/v1/score", json={"user_id": "u", "candidates": ["i2", "none", "i0", "i1"]})
    assert answer.status_code == 200
    body = answer.json()
    direct = scorer.score("u", ["i2", "none", "i0", "i1"])
    assert body == {
        "model_version": version,
        "items": direct.items,
        "scores": direct.scores,
        "unknown": ["none"],
        "known_user": False,
        "anchors": False,
    }
    assert body["scores"][:3] == sorted(body["scores"][:3], reverse=True) and body["scores"][3] is None


def test_not_ready_until_a_model_is_loaded(client: TestClient, scorer: Scorer, tmp_path: Path) -> None:
    request = {"user_id": "u", "candidates": ["i0"]}
    assert client.post("/v1/score", json=request).status_code == 503
    waiting = client.get("/ready")
    assert (waiting.status_code, waiting.json()) == (503, {"ok": False, "waiting": ["model"]})
    load_model(scorer, tmp_path)
    assert client.get("/ready").status_code == 200
    assert client.post("/v1/score", json=request).status_code == 200


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"candidates": ["i0"]}, "user_id"),
        ({"user_id": "", "candidates": ["i0"]}, "user_id"),
        ({"user_id": 7, "candidates": ["i0"]}, "user_id"),
        ({"user_id": "u"}, "candidates"),
        ({"user_id": "u", "candidates": []}, "candidates"),
        ({"user_id": "u", "candidates": "i0"}, "candidates"),
        ({"user_id": "u", "candidates": ["i0", None]}, "candidates[1]"),
        ({"user_id": "u", "candidates": ["x" * 257]}, "candidates[0]"),
        ({"user_id": "u", "candidates": ["a", "b", "c", "d", "e", "f"]}, "candidates"),
        ({"user_id": "u", "candidates": ["i0"], "k": 3}, "k"),
    ],
)
def test_a_bad_request_is_told_which_field(
    client: TestClient, scorer: Scorer, tmp_path: Path, body: dict[str, object], field: str
) -> None:
    load_model(scorer, tmp_path)
    answer = client.post("/v1/score", json=body)
    assert answer.status_code == 422
    assert answer.json()["field"] == field and answer.json()["error"].startswith(f"{field}: ")


def test_what_is_not_json_or_too_long_is_refused(client: TestClient) -> None:
    answer = client.post("/v1/score", content=b'{"user_id": ', headers={"content-type": "application/json"})
    assert (answer.status_code, answer.json()["field"]) == (400, "body")
    assert client.post("/v1/score", content=b"\xff").status_code == 400
    assert client.post("/v1/score", content=b"").status_code == 400
    assert client.post("/v1/score", content=b" " * 20_000).status_code == 413
    assert client.post("/v1/score", content=iter([b" " * 5000] * 4)).status_code == 413
    assert client.post("/v1/score", content=iter([b"{}"])).json()["field"] == "user_id"
    assert client.get("/v1/score").status_code == 405


def test_health_tells_of_a_stalled_loop(scorer: Scorer) -> None:
    now = [0.0]
    health = Health(stalled_after=10, clock=lambda: now[0])
    with TestClient(create_app(scorer, ServeSettings(), health)) as client:
        health.beat("scorer")
        assert client.get("/health").json() == {"ok": True, "stalled": []}
        now[0] = 11.0
        answer = client.get("/health")
        assert (answer.status_code, answer.json()) == (503, {"ok": False, "stalled": ["scorer"]})


def test_metrics_and_openapi_are_on_the_same_port(client: TestClient, scorer: Scorer, tmp_path: Path) -> None:
    load_model(scorer, tmp_path)
    client.post("/v1/score", json={"user_id": "u", "candidates": ["i0"]})
    text = client.get("/metrics").text
    assert 'gpl_score_requests_total{status="200"}' in text and "gpl_score_seconds_count" in text
    schema = client.get("/openapi.json").json()
    assert set(schema["components"]["schemas"]["ScoreRequest"]["required"]) == {"user_id", "candidates"}


@contextmanager
def listening(app: FastAPI) -> Iterator[int]:
    """The application under a real server; yields its port."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            deadline = time.monotonic() + 30
            while not server.started:
                assert time.monotonic() < deadline and thread.is_alive()
                thread.join(0.01)
            yield listener.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join()


def test_over_a_real_socket(app: FastAPI, scorer: Scorer, tmp_path: Path) -> None:
    version = load_model(scorer, tmp_path)
    with listening(app) as port, httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:
        answer = client.post("/v1/score", json={"user_id": "u", "candidates": ["i0", "i3"]})
    assert answer.json()["model_version"] == version


def test_a_client_that_hangs_up_is_no_error_of_the_server(app: FastAPI) -> None:
    def answered(status: str) -> float:
        return REGISTRY.get_sample_value("gpl_score_requests_total", {"status": status}) or 0.0

    gone, failed = answered("499"), answered("500")
    with listening(app) as port:
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.sendall(b"POST /v1/score HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        deadline = time.monotonic() + 30
        while answered("499") == gone:
            assert time.monotonic() < deadline and answered("500") == failed
            time.sleep(0.01)
    assert answered("500") == failed


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_scorer_that_ends_in_its_first_round_is_missed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing:
        def __init__(self, *_: object) -> None:
            pass

        def fetch(self, _: float) -> None:
            raise PermissionError("not authorized to read")

        def apply(self, _: None) -> None:
            pass

        def close(self) -> None:
            pass

    now = [0.0]
    monkeypatch.setattr(scoring, "LogView", Refusing)
    health = Health(stalled_after=10, clock=lambda: now[0])
    scorer = Scorer(Settings(trainer=TrainerSettings(models=tmp_path)), FRAME, health)
    scorer.start()
    scorer.close()
    now[0] = 11.0
    assert health.stalled() == ["scorer"]
