"""The neutral format: round trip, the documented forms, and clear errors."""

from __future__ import annotations

import codecs
import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from gpl.catalogue import ItemContent
from gpl.evaluation import neutral
from gpl.evaluation.dataset import DataError, Dataset, Ragged, Truth

ITEMS = [{"item_id": "i1", "text": "stapler"}, {"item_id": "i2", "text": "staples"}, {"item_id": "i3", "text": "pen"}]


def write(directory: Path, name: str, rows: list[dict[str, object]] | str | bytes) -> None:
    if not isinstance(rows, str | bytes):
        rows = "".join(json.dumps(row) + "\n" for row in rows)
    (directory / name).write_bytes(rows.encode() if isinstance(rows, str) else rows)


def event(number: int, item: str, ts: int, kind: str = "impression", **more: object) -> dict[str, object]:
    return {"event_id": f"e{number}", "user_id": "u1", "item_id": item, "ts": ts, "kind": kind, **more}


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """Two requests of one user; feedback with and without the request's id, one click twice."""
    write(tmp_path, "items.jsonl", ITEMS)
    recall = {"user_id": "u1", "candidates": ["i1", "i2", "i3", "gone"]}
    write(
        tmp_path,
        "recalls.jsonl",
        [{**recall, "request_id": "r2", "ts": 200}, {**recall, "request_id": "r1", "ts": 100}],
    )
    feedback = [
        event(1, "i1", 110, request_id="r1"),
        event(2, "i1", 115, "click", request_id="r1"),
        event(3, "i2", 210),
        event(4, "i3", 50),  # before any recall: joins nothing
        event(5, "gone", 120, request_id="r1"),
    ]
    write(tmp_path, "feedback.jsonl", feedback)
    write(tmp_path, "truth.csv", "user,item,relevance\nu1,i3,1\nu1,i2,0\n")
    return tmp_path


def test_log_is_joined_by_request_or_by_the_latest_recall_that_holds_the_item(log: Path) -> None:
    dataset = neutral.load(log)
    assert dataset.kind == "log" and dataset.log is not None and dataset.truth is not None
    assert [row.tolist() for row in (dataset.log.exposed[0], dataset.log.exposed[1])] == [[0], [1]]
    assert dataset.log.clicked.tolist() == [True, False]
    assert [dataset.log.recalled[r].tolist() for r in range(2)] == [[1, 2], [0, 2]]
    assert dataset.truth.relevance.tolist() == [1.0, 0.0] and not dataset.truth.every_cell


def test_feedback_is_taken_in_the_order_of_its_time(log: Path) -> None:
    shown = [event(n, item, ts, "click", request_id="r1") for n, (item, ts) in enumerate((("i3", 130), ("i1", 110)))]
    write(log, "feedback.jsonl", shown)
    dataset = neutral.load(log)
    assert dataset.log is not None and dataset.log.exposed[0].tolist() == [0, 2]


def test_truth_file_takes_the_place_of_the_directorys_own(log: Path) -> None:
    other = log / "other.jsonl"
    write(log, other.name, [{"user_id": "u1", "item_id": "i2", "relevance": 2.5}])
    truth = neutral.load(log, other).truth
    assert truth is not None and truth.item.tolist() == [1] and truth.relevance.tolist() == [2.5]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("items.jsonl", [*ITEMS, ITEMS[0]], r"items.jsonl:4: item_id 'i1' stands twice"),
        ("items.jsonl", '{"item_id": "i1"\n', r"items.jsonl:1: "),
        ("truth.csv", "user,item\nu1,i1\n", r"truth.csv:2: relevance is missing"),
        ("truth.csv", "user,item,relevance\nu1,i1,yes\n", r"truth.csv:2: relevance 'yes', expected a number"),
        ("truth.csv", "user,item,relevance\nu1,i1,1\nu1,i1,0\n", r"truth.csv:3: .*stand twice"),
        ("truth.csv", "user,item,relevance\nu1,i1,0\n", r"no pair of a known item with relevance above 0"),
        ("feedback.jsonl", [event(1, "i1", 110, "view", request_id="r1")], r"feedback.jsonl:1: kind 'view'"),
        (
            "feedback.jsonl",
            [{**event(1, "i1", 110, request_id="r1"), "user_id": "u2"}],
            r"its request has another user",
        ),
        ("dataset.json", '{"unlisted": "maybe"}', r"unlisted 'maybe'"),
        ("dataset.json", '{"unlised": "irrelevant"}', r"dataset.json: .*unlised"),
        ("dataset.json", b'{"name": "caf\xe9"}', r"dataset.json: .*byte 0xe9"),
        ("items.jsonl", b'{"item_id": "i1"}\n{"item_id": "caf\xe9"}\n', r"items.jsonl:2: .*byte 0xe9"),
        ("items.jsonl", [{"item_id": "i1", "attributes": {"popularity": 1e39}}], r"items.jsonl:1: .*popularity 1e\+39"),
        ("items.jsonl", [{"item_id": "i1", "attributes": {"popularity": 10**400}}], r"items.jsonl:1: .*popularity"),
        ("truth.csv", "user,item,relevance\nu1,i3,1\n\nu1," + "i" * 140_000, r"truth.csv:4: field larger than"),
        ("truth.csv", b"user,item,relevance\ncaf\xe9,i3,1\n", r"truth.csv: .*byte 0xe9"),
        ("truth.csv", "user,item,relevance\n\nu1,i3,yes\n", r"truth.csv:3: relevance 'yes'"),
        ("events.csv", "user_id,item_id,order\nu1,i1,first\n", r"events.csv:2: order 'first', expected a number"),
    ],
)
def test_errors_name_file_line_and_value(log: Path, name: str, content: object, message: str) -> None:
    write(log, name, content)  # type: ignore[arg-type]
    with pytest.raises(DataError, match=message):
        neutral.load(log)


