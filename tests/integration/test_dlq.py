"""Dead letters on a real Kafka: a consumer halts at its cap and loses nothing; letters are listed, shown, sent back."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest
from kafka import KafkaAdminClient
from typer.testing import CliRunner

from streams import metrics
from streams.cli import app
from streams.contracts import Feedback, encode
from streams.dlq.letters import index
from streams.kafka import client_options, producer
from streams.labels.agent import LabelsRole
from streams.labels.record import Versions
from streams.settings import DeadLetterSettings, KafkaSettings, Settings
from streams.topics import full_name
from tests.integration.pipeline import kafka_section, read_all

TS = 1_700_000_000_000
KEY = b"one-partition"


@asynccontextmanager
async def role(kafka: KafkaSettings, caps: DeadLetterSettings) -> AsyncIterator[metrics.Health]:
    """A labels role in this process."""
    health, failures = metrics.Health(), []
    labels = LabelsRole(
        Settings(kafka=kafka, dead_letters=caps),
        Versions("e", "q", "c"),
        2,
        3,
        lambda ids: ([], np.zeros((0, 2), np.float32)),
        lambda: True,
        health,
        failures.append,
    )
    await labels.start()
    try:
        yield health
    finally:
        await labels.stop()
    assert failures == []


async def until(what: str, condition, timeout: float = 60.0) -> None:
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if await asyncio.to_thread(condition):
            return
        await asyncio.sleep(0.1)
    raise AssertionError(f"{what}: not within {timeout:.0f} s")


@pytest.fixture
def config(tmp_path: Path, kafka_settings: KafkaSettings, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    path = tmp_path / "gpl.toml"
    path.write_text(kafka_section(kafka_settings))
    monkeypatch.setenv("GPL_CONFIG", str(path))
    return path


def gpl(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["dlq", *arguments])
    assert result.exit_code == code, result.output
    return result.output


def groups(kafka: KafkaSettings) -> set[str]:
    with KafkaAdminClient(**client_options(kafka)) as admin:
        return {group["group_id"] for group in admin.list_groups() if group["group_id"].startswith(kafka.group_prefix)}


def committed(kafka: KafkaSettings, group: str) -> int:
    with KafkaAdminClient(**client_options(kafka)) as admin:
        offsets = admin.list_group_offsets(group)[group]
        return max((o.offset for tp, o in offsets.items() if tp.topic.endswith("feedback")), default=-1)


async def test_a_consumer_halts_at_its_cap_and_its_letters_can_be_sent_back(
    kafka_settings: KafkaSettings, config: Path
) -> None:
    kafka = kafka_settings
    feedback = full_name(kafka, "feedback")
    bad = [b"{not json", b"\xff\xfe\x00", b'{"event_id":1}', b"", *[f"bad {n}".encode() for n in range(8)]]
    headers = [("trace", b"\x00\xff"), ("trace", b"two"), ("gpl-topic", b"not ours")]
    with producer(kafka) as out:
        for value in bad:
            out.send(feedback, key=KEY, value=value, headers=headers)
    caps = DeadLetterSettings(max_consecutive=5)
    async with role(kafka, caps) as health:
        await until("the consumer to halt", lambda: health.halted())
        assert "max_consecutive" in health.halted()["labels"]
        port, close = metrics.serve("127.0.0.1", 0, health)
        try:
            answer = await asyncio.to_thread(_get, f"http://127.0.0.1:{port}/health")
        finally:
            close()
        assert answer[0] == 503
        assert "offset 5" in json.loads(answer[1])["halted"]["labels"]
        await until("the letters", lambda: len(read_all(kafka, "dead-letters")) == 5)
        # The sixth is refused but not acknowledged, and nothing behind it is touched.
        await until("the commit", lambda: committed(kafka, f"{kafka.group_prefix}labels") == 5)
    before = groups(kafka)
    assert {row["message"] == "" for row in json.loads(gpl("list", "--json"))["letters"]} == {False}

    async with role(kafka, DeadLetterSettings(max_consecutive=1000)) as health:
        await until("all letters", lambda: len(read_all(kafka, "dead-letters")) == len(bad))
        assert health.halted() == {}

    listed = json.loads(gpl("list", "--json", "--topic", "feedback"))
    assert [letter["offset"] for letter in listed["letters"]] == list(range(len(bad)))
    assert sum(row["letters"] for row in listed["counts"]) == len(bad)
    assert json.loads(gpl("list", "--json", "--reason", "late"))["letters"] == []
    assert json.loads(gpl("list", "--json", "--until", "2020-01-01"))["letters"] == []
    assert len(json.loads(gpl("list", "--json", "--since", "1h"))["letters"]) == len(bad)
    shown = gpl("show", "1")
    assert "0x00ff" in shown and "trace: two" in shown and "gpl-topic: not ours" in shown and "ff fe 00" in shown
    gpl("show", "1234", code=2)

    # A good record that a faulty consumer had refused would be used now; here one letter goes back and dies again.
    assert "1 would be sent back" in gpl("redrive", "1")
    assert len(read_all(kafka, "feedback")) == len(bad)
    assert "1 sent back" in gpl("redrive", "1", "--execute")
    again = read_all(kafka, "feedback")[-1]
    assert (again.key, again.value) == (KEY, b"\xff\xfe\x00")
    assert again.headers[: len(headers)] == headers
    assert dict(again.headers)["gpl-redrives"] == b"1"
    assert "left out: 1 sent back before" in gpl("redrive", "1", "--execute")
    assert len(read_all(kafka, "feedback")) == len(bad) + 1
    assert groups(kafka) == before

    async with role(kafka, DeadLetterSettings(max_consecutive=1000)):
        await until("the loop's letter", lambda: index(kafka)[-1].redrives == 1)
    letters = json.loads(gpl("list", "--json", "--limit", "0"))["letters"]
    assert [letter["redriven"] for letter in letters] == [n == 1 for n in range(len(bad) + 1)]
    assert "came back 1 times or more" in gpl("redrive", "--all", "--max-redrives", "1")


async def test_what_is_good_is_used_after_a_redrive(kafka_settings: KafkaSettings, config: Path) -> None:
    """A record refused as from the future is taken once its time is allowed: it is the same record to the joiner."""
    kafka = kafka_settings
    event = Feedback("e1", KEY.decode(), "i", TS * 2, "click")
    with producer(kafka) as out:
        out.send(full_name(kafka, "feedback"), key=KEY, value=encode(event))
    async with role(kafka, DeadLetterSettings()):
        await until("the letter", lambda: len(read_all(kafka, "dead-letters")) == 1)
    assert json.loads(gpl("list", "--json"))["letters"][0]["reason"] == "future"
    gpl("redrive", code=2)
    gpl("redrive", "--topic", "feedback", "--execute")
    sent = read_all(kafka, "feedback")
    assert [record.value for record in sent] == [encode(event)] * 2
    assert len({record.partition for record in sent}) == 1


def _get(url: str) -> tuple[int, str]:
    import urllib.error
    import urllib.request

    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()
