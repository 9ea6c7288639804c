"""The directory of a demo: what is kept in it and under which name, and what a run may take away."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from streams.broker.process import BrokerError
from streams.data.reader import FILES
from streams.demo import prepare, run
from streams.demo.config import Place, install
from streams.demo.ready import DemoError, Options, get_ready
from streams.settings import CalibrationSettings, GeneratorSettings, LabelSettings, Settings


@pytest.fixture
def data(tmp_path: Path) -> Path:
    directory = tmp_path / "data"
    directory.mkdir()
    for name in FILES:
        (directory / name).write_text(f"{name}\n")
    return directory


@pytest.mark.parametrize(
    "other",
    [
        {"calibration": CalibrationSettings(kind="isotonic")},
        {"labels": LabelSettings(matching="kernel")},
        {"generator": GeneratorSettings(kind="history")},
    ],
)
def test_a_fit_is_found_again_under_what_made_it_only(data: Path, tmp_path: Path, other: dict[str, Any]) -> None:
    def place(settings: Settings) -> Path:
        return prepare.place_of_fit(tmp_path, data, 0.5, 0, settings)

    settings = Settings()
    assert place(settings) == place(settings.model_copy(update={"labels": LabelSettings(window_seconds=1)}))
    assert place(settings.model_copy(update=other)) != place(settings)


def options(out: Path, data: Path | None) -> Options:
    return Options(out, data, "auto", None, 1.0, None, None, 0.5, 0)


def tree(directory: Path) -> dict[Path, bytes | None]:
    return {path: path.read_bytes() if path.is_file() else None for path in directory.rglob("*")}


def test_a_directory_that_is_not_a_demos_is_refused_and_stays_as_it_is(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPL_CONFIG", "")  # loading sets it; put back afterwards
    own = tmp_path / "own"
    (own / "models").mkdir(parents=True)
    (own / "gpl.toml").write_text('[kafka]\nprefix = "mine."\n')
    (data / "link").symlink_to(data)
    before = tree(tmp_path)
    for out, source, said in (
        (data, data, "holds the data"),
        (data / "link", data, "holds the data"),
        (data, None, "not of an earlier demo"),
        (own, data, "not of an earlier demo"),
        (tmp_path, data, "not of an earlier demo"),
    ):
        with pytest.raises(DemoError, match=said):
            get_ready(options(out, source), lambda _: None)
    assert tree(tmp_path) == before


def test_a_new_an_empty_and_an_earlier_demos_directory_are_taken(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPL_CONFIG", "")
    (tmp_path / "empty").mkdir()
    for out in (tmp_path / "new", tmp_path / "empty", tmp_path / "new"):
        with pytest.raises(DemoError, match="no valid record"):  # of the data: further than the directory
            get_ready(options(out, data), lambda _: None)


def test_a_run_clears_what_a_demo_writes_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPL_CONFIG", "")
    settings = install(Place(tmp_path, "gpl-demo"), {}, tmp_path / "fitted-1", "127.0.0.1:1")
    assert settings.trainer.journal == tmp_path / "journal.jsonl"
    for name in ("journal.jsonl", "labels.jsonl", "items.jsonl", "fitted-1/manifest.json", "state/x", "models/x"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    run._clear(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fitted-1", "gpl.toml", "items.jsonl"]


def test_a_broker_that_does_not_answer_is_told_before_anything_is_fitted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "get_ready", lambda *_: SimpleNamespace(settings=Settings()))
    monkeypatch.setattr(run, "ensure_fitted", lambda *_: pytest.fail("it was fitted"))
    monkeypatch.setattr("streams.broker.select.serves_metadata", lambda *_: False)
    with pytest.raises(BrokerError, match=r"no Kafka broker answers at 127\.0\.0\.1:1"):
        run.run(replace(options(tmp_path, None), broker="127.0.0.1:1"), Console())
