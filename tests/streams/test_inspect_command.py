"""``gpl fit`` and ``gpl inspect`` as a user runs them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from gpl.fit import Event
from streams.cli import app
from streams.contracts import Feedback
from streams.data import reader
from streams.fitting import exposures


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inspect")
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(4, 8))[np.arange(40) % 4] + 0.2 * rng.normal(size=(40, 8))
    lines = [
        {"item_id": f"i{n}", "text": f"thing {n}", "embedding": row.tolist(), "ts": 1} for n, row in enumerate(rows)
    ]
    (folder / "items.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    shown = [
        {"event_id": f"{u}-{t}", "user_id": f"u{u}", "item_id": f"i{n}", "ts": 1000 * t, "kind": kind}
        for u in range(8)
        for t, n in enumerate(rng.choice(40, 15, replace=False).tolist())
        for kind in [("click" if n % 4 == u % 4 else "impression")]
    ]
    (folder / "feedback.jsonl").write_text("".join(json.dumps(line) + "\n" for line in shown))
    (folder / "gpl.toml").write_text('[generator]\nkind = "history"\n')
    done = CliRunner().invoke(
        app, ["fit", str(folder), "--out", str(folder / "fitted"), "--config", str(folder / "gpl.toml")]
    )
    assert done.exit_code == 0, done.output
    return folder


def inspect(place: Path, *arguments: str, data: Path | None = None) -> tuple[int, str]:
    options = ["--data", str(data or place), "--artefacts", str(place / "fitted"), "--config", str(place / "gpl.toml")]
    done = CliRunner().invoke(app, ["inspect", *arguments, *options])
    return done.exit_code, done.output


@pytest.mark.parametrize("arguments", [("user", "u1"), ("item", "i5"), ("sid", "0")])
def test_it_prints_and_draws(place: Path, arguments: tuple[str, str]):
    page = place / "pages" / f"{arguments[0]}.html"
    code, said = inspect(place, *arguments, "--html", str(page))
    assert code == 0, said
    assert "thing" in said
    assert page.read_text().startswith("<!doctype html>")


def test_it_takes_the_items_that_a_fit_takes(place: Path, tmp_path: Path):
    lines = (place / "items.jsonl").read_text().splitlines()
    record = json.loads(lines[3])
    lines += [
        json.dumps({**record, "text": "changed"}),
        json.dumps({**record, "item_id": "zero", "embedding": [0] * 8}),
    ]
    (tmp_path / "items.jsonl").write_text("\n".join(lines))
    (tmp_path / "feedback.jsonl").write_bytes((place / "feedback.jsonl").read_bytes())
    code, said = inspect(place, "item", "i3", data=tmp_path)
    assert code == 0 and "2 passed over" in said and "thing 3" in said and "changed" not in said


def test_a_click_after_the_time_asked_for_is_left_out(place: Path, tmp_path: Path):
    records = [
        {"event_id": f"e{n}", "user_id": "u1", "item_id": item, "ts": ts, "kind": kind, "request_id": "r"}
        for n, (item, ts, kind) in enumerate(
            [("i1", 10, "impression"), ("i2", 10, "impression"), ("i2", 15, "click"), ("i1", 40, "click"),
             ("i1", 30, "click")]
        )
    ]  # fmt: skip
    (tmp_path / "feedback.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (tmp_path / "items.jsonl").write_bytes((place / "items.jsonl").read_bytes())
    assert exposures(reader.records(tmp_path / "feedback.jsonl", Feedback, 2**20)) == [
        Event("u1", "i1", 10, True, 30),
        Event("u1", "i2", 10, True, 15),
    ]
    for until, positives in (("15", 1), ("29", 1), ("30", 2)):
        code, said = inspect(place, "user", "u1", "--until", until, data=tmp_path)
        assert code == 0 and f"{positives} positives" in said
    assert inspect(place, "user", "u1", "--until", "14", data=tmp_path)[0] == 1


def test_what_cannot_be_read_or_written_is_one_error(place: Path, tmp_path: Path):
    for name in ("items.jsonl", "feedback.jsonl", "file"):
        (tmp_path / name).write_text("")
    for data, named in (
        (tmp_path, "items.jsonl: no valid record"),
        (tmp_path / "file", f"--data {tmp_path / 'file'}: no items.jsonl there"),
        (tmp_path / "nowhere", f"--data {tmp_path / 'nowhere'}: no items.jsonl there"),
    ):
        code, said = inspect(place, "item", "i5", data=data)
        assert code == 1 and said.startswith("error: ") and named in said
    for page in (tmp_path, tmp_path / "file" / "page.html"):
        code, said = inspect(place, "item", "i5", "--html", str(page))
        assert code == 1 and said.endswith(("Is a directory\n", "File exists\n")) and f"cannot write {page}" in said


def test_a_byte_order_mark_costs_no_item_and_too_few_clicks_are_said(place: Path, tmp_path: Path):
    click = {"event_id": "e", "user_id": "u", "item_id": "i0", "ts": 1, "kind": "click"}
    for name, content in (
        ("items.jsonl", (place / "items.jsonl").read_bytes()),
        ("feedback.jsonl", json.dumps(click).encode()),
    ):
        (tmp_path / name).write_bytes(reader.BOM + content)
    code, said = inspect(place, "user", "u", data=tmp_path)
    assert code == 0 and "1 of 3 clicks (profiles.min_positives)" in said
    assert inspect(place, "item", "i0", data=tmp_path)[0] == 0


@pytest.mark.parametrize(
    ("arguments", "named"),
    [(("user", "nobody"), "nobody"), (("item", "i99"), "i99"), (("sid", "77"), "77"), (("sid", "a-b"), "CODES: 'a-b'")],
)
def test_what_is_not_there_is_named(place: Path, arguments: tuple[str, str], named: str):
    code, said = inspect(place, *arguments)
    assert code in (1, 2)
    assert named in said
    assert "Traceback" not in said
