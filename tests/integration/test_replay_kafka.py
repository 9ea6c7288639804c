"""Replay beside a real worker on a real Kafka: its labels again, each change under its cause, production untouched."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from kafka import KafkaAdminClient
from typer.testing import CliRunner

from streams import cli
from streams.contracts import Calibration, ItemVector, Label, Recall, UserAnchors, decode, encode
from streams.kafka import client_options, producer
from streams.settings import KafkaSettings
from streams.topics import full_name
from streams.views import vector_bytes
from tests.crash.site import ITEMS, REQUESTS, START, STEP, event_log, make_artefacts, send_items
from tests.integration.pipeline import Process, final_labels, kafka_section, read_all, running, wait_for

MIDDLE = START + REQUESTS // 2 * STEP


@pytest.fixture
def config(tmp_path: Path, kafka_settings: KafkaSettings) -> Path:
    make_artefacts(tmp_path / "artefacts")
    path = tmp_path / "gpl.toml"
    path.write_text(
        f"""
artefacts = "{tmp_path / "artefacts"}"
{kafka_section(kafka_settings)}
[index]
path = "{tmp_path / "index"}"
[generator]
beams = 5
[labels]
window_seconds = 60
allowed_lateness_seconds = 5
retention_seconds = 3600
idle_timeout_wall_seconds = 3
[profiles]
min_interval_seconds = 60
allowed_lateness_seconds = 5
idle_timeout_wall_seconds = 1
"""
    )
    return path


def gpl(config: Path, *arguments: str) -> str:
    """A command that reads the broker, in this process."""
    done = CliRunner().invoke(cli.app, [*arguments, "--config", str(config)])
    assert done.exit_code == 0, (done.output, done.exception)
    return done.stdout


def replayed(config: Path, *arguments: str) -> dict[str, Any]:
    output = gpl(config, "replay", "--execute", "--compare", "--json", "--no-output", "--top", "500", *arguments)
    return json.loads(output)["comparison"]


def groups(kafka: KafkaSettings) -> dict[str, Any]:
    """Committed offsets of every consumer group on the broker."""
    with KafkaAdminClient(**client_options(kafka)) as admin:
        named = sorted(group["group_id"] for group in admin.list_groups())
        return {name: admin.list_group_offsets([name]) for name in named}


def ends(kafka: KafkaSettings) -> dict[str, int]:
    topics = (
        "recalls",
        "feedback",
        "user-anchors",
        "calibrations",
        "item-vectors",
        "labels",
        "dead-letters",
        "profiles",
    )
    return {topic: len(read_all(kafka, topic)) for topic in topics}


@pytest.mark.kafka
def test_a_workers_labels_are_replayed_compared_explained_and_captured(
    kafka_settings: KafkaSettings, config: Path, tmp_path: Path
) -> None:
    kafka = kafka_settings
    records = event_log()
    worker = Process(["worker", "all"], config, tmp_path / "worker.log")
    with running(worker):
        wait_for("the worker to be ready", worker.ready)
        send_items(kafka)
        wait_for("the catalogue", lambda: worker.metric("gpl_catalogue_items") == ITEMS)
        with producer(kafka) as out:
            for record in records:
                topic = "recalls" if isinstance(record, Recall) else "feedback"
                out.send(full_name(kafka, topic), key=record.user_id.encode(), value=encode(record))
        wait_for("every request's label", lambda: len(final_labels(kafka)[0]) == REQUESTS)
        wait_for(
            "the refreshes to be answered",
            lambda: 0 < len(read_all(kafka, "anchor-requests")) == len(read_all(kafka, "user-anchors")),
        )
        # Anchors that came late correct labels; wait until the labels say what the log says.
        wait_for("all to be settled", lambda: replayed(config)["changed"] == 0)
        before, logged = groups(kafka), ends(kafka)
        found = replayed(config)
        # The worker still runs: reading beside it moves nobody's offsets and writes nowhere.
        assert ends(kafka) == logged
        after = groups(kafka)
        assert all(before.get(name) == offsets for name, offsets in after.items()), (
            "a group of replay's, or moved by it"
        )
        # Those of tests that are over may expire meanwhile.
        assert {name for name in before if name.startswith(kafka.group_prefix)} <= after.keys()
    assert (found["requests"], found["identical"]) == (REQUESTS, REQUESTS)
    assert not found["only_recorded"]["requests"] and not found["only_replayed"]["requests"]
    production, _ = final_labels(kafka)

    # Another setting.
    found = replayed(config, "--set", "labels.matching=kernel")
    assert [cause["cause"] for cause in found["causes"]] == ["configuration"]
    assert found["causes"][0]["details"][0]["detail"] == "labels.matching: max then, kernel now"
    assert found["reproduced"] == found["changed"] > 0

    # A range, to a topic of its own: the labels that production has.
    arguments = ("--from", str(MIDDLE), "--to", str(MIDDLE + 100_000))
    gpl(config, "replay", "--execute", *arguments, "--output-prefix", f"{kafka.prefix}again.")
    again = kafka.model_copy(update={"prefix": f"{kafka.prefix}again."})
    written = {label.request_id: label for label in (decode(Label, r.value) for r in read_all(again, "labels"))}
    expected = {r.request_id for r in records if isinstance(r, Recall) and MIDDLE <= r.ts < MIDDLE + 100_000}
    assert written.keys() == expected
    assert all(label.unexposed == production[name].unexposed for name, label in written.items())
    refused = CliRunner().invoke(
        cli.app, ["replay", "--execute", "--output-prefix", kafka.prefix, "--config", str(config)]
    )
    assert refused.exit_code == 1 and "take another" in refused.output

    # What changed on the log since, each in its own half or of its own user or item.
    anchors = {}
    for record in read_all(kafka, "user-anchors"):
        anchors[record.key] = (record.partition, decode(UserAnchors, record.value))
    vectors = {r.key: decode(ItemVector, r.value) for r in read_all(kafka, "item-vectors")}
    newest = {record.user_id.encode(): record.ts for record in records if isinstance(record, Recall)}
    user = next(key for key, (_, one) in sorted(anchors.items()) if one.sid and one.ts + 1 < newest[key])
    partition, last = anchors[user]
    flipped = -np.frombuffer(last.vectors, "<f4")
    late = msgspec.structs.replace(last, ts=last.ts + 1, version=last.version + 1, vectors=vector_bytes(flipped))
    changed = msgspec.structs.replace(vectors[b"item-7"], vector=vectors[b"item-8"].vector)
    with producer(kafka) as out:
        out.send(full_name(kafka, "user-anchors"), key=user, value=encode(late), partition=partition)
        out.send(full_name(kafka, "item-vectors"), key=b"item-7", value=encode(changed))
        second = Calibration("platt-late", MIDDLE + 200_000, "platt", 4.0, -2.0, 10)
        out.send(full_name(kafka, "calibrations"), key=b"platt-late", value=encode(second))
    found = replayed(config)
    causes = {cause["cause"]: cause for cause in found["causes"]}
    assert causes.keys() == {"anchors", "catalogue", "calibration"}
    assert {move["user_id"] for move in causes["anchors"]["biggest"]} == {user.decode()}
    assert all(move["ts"] > last.ts for move in causes["anchors"]["biggest"])
    assert {move["item_id"] for move in causes["catalogue"]["biggest"]} == {"item-7"}
    assert all(move["ts"] >= MIDDLE + 200_000 for move in causes["calibration"]["biggest"])
    assert found["reproduced"] == found["changed"]

    # Saved, it replays without a broker to the same bytes, and gives the same comparison.
    gpl(config, "capture", str(tmp_path / "saved"), *arguments)
    gpl(config, "replay", "--execute", *arguments, "--out", str(tmp_path / "from-broker"))
    (tmp_path / "elsewhere").mkdir()
    runner = CliRunner()
    saved = ["--capture", str(tmp_path / "saved")]
    done = runner.invoke(cli.app, ["replay", "--execute", *saved, "--out", str(tmp_path / "from-files")])
    assert done.exit_code == 0, done.output
    for path in (tmp_path / "from-broker").iterdir():
        assert path.read_bytes() == (tmp_path / "from-files" / path.name).read_bytes()
    done = runner.invoke(cli.app, ["replay", "--execute", "--compare", "--json", "--no-output", *saved])
    assert done.exit_code == 0, done.output
    here, there = replayed(config, *arguments), json.loads(done.stdout)["comparison"]
    assert [c["item_labels"] for c in here["causes"]] == [c["item_labels"] for c in there["causes"]]

    # One label's story, from the broker and from the files.
    move = next(m for m in here["causes"][0]["biggest"] if m["kind"] == "moved")
    told = json.loads(gpl(config, "explain", move["request_id"], move["item_id"], "--json"))
    done = runner.invoke(cli.app, ["explain", move["request_id"], move["item_id"], "--json", *saved])
    assert done.exit_code == 0, done.output
    assert told == json.loads(done.stdout)
    assert told["verdict"]["equal"] is False
    assert told["recorded"]["item"] == move["recorded"] and told["recomputed"]["item"] == move["replayed"]
    assert told["anchors"]["anchors"] and told["calculation"]
