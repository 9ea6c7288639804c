"""Figures of ``gpl bench stream``: which labels count, which are missing, and what its processes begin with."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from streams.bench import worker
from streams.bench.stream import CLOSES_AFTER_MS, Labelled, Sent, _by_minute, delays, due
from streams.broker.process import Child
from streams.demo.processes import Part, ProcessEndedError, without_settings

T = 1_700_000_000_000


def test_a_request_is_due_when_a_later_one_of_its_partition_closes_it() -> None:
    sent = [
        Sent("closed", 0, T),
        Sent("just not", 0, T + 1),
        Sent("alone", 1, T),
        Sent("closes", 0, T + CLOSES_AFTER_MS),
    ]
    assert due(sent) == {"closed": T}


def test_delays_are_those_of_requests_that_a_record_closed() -> None:
    closed = T + CLOSES_AFTER_MS
    expected = {"prompt": T, "late": T, "missing": T, "idle": T}
    labelled = {
        "prompt": Labelled(closed, closed + 20),
        # Appended long after the last request was sent: what an overloaded worker does must be in the figures.
        "late": Labelled(closed + 5, closed + 90_005),
        "idle": Labelled(closed - 1, closed),
        "not expected": Labelled(closed, closed + 1),
    }
    assert delays(expected, labelled).tolist() == [[closed, 20], [closed + 5, 90_000]]
    assert delays({}, labelled).shape == (0, 2)


def test_a_delay_belongs_to_the_minute_in_which_its_request_closed() -> None:
    found = np.array([[T + 59_999, 200_000.0], [T + 60_000, 10.0], [T + 61_000, 30.0]])
    assert [(minute, p50) for minute, p50, _ in _by_minute(found, T)] == [(0, 200_000.0), (1, 20.0)]


def test_a_child_has_the_settings_it_is_given_and_none_of_this_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPL_LABELS__WINDOW_SECONDS", "1")
    monkeypatch.setenv("gpl_labels__matching", "kernel")
    monkeypatch.setenv("OTHER", "kept")
    log = tmp_path / "log"
    script = "import json, os; print(json.dumps(dict(os.environ)))"
    env = without_settings() | {"GPL_CONFIG": "own.toml"}
    child = Child([sys.executable, "-c", script], tmp_path, log, detached=False, env=env)
    assert child.wait(30)
    child.close()
    found = json.loads(log.read_text())
    assert {name: value for name, value in found.items() if name.upper().startswith("GPL_")} == {
        "GPL_CONFIG": "own.toml"
    }
    assert found["OTHER"] == "kept"


def test_a_worker_that_does_not_answer_is_no_worker_that_did_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "_PATIENCE", 0.2)
    silent = Part("silent", [], tmp_path / "silent.log", ["sh", "-c", "exec sleep 60"])
    try:
        with pytest.raises(TimeoutError, match="silent"):
            worker.read(silent)
    finally:
        silent.stop(5)
    with pytest.raises(ProcessEndedError, match="silent"):
        worker.read(silent)
