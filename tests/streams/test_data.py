"""Data directories: what the reader takes, what `validate` finds and where."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import typer
from hypothesis import assume, given
from hypothesis import strategies as st
from typer.testing import CliRunner

from streams.contracts import Feedback, Item, Recall, encode
from streams.data.reader import BOM, entries, lines, records
from streams.data.validate import Problem, validate
from streams.data_command import validate as command

app = typer.Typer()
app.command()(command)

ITEMS = [{"item_id": "a", "text": "red shoes"}, {"item_id": "b", "text": "blue hat"}]
RECALLS = [{"request_id": "r1", "user_id": "u", "ts": 1000, "candidates": ["a", "b"]}]
FEEDBACK = [
    {"event_id": "e1", "user_id": "u", "item_id": "a", "ts": 1001, "kind": "impression", "request_id": "r1"},
    {"event_id": "e2", "user_id": "u", "item_id": "a", "ts": 1002, "kind": "click", "request_id": "r1"},
]


def line(record) -> bytes:
    return record if isinstance(record, bytes) else json.dumps(record).encode()


@pytest.fixture
def write(tmp_path):
    def write(items=ITEMS, recalls=RECALLS, feedback=FEEDBACK) -> Path:
        for name, content in (("items", items), ("recalls", recalls), ("feedback", feedback)):
            (tmp_path / f"{name}.jsonl").write_bytes(b"".join(line(record) + b"\n" for record in content))
        return tmp_path

    return write


def test_a_sound_directory_has_no_problems(write):
    assert validate(write()) == []


@pytest.mark.parametrize(
    ("name", "record", "field", "reason"),
    [
        ("items", b'{"item_id": "c", "text"', "", "truncated"),
        ("items", b'{"item_id": "c", "text": "x"} trailing', "", "trailing characters"),
        ("items", b"[1]", "", "Expected `object`, got `array`"),
        ("items", b'{"item_id": "c", "text": "\xff\xfe"}', "", "invalid UTF-8"),
        ("items", b'{"item_id": 7, "text": "caf\xe9"}', "item_id", "Expected `str`, got `int`"),
        ("items", b'{"item_id": 7, "text": ' + b"[" * 5000 + b"]" * 5000 + b"}", "item_id", "got `int`"),
        ("items", b'\xef\xbb\xbf{"item_id": "c", "text": "x"}', "", "byte order mark"),
        ("items", {"item_id": "c", "text": "x", "colour": "red"}, "colour", "unknown field"),
        ("items", {"item_id": "c"}, "text", "missing required field"),
        ("items", {"item_id": 7, "text": "x"}, "item_id", "Expected `str`, got `int`: 7"),
        ("items", {"item_id": "", "text": "x"}, "item_id", "length >= 1: ''"),
        ("items", {"item_id": "c", "text": " "}, "text", "empty"),
        ("items", {"item_id": "a", "text": "x"}, "item_id", "duplicate: 'a' stands in line 1"),
        (
            "items",
            {"item_id": "c", "text": "x", "embedding": [1.0]},
            "embedding",
            "an embedding, but the item of",
        ),
        ("recalls", {"request_id": "r2", "user_id": "u", "ts": -1, "candidates": ["a"]}, "ts", ">= 0: -1"),
        ("recalls", {"request_id": "r2", "user_id": "u", "ts": 1.5, "candidates": ["a"]}, "ts", "got `float`: 1.5"),
        ("recalls", {"request_id": "r2", "user_id": "u", "ts": 1, "candidates": []}, "candidates", "length >= 1"),
        ("recalls", {"request_id": "r2", "user_id": "u", "ts": 1, "candidates": ["a", 3]}, "candidates[1]", "`int`: 3"),
        (
            "recalls",
            {"request_id": "r2", "user_id": "u", "ts": 1, "candidates": ["a"], "sources": ["x", "y"]},
            "sources",
            "2 entries for 1 candidates",
        ),
        ("recalls", RECALLS[0], "request_id", "duplicate: 'r1' stands in line 1"),
        ("feedback", FEEDBACK[0], "event_id", "duplicate: 'e1' stands in line 1"),
        ("feedback", FEEDBACK[0] | {"event_id": "e3", "kind": "view"}, "kind", "Invalid enum value 'view'"),
        ("feedback", FEEDBACK[0] | {"event_id": "e3", "user_id": "v"}, "user_id", "request 'r1' (recalls.jsonl:1)"),
    ],
)
def test_a_bad_record_is_an_error_with_file_line_field_and_reason(write, name, record, field, reason):
    base = {"items": ITEMS, "recalls": RECALLS, "feedback": FEEDBACK}
    directory = write(**{**base, name: [*base[name], record]})
    (problem,) = validate(directory)
    assert (problem.file, problem.line, problem.field) == (f"{name}.jsonl", len(base[name]) + 1, field)
    assert reason in problem.reason
    assert problem.severity == "error"


@pytest.mark.parametrize(
    ("vector", "reason"),
    [
        ([1.0, 2.0, 3.0], "3 dimensions, but the item of line 1 has 2"),
        ([0.0, 0.0], "no direction"),
        ([1e300, 0.0], "1e+300"),
    ],
)
def test_embeddings_that_do_not_fit(write, vector, reason):
    items = [{"item_id": "a", "text": "", "embedding": [1.0, 0.5]}, {"item_id": "b", "text": "", "embedding": vector}]
    (problem,) = validate(write(items=items))
    assert (problem.line, problem.field) == (2, "embedding")
    assert reason in problem.reason


@pytest.mark.parametrize(
    ("name", "record", "field", "reason"),
    [
        (
            "recalls",
            {"request_id": "r2", "user_id": "u", "ts": 1, "candidates": ["a", "x", "y"]},
            "candidates",
            "2 cand",
        ),
        (
            "recalls",
            {"request_id": "r2", "user_id": "u", "ts": 1, "candidates": ["a", "a"]},
            "candidates",
            "1 candidates",
        ),
        ("feedback", FEEDBACK[0] | {"event_id": "e3", "request_id": "r9"}, "request_id", "1 events name a request"),
        ("feedback", FEEDBACK[0] | {"event_id": "e3", "item_id": "z"}, "item_id", "1 events name an item"),
        ("feedback", FEEDBACK[0] | {"event_id": "e3", "ts": 999}, "ts", "1 events are older"),
        ("feedback", FEEDBACK[0] | {"event_id": "e3", "ts": 61_001}, "ts", "1 events come more than 60 s"),
        ("feedback", b"  ", "", "blank line"),
    ],
)
def test_what_the_stream_counts_is_a_warning_with_its_first_line(write, name, record, field, reason):
    base = {"items": ITEMS, "recalls": RECALLS, "feedback": FEEDBACK}
    (problem,) = validate(write(**{**base, name: [*base[name], record]}), window_seconds=60)
    assert (problem.line, problem.field, problem.severity) == (len(base[name]) + 1, field, "warning")
    assert problem.reason.startswith(reason)


@pytest.mark.parametrize(
    ("name", "record"),
    [
        ("recalls", RECALLS[0] | {"request_id": "r2", "ts": 5001}),
        ("feedback", FEEDBACK[0] | {"event_id": "e3", "ts": 5001}),
    ],
)
def test_events_further_ahead_than_the_stream_takes_are_errors(write, name, record):
    base = {"items": ITEMS, "recalls": RECALLS, "feedback": FEEDBACK}
    directory = write(**{**base, name: [*base[name], record]})
    assert validate(directory, until=5001) == []
    (problem,) = validate(directory, until=5000)
    assert (problem.line, problem.field, problem.severity) == (len(base[name]) + 1, "ts", "error")
    write(**{**base, name: [*base[name], record | {"ts": int((time.time() + 600) * 1000)}]})
    done = CliRunner().invoke(app, [str(directory), "--window", "1e10"])
    assert done.exit_code == 1 and "in the future" in done.output


def test_warnings_of_one_kind_are_tallied(write):
    orphans = [FEEDBACK[0] | {"event_id": f"x{i}", "request_id": "gone"} for i in range(500)]
    (problem,) = validate(write(feedback=FEEDBACK + orphans))
    assert problem.reason.startswith("500 events")
    assert problem.line == 3


def test_a_record_over_the_cap_is_an_error_and_the_rest_is_read(write):
    big = {"item_id": "big", "text": "x" * 5000}
    directory = write(items=[ITEMS[0], big, ITEMS[1]])
    (problem,) = validate(directory, max_bytes=1024)
    assert (problem.file, problem.line) == ("items.jsonl", 2)
    assert "over the cap of 1024" in problem.reason
    assert [item.item_id for item in records(directory / "items.jsonl", Item, 1024)] == ["a", "b"]


def test_a_byte_order_mark_at_the_start_is_passed_over(write):
    first, second = line(ITEMS[0]), line(ITEMS[1])
    directory = write(items=[BOM + first, second])
    assert validate(directory) == []
    path = directory / "items.jsonl"
    assert [path.read_bytes()[at.offset :][: at.size] for at in lines(path, len(first))] == [
        first + b"\n",
        second + b"\n",
    ]
    path.write_bytes(BOM)
    assert list(lines(path, 2**20)) == []


def test_missing_and_empty_files_are_errors(write):
    directory = write(recalls=[])
    (directory / "items.jsonl").unlink()
    errors = [problem for problem in validate(directory) if problem.severity == "error"]
    assert errors == [
        Problem("items.jsonl", 0, "", "file is missing"),
        Problem("recalls.jsonl", 0, "", "file has no records"),
    ]
    assert validate(directory / "nowhere")[0].reason == "no such directory"


@given(st.lists(st.binary(max_size=40).map(lambda data: data.replace(b"\n", b"")), max_size=20), st.booleans())
def test_lines_tell_where_they_are_whatever_they_hold(tmp_path_factory, contents, ends_with_newline):
    path = tmp_path_factory.mktemp("lines") / "file.jsonl"
    data = b"\n".join(contents) + (b"\n" if ends_with_newline and contents else b"")
    assume(not data.startswith(BOM))
    path.write_bytes(data)
    cap = 16
    found = list(lines(path, cap))
    assert b"".join(data[line.offset : line.offset + line.size] for line in found) == data
    assert [line.number for line in found] == list(range(1, len(found) + 1))
    for line_ in found:
        content = data[line_.offset : line_.offset + line_.size].rstrip(b"\r\n")
        assert line_.raw == (content if len(content) <= cap else None)


ids = st.text(min_size=1, max_size=20).filter(lambda text: text.isprintable())


@given(st.lists(st.builds(Recall, ids, ids, st.integers(0, 2**40), st.lists(ids, min_size=1, max_size=5)), max_size=8))
def test_what_encode_writes_the_reader_reads(tmp_path_factory, recalls):
    path = tmp_path_factory.mktemp("recalls") / "recalls.jsonl"
    path.write_bytes(b"".join(encode(recall) + b"\n" for recall in recalls))
    assert [entry.record for entry in entries(path, Recall, 2**20)] == recalls


def test_the_command_prints_a_table_and_exits_1_on_errors(write):
    directory = write(feedback=[*FEEDBACK, FEEDBACK[0] | {"event_id": "e3", "kind": "[red]view"}])
    result = CliRunner().invoke(app, [str(directory)], terminal_width=200)
    assert result.exit_code == 1
    assert "feedback.jsonl" in result.output and "[red]view" in result.output
    assert CliRunner().invoke(app, [str(write())]).exit_code == 0


def test_the_command_prints_json(write):
    directory = write(items=[*ITEMS, {"item_id": "c"}])
    result = CliRunner().invoke(app, [str(directory), "--json"])
    assert result.exit_code == 1
    (problem,) = [json.loads(text) for text in result.stdout.splitlines()]
    assert problem == {
        "file": "items.jsonl",
        "line": 3,
        "field": "text",
        "reason": "Object missing required field `text`",
        "severity": "error",
    }


def test_a_window_of_0_and_a_configured_one_are_taken(write, tmp_path, monkeypatch):
    monkeypatch.setenv("GPL_CONFIG", "")  # loading sets it; put back afterwards
    directory = write()
    (tmp_path / "own.toml").write_text("[labels]\nwindow_seconds = 0.0015\n")
    for options, count in (([], 0), (["--window", "0"], 2), (["--config", str(tmp_path / "own.toml")], 1)):
        result = CliRunner().invoke(app, [str(directory), "--json", *options])
        assert [json.loads(text)["reason"].split()[0] for text in result.stdout.splitlines()] == [str(count)][:count]


def test_a_recall_of_many_candidates_is_checked_in_linear_time(write):
    many = [f"item-{n}" for n in range(50_000)]
    directory = write(recalls=[RECALLS[0] | {"candidates": [*many, many[-1]]}])
    started = time.monotonic()
    _, repeated = validate(directory)
    assert time.monotonic() - started < 10  # quadratic: half a minute and more
    assert repeated.reason.startswith("1 candidates") and repeated.reason.endswith("'item-49999'")


def test_warnings_alone_exit_0(write):
    directory = write(feedback=[*FEEDBACK, FEEDBACK[0] | {"event_id": "e3", "request_id": "gone"}])
    assert CliRunner().invoke(app, [str(directory)]).exit_code == 0


def test_feedback_records_of_the_example_are_what_the_contract_says(write):
    (first, _) = records(write() / "feedback.jsonl", Feedback, 2**20)
    assert first == Feedback("e1", "u", "a", 1001, "impression", "r1")
