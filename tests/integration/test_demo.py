"""`gpl demo` at a small size, the way a person runs it: own data in, labels and a report out, on the real Kafka."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from streams.broker.apache import ApacheKafka
from streams.contracts import Item, Label, decode, encode
from streams.demo.upstream import Rating, UpstreamConfig, simulate

ITEMS, GROUPS, USERS, DIM = 120, 6, 60, 16
SITE = UpstreamConfig(candidates=60, popular=15, cooccur=15, ahead=8, page=6)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Users who like one group of items each; vectors that show the groups; one line of nonsense in each file."""
    rng = np.random.default_rng(5)
    centres = rng.normal(size=(GROUPS, DIM))
    vectors = centres[np.arange(ITEMS) % GROUPS] + 0.3 * rng.normal(size=(ITEMS, DIM))
    history = [
        Rating(f"u{user}", f"i{item}", 1_700_000_000_000 + 3_600_000 * user + 60_000 * at, 5.0 if liked else 2.0)
        for user in range(USERS)
        for at, item in enumerate(rng.permutation(ITEMS)[:24].tolist())
        for liked in [item % GROUPS == user % GROUPS or rng.random() < 0.2]
    ]
    items = [Item(f"i{n}", f"item {n}", embedding=vector) for n, vector in enumerate(vectors.round(4).tolist())]
    out = list(simulate(history, [item.item_id for item in items], SITE))
    directory = tmp_path / "data"
    directory.mkdir()
    feedback = [event for _, events in out for event in events]
    for name, lines in (("items", items), ("recalls", [recall for recall, _ in out]), ("feedback", feedback)):
        encoded = b"".join(encode(line) + b"\n" for line in lines)
        (directory / f"{name}.jsonl").write_bytes(encoded + b'{"nonsense": ' + name.encode() + b"}\n")
    return directory


def test_own_data_becomes_labels_models_and_a_report(data: Path, kafka: ApacheKafka, tmp_path: Path) -> None:
    own = tmp_path / "own.toml"
    own.write_text(
        '[generator]\nkind = "history"\n[profiles]\nmin_positives = 2\n[trainer]\npublish_min_records = 10\n'
        "[labels]\nidle_timeout_wall_seconds = 2.0\n"
    )
    run = tmp_path / "run"
    command = [sys.executable, "-m", "streams.cli", "demo", "--data", str(data), "--out", str(run)]
    command += ["--broker", kafka.bootstrap, "--duration", "5", "--config", str(own)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((run / "report.json").read_text())

    # Everything that was due was streamed and answered.
    labels: dict[str, Label] = {}
    for line in (run / "labels.jsonl").read_bytes().splitlines():
        label = decode(Label, line)
        if label.request_id not in labels or labels[label.request_id].revision < label.revision:
            labels[label.request_id] = label
    assert len(labels) == report["requests_closed"] == report["requests"] > 50
    assert report["events"] == report["events_by_topic"]["recalls"] + report["events_by_topic"]["feedback"] > 500
    assert report["unexposed_labelled"] == sum(len(label.unexposed.item) for label in labels.values()) > 1000
    assert sum(report["anchors_refreshed"].values()) == len((run / "anchors.jsonl").read_bytes().splitlines()) > 0

    # The nonsense of each file is a dead letter, and nothing else is.
    assert report["dead_letters"] == 3
    letters = [json.loads(line) for line in (run / "dead-letters.jsonl").read_text().splitlines()]
    assert {letter["headers"]["gpl-topic"].rsplit(".", 1)[1] for letter in letters} == {"items", "recalls", "feedback"}

    # A label says what the data say.
    shown: dict[str, set[str]] = {}
    for line in (data / "feedback.jsonl").read_text().splitlines()[:-1]:
        event = json.loads(line)
        shown.setdefault(event["request_id"], set()).add(event["item_id"])
    candidates = {
        recall["request_id"]: set(recall["candidates"])
        for recall in map(json.loads, (data / "recalls.jsonl").read_text().splitlines()[:-1])
    }
    for request_id, label in labels.items():
        assert set(label.exposed.item) == shown[request_id]
        if label.outcome == "labelled":
            assert set(label.unexposed.item) == candidates[request_id] - shown[request_id]

    # Models were published, both models were judged, and the page is there.
    assert report["models_published"] >= 1
    assert all((run / "models" / version / "manifest.json").is_file() for version in report["model_versions"])
    assert set(report["progressive"]) == {"gpl", "exposed_only"}
    assert report["hr10"]["all"]["clicks"] > 0
    assert (run / "report.html").read_text().startswith("<!doctype html>")
    assert "first label after" in done.stdout
