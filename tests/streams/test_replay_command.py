"""``gpl replay`` and ``gpl explain`` as a user meets them, over a capture: no broker, no artefacts."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import msgspec
import pytest
from click.testing import Result
from typer.testing import CliRunner

from streams import cli
from streams.contracts import Item, Label, decode, encode
from streams.replay.record import capture
from streams.replay.run import Replay, Setup
from tests.streams.replay_world import EVERYTHING, FRAME, SETTINGS, START, World, unit


@pytest.fixture
def saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A capture with one item vector changed since its labels were made."""
    world = World(1)
    for item in world.items:
        world.log.put("items", item, encode(Item(item, f"<b>{item}</b>")))
    world.send(world.events(30))
    world.record()
    world.put_item("item-3", unit(world.rng, 1)[0])
    setup = Setup.of(SETTINGS, FRAME)
    capture(world.log, EVERYTHING, SETTINGS, tmp_path / "saved", Replay(world.log, EVERYTHING, setup))
    monkeypatch.chdir(tmp_path)
    return Path("saved")


def gpl(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, list(arguments))


def test_without_execute_nothing_is_run(saved: Path):
    done = gpl("replay", "--capture", str(saved), "--compare")
    assert done.exit_code == 0, done.output
    assert "Nothing was run" in done.output and "item-vectors" in done.output
    assert sorted(path.name for path in Path().iterdir()) == ["saved"]
    said = json.loads(gpl("replay", "--capture", str(saved), "--json").output)
    recalls = [part for part in said["read"] if part["topic"] == "recalls"]
    assert sum(part["records"] for part in recalls) == 30
    assert min(part["event_ms"][0] for part in recalls) == START + 1_000
    assert said["estimated_seconds"] > 0 and said["bytes"] > 0


def test_execute_writes_the_labels_and_the_comparison(saved: Path):
    done = gpl("replay", "--capture", str(saved), "--execute", "--compare", "--out", "out", "--html", "page.html")
    assert done.exit_code == 0, done.output
    assert "catalogue" in done.output and "requests/s" in done.output
    lines = gzip.decompress(Path("out/labels.jsonl.gz").read_bytes()).splitlines()
    labels = [decode(Label, line) for line in lines]
    assert len({label.request_id for label in labels}) == 30
    manifest = json.loads(Path("out/manifest.json").read_text())
    assert manifest["requests"] == {"labelled": 30, "no_anchors": 0, "not_replayable": 0}
    page = Path("page.html").read_text()
    assert "item-3" in page and "src=" not in page and "href=" not in page

    again = gpl("replay", "--capture", str(saved), "--execute", "--out", "out")
    assert again.exit_code == 1 and "out exists" in again.output
    twice = gpl("replay", "--capture", str(saved), "--execute", "--out", "twice")
    assert twice.exit_code == 0
    for path in Path("out").iterdir():
        assert path.read_bytes() == (Path("twice") / path.name).read_bytes()


def test_a_part_of_a_capture_can_be_chosen(saved: Path):
    said = [
        json.loads(gpl("replay", "--capture", str(saved), "--execute", "--json", "--no-output", *chosen).output)
        for chosen in ([], ["--user", "user-1"], ["--last", "30s"], ["--offsets", "0:2-4"])
    ]
    requests = [sum(one["requests"].values()) for one in said]
    assert requests[0] == 30 and 0 < requests[1] < 30 and requests[2] == 11 and requests[3] == 3