PACKED = gzip.compress(b"user_id,item_id,order\n" + b"u1,i1,1\n" * 50, mtime=0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"user_id,item_id,order\n", "Not a gzipped file"),
        (PACKED[:-9], "ended before"),
        (PACKED[:20] + b"\xff" * 9 + PACKED[29:], "Error -3"),
    ],
)
def test_what_is_not_whole_gzip_is_named(log: Path, content: bytes, message: str) -> None:
    (log / "events.csv.gz").write_bytes(content)
    with pytest.raises(DataError, match=rf"events.csv.gz: .*{message}"):
        neutral.load(log)


def test_a_directory_is_no_truth_and_a_byte_order_mark_is_no_part_of_a_file(log: Path) -> None:
    with pytest.raises(DataError, match=f"{log}: Is a directory"):
        neutral.load(log, log)
    before = neutral.load(log)
    for name in ("items.jsonl", "recalls.jsonl", "feedback.jsonl", "truth.csv"):
        (log / name).write_bytes(codecs.BOM_UTF8 + (log / name).read_bytes())
    same(neutral.load(log), before)


def test_nothing_to_judge_on_is_an_error(log: Path) -> None:
    (log / "truth.csv").unlink()
    with pytest.raises(DataError, match="truth"):
        neutral.load(log)
    with pytest.raises(FileNotFoundError, match="no such directory"):
        neutral.load(log / "missing")
    with pytest.raises(FileNotFoundError, match=r"^--truth nope\.csv: no such file, expected CSV or JSONL"):
        neutral.load(log, Path("nope.csv"))
    (log / "items.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match=f"^{log}/items.jsonl: no such file; docs/evaluation.md tells what"):
        neutral.load(log)


def same(first: Dataset, second: Dataset) -> None:
    assert [vars_of(item) for item in first.items] == [vars_of(item) for item in second.items]
    for name in ("truth", "events", "log"):
        a, b = getattr(first, name), getattr(second, name)
        assert (a is None) == (b is None)
        if a is not None:
            for field, value in vars(a).items():
                other = getattr(b, field)
                if isinstance(value, Ragged):
                    assert [value[r].tolist() for r in range(len(value))] == [
                        other[r].tolist() for r in range(len(value))
                    ]
                elif field != "session":
                    assert np.array_equal(value, other), field


def vars_of(item: object) -> tuple[object, ...]:
    return tuple(getattr(item, name) for name in ("item_id", "text", "embedding"))


def test_users_to_whom_nothing_is_relevant_are_read_back_in_their_place(tmp_path: Path) -> None:
    items = [ItemContent(str(row["item_id"]), str(row["text"])) for row in ITEMS]
    cells = np.indices((3, 3)).reshape(2, -1).astype(np.int64)
    truth = Truth(*cells, np.array([0, 0, 0, 1, 0, 1, 0, 0, 0], dtype=np.float32), every_cell=True)
    neutral.save(Dataset("full", items, ["u1", "u2", "u3"], truth), tmp_path / "copy", "test")
    again = neutral.load(tmp_path / "copy")
    assert again.kind == "full" and again.users == ["u1", "u2", "u3"]
    assert again.truth is not None and again.truth.every_cell
    relevant = again.truth.relevance > 0
    assert list(zip(again.truth.user[relevant], again.truth.item[relevant], strict=True)) == [(1, 0), (1, 2)]


def test_what_is_saved_is_read_back(log: Path, tmp_path: Path) -> None:
    dataset = neutral.load(log)
    neutral.save(dataset, tmp_path / "copy", "test")
    same(neutral.load(tmp_path / "copy"), dataset)
    with pytest.raises(FileExistsError):
        neutral.save(dataset, tmp_path / "copy", "test")
