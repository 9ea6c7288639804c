"""Options of ``gpl bench``: what cannot be is told before anything is measured."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

from streams.bench.command import app

NO_CORE = str(max(os.sched_getaffinity(0)) + 1)
NOBODY = "127.0.0.1:1"


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["serve", "--broker", "nonsense"], 1, "nonsense"),
        (["serve", "--reload-every", "0"], 2, "--reload-every"),
        (["serve", "--no-http", "--users", "20", "--calls", "20"], 2, "for --users: 20, expected at least 3 x --calls"),
        (["trainer", "--broker", "nonsense"], 1, "nonsense"),
        (["trainer", "--rates", "100,many"], 2, "--rates"),
        (["trainer", "--rates", "0"], 2, "--rates"),
        (["trainer", "--rates", "nan"], 2, "--rates"),
        (["trainer", "--items", "1000", "--candidates", "501"], 2, "--items"),
        (["freshness", "--live", "--broker", "nonsense"], 1, "nonsense"),
        (["freshness", "--write", "missing/page.md"], 2, "--write"),
        (["freshness", "--data", "no"], 1, "no/online_retail/items.csv.gz: no such file; expected a gzipped CSV with"),
        (["stream", "--broker", "nonsense"], 1, "nonsense"),
        (["stream", "--workers", "two"], 2, "--workers"),
        (["stream", "--workers", "-1"], 2, "--workers"),
        (["stream", "--store", "paper"], 2, "--store"),
        (["stream", "--cores", NO_CORE], 2, "--cores"),
        (["stream", "--cores", "first"], 2, "--cores"),
        (["anchors", "--kind", "history", "--kind", "guess"], 2, "--kind"),
        (["anchors", "--codes", "morse"], 2, "--codes"),
        (["anchors", "--data", "no"], 2, "for --data: no: no such directory; expected items.jsonl and events.csv"),
        (["codes", "--data", "no"], 2, "for --data: no: no such directory; expected items.jsonl and events.csv"),
        (["codes", "--data", "."], 2, "; expected items.jsonl and events.csv, as `gpl datasets convert` writes them"),
        (["codes", "--kind", "morse"], 2, "--kind"),
        (["generator", "--model", "small-lm", "--model", "gpt"], 2, "--model"),
        (["generator", "--precision", "half"], 2, "--precision"),
        (["generator", "--device", "abacus"], 2, "for --device: device: 'abacus', not usable here"),
    ],
)
def test_an_option_that_cannot_be_is_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], code: int, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner(env={"COLUMNS": "200"}).invoke(app, arguments)
    assert (done.exit_code, said in done.output) == (code, True), done.output
    assert done.exception is None or isinstance(done.exception, SystemExit)
    assert list(tmp_path.iterdir()) == []


def test_a_broker_of_somebody_else_is_asked_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["stream", "--broker", NOBODY])
    assert done.exit_code == 1 and f"no Kafka broker answers at {NOBODY}" in done.output
    assert list(tmp_path.iterdir()) == []
