"""What the pages show is what the system has: tables, links, and Python that runs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kafka
import pytest

from gpl import fit
from gpl.labels import evidence
from streams.bench.command import app as bench_app
from streams.contracts import TOPIC_RECORDS, Calibration, Item, Provenance, decode, encode
from streams.replay.record import capture
from streams.replay.run import Replay, Setup
from streams.settings import KafkaSettings, Settings
from streams.topics import TOPICS
from tests.streams.replay_world import EVERYTHING, FRAME, SETTINGS, World, unit

ROOT = Path(__file__).parents[1]
PAGES = {path.name: path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))}
README = (ROOT / "README.md").read_text(encoding="utf-8")


def snippets(text: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", PAGES)
def test_links_between_pages_lead_somewhere(page: str):
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", PAGES[page]):
        assert (ROOT / "docs" / target).exists(), target


def test_the_table_of_topics_is_that_of_the_code():
    rows = re.findall(
        r"^\| `([a-z-]+)` \| [^|]+ \| (\w+) \| ([^|]+) \| [^|]+ \| [^|]+ \|$", PAGES["deploy.md"], re.MULTILINE
    )
    kafka_settings = KafkaSettings()
    assert {name: (partitions, cleanup.strip()) for name, partitions, cleanup in rows} == {
        spec.name: ("1" if spec.single else "N", _cleanup(spec.configs(kafka_settings))) for spec in TOPICS
    }
    assert f"`kafka.partitions` ({kafka_settings.partitions})" in PAGES["deploy.md"]
    assert f"# {len(TOPICS)} created" in PAGES["deploy.md"]


def _cleanup(config: dict[str, str]) -> str:
    lag, retention = config.get("min.compaction.lag.ms"), config.get("retention.ms")
    more = (
        ", after a day"
        if lag == str(24 * 3600 * 1000)
        else f", {int(retention) // 86_400_000} days"
        if retention
        else ""
    )
    return config["cleanup.policy"] + more


def test_what_the_producer_sends_is_what_the_topics_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    sent: list[tuple[str, bytes, bytes]] = []

    class Producer:
        def __init__(self, **options: Any) -> None:
            pass

        def send(self, topic: str, key: bytes, value: bytes) -> Any:
            sent.append((topic.removeprefix("gpl."), key, value))
            return type("Sent", (), {"get": lambda self, timeout: None})()

    monkeypatch.setattr(kafka, "KafkaProducer", Producer)
    monkeypatch.chdir(tmp_path)
    items = re.findall(r"^items\.jsonl +(\{.*\})$", PAGES["data-format.md"], flags=re.MULTILINE)
    Path("data").mkdir()
    Path("data/items.jsonl").write_text("".join(f"{item}\n" for item in items))
    exec(snippets(PAGES["deploy.md"])[0], {})
    assert [topic for topic, _, _ in sent] == ["items", "items", "recalls", "feedback", "feedback"]
    for topic, key, value in sent:
        record: Any = decode(TOPIC_RECORDS[topic], value)
        assert key.decode() == (record.item_id if topic == "items" else record.user_id)


def test_the_python_of_the_readme_labels():
    (code,) = snippets(README)
    namespace: dict[str, Any] = {}
    exec(code, namespace)
    label, confidence = namespace["labelled"].label, namespace["labelled"].confidence
    assert label.round(2).tolist() == pytest.approx([0.99, 0.0, 0.0, 1.0], abs=0.02)
    assert ((confidence > 0) & (confidence <= 1)).all()


def test_the_readme_leads_to_every_page():
    index = README.partition("## All pages")[2]
    assert set(re.findall(r"\]\(docs/([^)#]+)\)", index)) == set(PAGES)


def test_the_readme_names_every_bench_and_the_least_that_is_needed():
    names = {command.name or command.callback.__name__ for command in bench_app.registered_commands}
    assert set(re.search(r"^gpl bench (\S+)", README, re.MULTILINE)[1].split("|")) == names
    settings, table = Settings(), PAGES["data-format.md"]
    assert f"{fit.MIN_SEQUENCES} users with two clicks" in table
    assert f"{fit.MIN_CALIBRATION} exposures, {fit.MIN_CALIBRATION // 10} clicked" in table
    assert f"{settings.profiles.min_positives} clicks in the stream" in table
    assert f"{settings.trainer.publish_min_records} labelled requests" in table
    assert f"at least {evidence._MIN_USERS} users" in table


def test_the_python_and_the_keys_of_explain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    world = World(1)
    for item in world.items:
        world.log.put("items", item, encode(Item(item, f"text of {item}")))
    world.send(world.events(30))
    world.record()
    world.put_item("item-3", unit(world.rng, 1)[0])
    whole = Replay(world.log, EVERYTHING, Setup.of(SETTINGS, FRAME))
    capture(world.log, EVERYTHING, SETTINGS, tmp_path / "saved", whole)
    monkeypatch.chdir(tmp_path)
    (code,) = snippets(PAGES["replay.md"])
    namespace: dict[str, Any] = {}
    exec(code, namespace)
    assert namespace["story"]["verdict"]["equal"] is False
    table = PAGES["replay.md"].partition("## Explain")[2].partition("\n## ")[0]
    keys = set(re.findall(r"`([a-z_]+)`", table))
    assert set(_keys(namespace["story"])) - {"catalogue"} - set(Calibration.__struct_fields__) - set(
        Provenance.__struct_fields__
    ) <= keys | {"dispersion", "history", "generation"}


def _keys(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, one in value.items():
            yield key
            yield from _keys(one)
    elif isinstance(value, list):
        for one in value:
            yield from _keys(one)


@pytest.mark.parametrize("page", ["README.md", *PAGES])
def test_headings_that_links_name_are_there(page: str):
    text = README if page == "README.md" else PAGES[page]
    for target, heading in re.findall(r"\]\((?!http)([^)#]*)#([^)]+)\)", text):
        lines = PAGES[target.removeprefix("docs/") or page].splitlines()
        found = {
            re.sub(r"[^\w -]", "", line.lstrip("# ").lower()).replace(" ", "-")
            for line in lines
            if line.startswith("#")
        }
        assert heading in found, f"{target}#{heading}"
