from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from typer.testing import CliRunner, Result

from gpl.artefacts import Artefacts
from gpl.labels.calibration import NoCalibration, Platt
from streams import calibrations, cli
from streams.contracts import Calibration, Exposed, Label, Provenance, Recall, Unexposed, decode, encode
from streams.kafka import producer
from streams.log_view import LogView
from streams.settings import KafkaSettings, load
from streams.topics import full_name
from streams.views import CalibrationView
from tests.crash.site import make_artefacts
from tests.integration.pipeline import kafka_section

FITTED = Platt(2.5, -1.0, 100)


def on_topic(kafka: KafkaSettings) -> list[Calibration]:
    records: list[Any] = []
    view = LogView(kafka, {calibrations.TOPIC: records.append})
    view.warm_up()
    view.close()
    return [decode(Calibration, record.value) for record in records]


def test_a_topic_without_a_calibration_gets_the_fitted_one_and_another_keeps_its_own(kafka_settings: KafkaSettings):
    calibrations.publish_first(kafka_settings, FITTED)
    first = on_topic(kafka_settings)
    assert [(record.kind, record.ts, record.slope) for record in first] == [("platt", 0, 2.5)]
    calibrations.publish_first(kafka_settings, NoCalibration())
    assert on_topic(kafka_settings) == first
    later = calibrations.publish(kafka_settings, NoCalibration(), 5_000)
    assert on_topic(kafka_settings) == [*first, later]
    view = CalibrationView()
    log = LogView(kafka_settings, {calibrations.TOPIC: view})
    log.warm_up()
    log.close()
    assert view.at(4_999) == first[0] and view.at(5_000) == later


START, REQUESTS = 1_700_000_000_000, 400
TRUTH = Platt(4.0, -2.0)


Source = tuple[str, str, str, str]


def label(source: Source, n: int, clicked: list[int], score: list[float | None], revision: int = 0) -> Label:
    encoder, quantiser, generator, config = source
    return Label(
        request_id=f"r{n}",
        revision=revision,
        user_id=f"u{n % 100}",
        ts=START + n * 1000,
        outcome="labelled" if score[0] is not None else "no_anchors",
        exposed=Exposed([f"i{i}" for i in range(len(clicked))], clicked, score),
        unexposed=Unexposed([], [], [], []),
        provenance=Provenance((0, n), [], 5, 0, None, None, encoder, quantiser, generator, None, config, None),
    )


def some_labels(now: Source) -> list[Label]:
    """Clicks by ``TRUTH``, known with the second revision. The first hundred, and the newest: another generator's,
    turned round."""
    rng, made = np.random.default_rng(5), []
    for n in range(REQUESTS):
        score = rng.uniform(-1, 1, 5).astype(np.float32)
        clicked = (rng.uniform(size=5) < TRUTH.apply(score)).astype(int)
        scores = score.astype(float).tolist()
        if n < 100 or n == REQUESTS - 1:
            made.append(label((*now[:2], "before", now[3]), n, (1 - clicked).tolist(), scores))
            continue
        made.append(label(now, n, [0] * 5, scores))
        made.append(label(now, n, clicked.tolist(), scores, revision=1))
    return [*made, label(now, REQUESTS, [1, 1], [None, None])]


def figures(output: str) -> dict[str, tuple[float, float]]:
    """Log loss and ECE of a comparison, by row."""
    rows = [line.split() for line in output.splitlines() if line.strip().startswith(("in force", "fitted  "))]
    return {row[0]: (float(row[-2]), float(row[-1])) for row in rows}


def test_a_running_system_is_calibrated_anew_from_its_labels(kafka_settings: KafkaSettings, tmp_path: Path):
    make_artefacts(tmp_path / "artefacts")
    config = tmp_path / "gpl.toml"
    config.write_text(f"""\
artefacts = "{tmp_path}/artefacts"
{kafka_section(kafka_settings)}""")

    def gpl(*arguments: str) -> Result:
        return CliRunner().invoke(cli.app, ["calibrate", *arguments, "--config", str(config)])

    made = Artefacts.load(tmp_path / "artefacts", with_generator=False)
    source = (made.space.version, made.quantiser.version, made.generator.version, load(config).fingerprint())
    calibrations.publish_first(kafka_settings, FITTED)
    newest = START + (REQUESTS + 5) * 1000
    with producer(kafka_settings) as out:
        for record in some_labels(source):
            out.send(full_name(kafka_settings, "labels"), key=record.user_id.encode(), value=encode(record))
        out.send(full_name(kafka_settings, "labels"), key=b"u1", value=b"no label")
        # What has been asked for already keeps its calibration.
        recall = Recall("open", "u1", newest, ["i1"])
        out.send(full_name(kafka_settings, "recalls"), key=b"u1", value=encode(recall))

    shown = gpl()
    assert shown.exit_code == 0, (shown.output, shown.exception)
    assert "299 requests" in shown.output and "101 of another space, generator or configuration" in shown.output
    assert "--publish" in shown.output and len(on_topic(kafka_settings)) == 1
    compared = figures(shown.output)
    assert compared["fitted"][0] < compared["in"][0] and compared["fitted"][1] < compared["in"][1]

    assert gpl("--publish", "--last", "400s").exit_code == 0
    first, refitted = on_topic(kafka_settings)
    assert (refitted.kind, refitted.ts) == ("platt", newest + 1)
    assert abs(refitted.slope - TRUTH.slope) < 1 and abs(refitted.intercept - TRUTH.intercept) < 0.5
    assert calibrations.in_force(kafka_settings, newest) == first
    assert calibrations.in_force(kafka_settings, newest + 1) == refitted
    again = gpl("--publish", "--last", "400s")
    assert figures(again.output)["in"] == figures(again.output)["fitted"]
    assert "in force already" in again.output and on_topic(kafka_settings) == [first, refitted]

    # Clicks follow a sigmoid: on other users steps do worse than the one in force. `none` is the operator's word.
    worse = gpl("--publish", "--method", "isotonic")
    assert figures(worse.output)["fitted"][0] > figures(worse.output)["in"][0]
    assert worse.exit_code == 1 and "error: nothing was published" in worse.output
    assert on_topic(kafka_settings) == [first, refitted]
    assert gpl("--publish", "--method", "none").exit_code == 0
    assert on_topic(kafka_settings)[-1].kind == "none"
    assert gpl("--publish", "--method", "isotonic").exit_code == 0
    assert on_topic(kafka_settings)[-1].kind == "isotonic"
    for arguments, why in (
        (("--last", "30s", "--publish"), "at least 50 and 5 are needed"),
        (("--last", "3s"), "recalls of the range: 1, labels: 0, exposed items with a score: 0; windows may be open"),
        (("--last", "5s"), "recalls of the range: 1, labels: 1, exposed items with a score: 0; windows may be open"),
    ):
        refused = gpl(*arguments)
        assert refused.exit_code == 1 and refused.output.startswith("error: ") and why in refused.output
        assert refused.output.count("\n") == 1
    assert len(on_topic(kafka_settings)) == 4