def test_explain_tells_the_story_and_writes_it(saved: Path):
    done = gpl("replay", "--capture", str(saved), "--execute", "--compare", "--json", "--no-output")
    (cause,) = json.loads(done.output)["comparison"]["causes"]
    move = next(move for move in cause["biggest"] if move["kind"] == "moved")
    told = gpl("explain", move["request_id"], "item-3", "--capture", str(saved), "--html", "story.html")
    assert told.exit_code == 0, told.output
    assert "not equal" in told.output and "catalogue" in told.output
    page = Path("story.html").read_text()
    assert "&lt;b&gt;item-3&lt;/b&gt;" in page and "<b>item-3</b>" not in page
    story = json.loads(gpl("explain", move["request_id"], "item-3", "--capture", str(saved), "--json").output)
    assert story["recorded"]["item"] == move["recorded"]
    assert msgspec.json.encode(story)


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["replay", "--from", "yesterday"], 2, "for --from: 'yesterday' is no time"),
        (["replay", "--to", "tomorrow"], 2, "for --to: 'tomorrow' is no time"),
        (["replay", "--last", "long"], 2, "for --last: 'long' is no duration"),
        (["replay", "--last", "7"], 2, "for --last: '7' is no duration; a number and its unit, such as 90s, 15m, 2h"),
        (["replay", "--ahead", "7"], 2, "for --ahead: '7' is no duration"),
        (["replay", "--offsets", "a-b"], 2, "for --offsets: 'a-b' is no range of offsets"),
        (["replay", "--no-output", "--output-prefix", "x."], 2, "for --no-output: --output-prefix and --no-output"),
        (["replay", "--no-output", "--out", "x"], 2, "for --no-output: --out and --no-output exclude each other"),
        (["replay", "--out", "x", "--output-prefix", "x."], 2, "for --output-prefix: --out and --output-prefix"),
        (["replay", "--last", "1h", "--from", "2023-01-01"], 2, "exclude each other"),
        (["replay", "--topic", "items", "--offsets", "1-2"], 2, "'items' is none of"),
        (["replay", "--from", "2023-02-01", "--to", "2023-01-01"], 1, "is empty"),
        (["replay", "--from", "2001-01-01", "--to", "2002-01-01"], 0, "recalls from 2001"),
        (["replay", "--from", "2001-01-01", "--to", "2002-01-01", "--execute"], 1, "the selection holds no request"),
        (["replay", "--offsets", "7:1-2"], 1, "partition 7"),
        (["replay", "--set", "generator.beams=3"], 1, "generator.beams: replay cannot answer this"),
        (["replay", "--set", "labels.kernel_tau=-1"], 1, "labels.kernel_tau"),
        (["explain", "nope", "item-1"], 1, "request 'nope'"),
        (["explain", "r1", "item-1", "--from", "soon"], 2, "for --from: 'soon' is no time"),
    ],
)
def test_errors_of_use_are_one_message(saved: Path, arguments: list[str], code: int, said: str):
    done = gpl(*arguments, "--capture", str(saved))
    assert done.exit_code == code, (done.output, done.exception)
    assert said in " ".join(done.output.replace("│", " ").split())


def test_a_range_that_cannot_be_read_is_told_before_a_broker_is_asked():
    done = gpl("capture", "new", "--last", "7")
    assert done.exit_code == 2 and "for --last: '7' is no duration" in done.output


@pytest.mark.parametrize("name", ["window", "allowed_lateness", "retention", "max_ahead"])
def test_a_capture_answers_for_no_more_than_it_holds(saved: Path, name: str):
    held = getattr(SETTINGS.labels, f"{name}_seconds")
    for execute in ([], ["--execute", "--no-output"]):
        more, less = (
            gpl("replay", "--capture", str(saved), "--set", f"labels.{name}_seconds={value}", *execute)
            for value in (held + 1, held - 1)
        )
        assert more.exit_code == 1 and less.exit_code == 0, (more.output, less.output)
        assert f"labels.{name}_seconds: {held + 1:g} is asked for" in more.output
        assert f"captured under {held:g}" in more.output


def test_settings_that_need_more_than_a_capture_holds_are_refused(saved: Path):
    Path("wide.toml").write_text("[labels]\nwindow_seconds = 60\n")
    for command in (["replay"], ["replay", "--set", "window=5"], ["explain", "r1", "item-1"]):
        done = gpl(*command, "--capture", str(saved), "--config", "wide.toml")
        assert done.exit_code == 1 and "labels.window_seconds: 60 is asked for" in done.output


@pytest.mark.parametrize("command", [["replay", "--execute", "--compare", "--no-output"], ["explain", "r1", "item-1"]])
def test_a_page_goes_into_a_new_directory_and_costs_the_result_never(saved: Path, command: list[str]):
    done = gpl(*command, "--capture", str(saved), "--html", "new/deep/page.html")
    assert done.exit_code == 0, done.output
    assert Path("new/deep/page.html").read_text().startswith("<!doctype html>")
    Path("taken").mkdir()
    failed = gpl(*command, "--capture", str(saved), "--html", "taken")
    assert failed.exit_code == 1 and "error:" in failed.output
    assert "item-3" in failed.output or "item item-1" in failed.output  # the result was told
    Path("file").write_text("")
    early = gpl(*command, "--capture", str(saved), "--html", "file/page.html")
    assert early.exit_code == 1
    assert "item-3" not in early.output and "item item-1" not in early.output  # nothing was begun


def test_a_directory_that_is_no_capture_is_refused(tmp_path: Path):
    done = gpl("replay", "--capture", str(tmp_path))
    assert done.exit_code == 1 and "no capture there" in done.output
