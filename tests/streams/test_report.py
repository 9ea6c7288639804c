"""From records of the output topics and the trainer's journal to the report."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from streams import contracts
from streams.contracts import encode
from streams.demo import figures, report, summary
from streams.demo.follow import Recorder
from streams.demo.summary import Run, Series, quantiles


@dataclass
class Record:
    """The fields of a kafka ConsumerRecord that are read."""

    value: bytes | None
    key: bytes | None = None
    headers: list = field(default_factory=list)
    timestamp: int = 5_000


def label(request="r1", revision=0, exposed=("a",), unexposed=("b", "c"), user="u", correction=None):
    return contracts.Label(
        request_id=request,
        revision=revision,
        user_id=user,
        ts=1_000,
        outcome="labelled" if unexposed else "no_anchors",
        exposed=contracts.Exposed(list(exposed), [1] * len(exposed), [0.5 if unexposed else None] * len(exposed)),
        unexposed=contracts.Unexposed(
            list(unexposed), [0.1] * len(unexposed), [0.4] * len(unexposed), [0.9] * len(unexposed)
        ),
        provenance=contracts.Provenance((0, 1), [2], 3, 0, 900, 1, "enc", "quant", "gen", "cal", "config", correction),
    )


def closed(record, ms):
    return Record(encode(record), headers=[("gpl-closed-at", str(ms).encode())])


@pytest.fixture
def recorder(tmp_path):
    recorder = Recorder(tmp_path, "run.", clock=iter(range(100)).__next__)
    yield recorder
    recorder.close()


def test_labels_are_counted_once_whatever_is_delivered_twice(recorder):
    take = recorder.handlers["labels"]
    take(closed(label(), 4_000))
    take(closed(label(), 4_000))
    take(closed(label("r2", exposed=(), unexposed=()), 4_800))
    take(closed(label("r1", 1, ("a", "b"), ("c",), correction="feedback"), 4_900))
    outcome = recorder.outcome
    assert outcome.requests == {"r1": (1, "labelled", 1), "r2": (0, "no_anchors", 0)}
    assert outcome.unexposed_labelled == 1
    assert outcome.requests_by_outcome() == {"labelled": 1, "no_anchors": 1}
    assert outcome.corrections == {"feedback": 1}
    assert outcome.delays == [1.0, 0.2]
    assert outcome.first_label.request_id == "r1"
    assert outcome.scores.unexposed.sum() == 2 and outcome.scores.clicked.sum() == 1
    assert outcome.answered(frozenset({"r1", "r2", "r3"})) == 2


def test_refreshes_are_counted_by_the_reason_of_their_request_in_either_order(recorder):
    def request(user, sequence, reason):
        recorder.handlers["anchor-requests"](Record(encode(contracts.AnchorRequest(user, 1, sequence, reason, ["a"]))))

    def anchors(user, version):
        empty = contracts.UserAnchors(user, 1, version, [], [], b"", [], [], "g", "q", "e")
        recorder.handlers["user-anchors"](Record(encode(empty)))

    request("u", 1, "cold")
    anchors("u", 1)
    anchors("v", 1)
    anchors("v", 1)
    request("v", 1, "cold")
    request("u", 2, "drift")
    assert recorder.outcome.anchors_by_reason() == {"cold": 2}
    anchors("u", 2)
    assert recorder.outcome.anchors_by_reason() == {"cold": 2, "drift": 1}


def test_dead_letters_tell_which_items_and_requests_will_never_come(recorder, tmp_path):
    take = recorder.handlers["dead-letters"]
    recall = encode(contracts.Recall("r9", "u", 1, ["a"]))
    take(Record(recall, b"u", [("gpl-topic", b"run.recalls"), ("gpl-reason", b"future")]))
    take(Record(b'{"item_id"', b"i7", [("gpl-topic", b"run.items"), ("gpl-reason", b"malformed")]))
    take(Record(b"\xff", None, [("gpl-topic", b"run.recalls"), ("gpl-reason", b"malformed")]))
    outcome = recorder.outcome
    assert outcome.dead_letters == {("recalls", "future"): 1, ("recalls", "malformed"): 1, ("items", "malformed"): 1}
    assert outcome.dead_requests == {"r9"}
    assert outcome.dead_items == {"i7"}
    recorder.close()
    kept = [json.loads(line) for line in (tmp_path / "dead-letters.jsonl").read_text().splitlines()]
    assert [letter["key"] for letter in kept] == ["u", "i7", None]


def test_records_are_kept_as_on_the_topics(recorder, tmp_path):
    recorder.handlers["labels"](closed(label(), 4_000))
    recorder.close()
    assert (tmp_path / "labels.jsonl").read_bytes() == encode(label()) + b"\n"


def rank(user, gpl, exposed, tail=False):
    common = {"request_id": "r", "user_id": user, "ts": 1, "item": "i", "n": 500}
    return {"kind": "rank", **common, "tail": tail, "rank": {"gpl": gpl, "exposed": exposed}}


def score(user, clicked, gpl, exposed):
    common = {"request_id": "r", "user_id": user, "ts": 1, "item": "i"}
    return {"kind": "score", **common, "clicked": clicked, "score": {"gpl": gpl, "exposed": exposed}}


@pytest.fixture
def journal(tmp_path):
    def write(lines):
        path = tmp_path / "journal.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return path

    return write


def test_hit_rates_and_their_difference_are_of_the_same_clicks(journal):
    ranks = [rank("u", 1, 11), rank("u", 10, 10, tail=True), rank("v", 11, 3), rank("w", 2, 400)]
    evaluation = figures.read(journal([score("u", 1, 1, 0), *ranks]))
    hits = figures.hit_rates(evaluation)
    assert hits["all"]["clicks"] == 4 and hits["all"]["users"] == 3
    assert hits["all"]["gpl"][0] == 0.75
    assert hits["all"]["exposed_only"][0] == 0.5
    assert hits["all"]["difference"][0] == 0.25
    assert hits["all"]["difference"][1] <= 0.25 <= hits["all"]["difference"][2]
    assert hits["tail"]["gpl"] == [1.0, None, None]  # one user: nothing to resample
    assert figures.hit_rates(evaluation) == hits


def test_progressive_figures_of_a_known_ranking(journal):
    lines = [score("u", 1, 2.0, -1.0), score("u", 0, 1.0, 0.0), score("v", 1, 0.5, 3.0), score("v", 0, 0.0, 4.0)]
    evaluation = figures.read(journal(lines))
    result = figures.progressive(evaluation)
    assert result["gpl"]["auc"] == 0.75 and result["gpl"]["gauc"] == 1.0
    assert result["exposed_only"]["gauc"] == 0.0


def test_without_a_shadow_or_a_journal_what_is_not_known_is_null(journal, tmp_path):
    only = rank("u", 1, 1)
    del only["rank"]["exposed"]
    alone = score("u", 1, 1.0, 0.0)
    del alone["score"]["exposed"]
    hits = figures.hit_rates(figures.read(journal([alone, only])))
    assert hits["all"]["gpl"][0] == 1.0
    assert hits["all"]["exposed_only"] is None and hits["all"]["difference"] is None
    nothing = figures.read(tmp_path / "none.jsonl")
    assert figures.progressive(nothing) == {}
    assert figures.hit_rates(nothing)["all"]["gpl"] is None


def run(**changes):
    known = {
        "source": "a <source>",
        "simulated": True,
        "started_at": "2026-01-01T00:00:00+00:00",
        "broker": "Apache Kafka 4.1.0",
        "broker_reason": "the best that is present",
        "sent": {"items": 3, "recalls": 2, "feedback": 40},
        "refused": {"items": 0, "recalls": 0, "feedback": 0},
        "items": 3,
        "requests": 2,
        "speed": 1e5,
        "window_seconds": 86_400.0,
        "train_fraction": 0.5,
        "versions": {"encoder": "e", "quantiser": "q", "generator": "g"},
        "seconds": {
            "prepare": 0.1,
            "first_label": 9.5,
            "first_pseudo_label": None,
            "stream": 20.0,
            "held_back": 0.0,
            "total": 31.0,
        },
        "peak_memory_mib": None,
        "series": Series([0.0, 1.0], [0, 42], [0, 2], [0, 3], [0.0, 0.0]),
    }
    return Run(**{**known, **changes})


def big_journal():
    rng = np.random.default_rng(0)
    lines = []
    for n in range(1200):
        user, clicked = f"u{n % 40}", int(rng.random() < 0.5)
        lines.append(score(user, clicked, float(rng.normal(clicked)), float(rng.normal(0.5 * clicked))))
        if clicked:
            lines.append(rank(user, int(rng.integers(1, 60)), int(rng.integers(1, 100)), bool(n % 3)))
    return lines


def test_the_report_holds_what_is_documented_and_nothing_from_elsewhere(recorder, journal, tmp_path):
    recorder.handlers["labels"](closed(label(), 4_000))
    update = contracts.ModelUpdate("preranker", "v1", "file:///x", "c", {"0": 1}, 1, {"model_age_seconds": 2.5})
    recorder.handlers["model-updates"](Record(encode(update)))
    recorder.handlers["calibrations"](Record(encode(contracts.Calibration("c1", 0, "platt", 3.0, -1.0, 10))))
    evaluation = figures.read(journal(big_journal()))
    document = report.write(tmp_path, run(), recorder.outcome, evaluation)
    assert json.loads((tmp_path / "report.json").read_text()) == document
    assert document["events"] == 42
    assert document["requests_closed"] == 1
    assert document["unexposed_labelled"] == 2
    assert document["label_delay_seconds"] == {"p50": 1.0, "p95": 1.0, "p99": 1.0, "count": 1}
    assert document["models_published"] == 1
    assert document["model_age_seconds"] == {"p50": 2.5, "max": 2.5, "last": 2.5}
    page = (tmp_path / "report.html").read_text()
    assert "a &lt;source&gt;" in page and "<source>" not in page
    assert page.count("data:image/png;base64,") == 8
    assert "http://" not in page and "https://" not in page


def test_every_key_of_the_report_is_documented(recorder, tmp_path):
    document = summary.build(run(), recorder.outcome, figures.read(tmp_path / "none.jsonl"))
    text = (Path(__file__).parents[2] / "docs" / "report.md").read_text()
    assert [key for key in document if f"`{key}`" not in text] == []


def test_a_run_that_came_to_nothing_still_has_a_report(recorder, tmp_path):
    document = report.write(tmp_path, run(), recorder.outcome, figures.read(tmp_path / "none.jsonl"))
    assert document["label_delay_seconds"] == {"p50": None, "p95": None, "p99": None, "count": 0}
    assert document["hr10"]["all"]["gpl"] is None


def test_the_table_says_the_main_figures(recorder, journal, tmp_path):
    recorder.handlers["labels"](closed(label(), 4_000))
    document = summary.build(run(), recorder.outcome, figures.read(journal(big_journal())))
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(report.table(document))
    text = console.export_text()
    estimate = document["hr10"]["all"]["difference"][0]
    assert f"{estimate:+.3f}" in text
    assert "1 of 2 (1 labelled)" in text


def test_quantiles_of_known_values():
    assert quantiles([float(n) for n in range(101)]) == {"p50": 50.0, "p95": 95.0, "p99": 99.0, "count": 101}
