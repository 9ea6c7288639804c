"""A study from a directory to its page: resumed, not repeated; computed anew when what it depends on changes."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from collections.abc import Iterator
from concurrent.futures import Future, as_completed
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from gpl.evaluation import neutral, report, study
from gpl.evaluation.methods import BY_NAME, Method
from gpl.evaluation.sources import open_dataset
from gpl.evaluation.study import StudyConfig, run
from gpl.evaluation.summary import summarise
from gpl.evaluation.training import TrainConfig
from gpl.evaluation.upstream import UpstreamConfig
from streams.cli import app
from tests.gpl.evaluation import planted

METHODS = ("popularity", "anchor-history", "exposed-score", "no-labels", "gpl", "lambda-1", "shuffled", "shuffled-0")
QUICK = ("popularity", "anchor-history")


@pytest.fixture
def config(tmp_path: Path) -> StudyConfig:
    neutral.save(planted.full(60), tmp_path / "planted", "test")
    return StudyConfig(
        (str(tmp_path / "planted"),),
        QUICK,
        tmp_path / "cache",
        seeds=(0, 1),
        train=TrainConfig(dim=8, epochs=1),
        upstream=UpstreamConfig(pages=2, recalled=15),
    )


def test_what_is_computed_is_kept_and_what_changed_is_computed_anew(config: StudyConfig) -> None:
    said: list[str] = []
    first = run(config, said.append)[0]
    assert sum("HR@10" in line for line in said) == len(QUICK) * 2
    said.clear()
    again = run(config, said.append)[0]
    assert not any("HR@10" in line for line in said)
    for name in QUICK:
        assert np.array_equal(
            first.methods[name].per_user["hr@10"], again.methods[name].per_user["hr@10"], equal_nan=True
        )
    run(replace(config, seeds=(0, 1, 2)), said.append)
    assert sum("seed 2" in line for line in said) == len(QUICK)
    said.clear()
    for other in (replace(config, upstream=UpstreamConfig(pages=3, recalled=15)), replace(config, dim=3)):
        said.clear()
        run(other, said.append)
        assert sum("HR@10" in line for line in said) == len(QUICK) * 2


def test_processes_compute_what_one_does(config: StudyConfig, tmp_path: Path) -> None:
    alone = run(config, lambda _: None)[0]
    together = run(replace(config, jobs=2, cache=tmp_path / "other"), lambda _: None)[0]
    for name in QUICK:
        for metric, values in alone.methods[name].per_user.items():
            assert np.array_equal(values, together.methods[name].per_user[metric], equal_nan=True)


def test_settings_are_chosen_by_the_mean_over_the_tuning_seeds(
    config: StudyConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Validation hits are made up: each regularisation is best for one seed, and another for their mean."""
    hits = {
        100.0: {0: 0.9, 1: 0.0, 2: 0.2},
        10.0: {0: 0.0, 1: 0.0, 2: 0.0},
        30.0: {0: 0.1, 1: 0.9, 2: 0.0},
        300.0: {0: 0.6, 1: 0.6, 2: 0.3},
        1000.0: {0: 0.0, 1: 0.0, 2: 0.9},
        3000.0: {0: 0.0, 1: 0.0, 2: 0.0},
    }
    asked: list[int] = []

    def made_up(work: study._Work, method: Method, settings: dict[str, float]) -> float:
        asked.append(work.seed)
        return hits[settings["regularisation"]][work.seed]

    monkeypatch.setattr(study._Work, "validated", made_up)
    config = replace(config, methods=("ease",), seeds=(0, 1, 2))
    for tuning, expected in ((1, 100.0), (2, 300.0), (3, 300.0)):
        asked.clear()
        (found,) = run(replace(config, tuning=tuning), lambda _: None)
        assert found.methods["ease"].settings == {"regularisation": expected}
        assert set(asked) == set(range(tuning))
    with pytest.raises(ValueError, match="tuning: 0, expected at least 1"):
        run(replace(config, tuning=0), print)


def test_keys_are_of_all_sources_that_a_figure_comes_from(config: StudyConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, set[str]] = {}
    work = study._Work(config, config.datasets[0], 0)
    for name in ("popularity", "exposed", "distillation", "gpl"):
        monkeypatch.setattr(study, "code_digest", lambda *parts, name=name: str(asked.setdefault(name, set(parts))))
        work._common(BY_NAME[name])
    judged = {f"evaluation/{m}.py" for m in ("metrics", "judge", "upstream", "world", "bench", "embed")} | {"fit.py"}
    trained = {f"preranker/{m}.py" for m in ("learner", "effects", "loss", "model", "batch")} | {"labels/labeller.py"}
    for files in asked.values():
        assert judged <= files and "codes/__init__.py" in files
        assert not files & {"evaluation/report.py", "evaluation/methods.py", "evaluation/study.py", "inspect/page.py"}
    assert trained | {"evaluation/ranker.py"} <= asked["distillation"] and trained <= asked["exposed"]
    assert trained | {"labels/evidence.py", "evaluation/reliability.py"} <= asked["gpl"]
    assert "evaluation/baselines.py" not in asked["gpl"] | asked["popularity"]


def test_unknown_methods_and_an_extra_truth_are_errors(config: StudyConfig) -> None:
    with pytest.raises(ValueError, match="method 'magic' is unknown"):
        run(replace(config, methods=("magic",)), print)
    with pytest.raises(ValueError, match="--truth belongs to one data set"):
        run(replace(config, datasets=(*config.datasets, "ml-100k-time"), truth=Path("t.csv")), print)


def test_the_command_writes_tables_plots_and_the_page(config: StudyConfig, tmp_path: Path) -> None:
    out, page = tmp_path / "out", tmp_path / "docs" / "results.md"
    page.parent.mkdir()
    arguments = ["evaluate", config.datasets[0], "--methods", ",".join(METHODS), "--seeds", "2", "--epochs", "1"]
    result = CliRunner().invoke(app, [*arguments, "--out", str(out), "--write", str(page)])
    assert result.exit_code == 0, result.output
    summary = json.loads((out / "results.json").read_text())
    (one,) = summary["sets"]
    assert list(one["methods"]) == list(METHODS) and set(one["gpl_against"]) == set(METHODS) - {"gpl"}
    for name in ("bars.png", "popularity.png"):
        assert (out / name).stat().st_size > 5_000
    text = page.read_text()
    assert text == report.markdown(summary, [p.relative_to(page.parent).as_posix() for p in written(page)])
    for method in one["methods"].values():
        estimate, low, high = method["metrics"]["hr@10"]
        assert low <= estimate <= high and f"{estimate:.3f}" in text
    for target in one["targets"]:
        assert target["what"] in text


def written(page: Path) -> list[Path]:
    """Plots beside the page, in the order in which they are drawn."""
    order = ("bars.png", "popularity.png", "reliability.png")
    return [page.parent / page.stem / name for name in order if (page.parent / page.stem / name).is_file()]


def test_a_target_is_met_only_with_its_interval_above_zero(config: StudyConfig) -> None:
    results = run(replace(config, methods=("anchor-history", "exposed-score", "gpl")), lambda _: None)
    (found,) = results
    rival, subject = found.methods["anchor-history"], found.methods["gpl"]
    users = rival.per_user["hr@10"].shape
    rng = np.random.default_rng(0)
    base = rng.random(users)
    for gain, noise, met in ((0.10, 0.01, True), (0.10, 5.0, False), (0.02, 0.01, False)):
        rival.per_user["hr@10"][:] = base
        subject.per_user["hr@10"][:] = base * (1 + gain) + noise * rng.normal(size=users)
        if noise > 1:  # the gain is there on average, but not beyond the noise
            subject.per_user["hr@10"][:] += base.mean() * (1 + gain) - subject.per_user["hr@10"].mean()
        (one,) = summarise(config, results)["sets"]
        target = next(t for t in one["targets"] if t["what"] == "hr@10 against best anchor score alone")
        assert target["met"] is met, (gain, noise, target)


def test_harm_needs_somebody_to_hit_something(config: StudyConfig) -> None:
    results = run(replace(config, methods=("no-labels", "gpl")), lambda _: None)
    (found,) = results
    plain, subject = found.methods["no-labels"].per_user["tail_hr@10"], found.methods["gpl"].per_user["tail_hr@10"]
    for before, after, met in ((0.0, 0.0, True), (0.2, 0.1, False), (0.0, 0.1, True)):
        plain[:], subject[:] = before, after
        (one,) = summarise(config, results)["sets"]
        target = next(t for t in one["targets"] if t["what"].startswith("no harm: tail"))
        assert target["met"] is met, (before, after, target)


def test_convert_and_its_errors(tmp_path: Path) -> None:
    (tmp_path / "jokes.csv").write_text("joke,text\nj1,a\nj2,b\n")
    (tmp_path / "ratings.csv").write_text("user,joke,rating\nu1,j1,9\nu1,j2,1\n")
    runner = CliRunner()
    result = runner.invoke(app, ["datasets", "convert", "jester", str(tmp_path), str(tmp_path / "out")])
    assert result.exit_code == 0 and "1 users, 2 items" in result.output
    assert neutral.load(tmp_path / "out").kind == "full"
    again = runner.invoke(app, ["datasets", "convert", "jester", str(tmp_path), str(tmp_path / "out")])
    assert again.exit_code == 1 and "not empty" in again.output
    assert runner.invoke(app, ["datasets", "convert", "nothing", str(tmp_path), "x"]).exit_code == 2
    missing = runner.invoke(app, ["evaluate", str(tmp_path / "none"), "--out", str(tmp_path / "runs")])
    assert missing.exit_code == 1 and "neither a directory nor a built-in set" in missing.output


def test_data_is_always_a_directory_and_a_built_in_set_takes_no_truth(
    config: StudyConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(config.datasets[0]).rename("ml-100k-time")
    assert open_dataset(Path("ml-100k-time")).name == "planted"
    arguments = ["evaluate", "--seeds", "1", "--methods", " popularity, ease ", "--out", "out"]
    done = CliRunner().invoke(app, [*arguments, "--data", "ml-100k-time"])
    assert done.exit_code == 0 and "planted (full)" in done.output
    assert json.loads(Path("out/results.json").read_text())["settings"]["datasets"] == ["ml-100k-time"]
    refused = CliRunner().invoke(app, [*arguments, "ml-100k-time", "--truth", "nope.csv"])
    assert refused.exit_code == 1 and "ml-100k-time: a built-in set has its own truth, nope.csv" in refused.output
    missing = CliRunner().invoke(app, [*arguments, "--data", "ml-100k-completed"])
    assert missing.exit_code == 1 and "ml-100k-completed: no such directory" in missing.output


@pytest.mark.filterwarnings("error")
def test_a_log_without_impressions_and_plots_without_a_curve(config: StudyConfig, tmp_path: Path) -> None:
    """Users have a past and recalls, but nothing was shown."""
    data, out, rng = tmp_path / "log", tmp_path / "out", np.random.default_rng(0)
    data.mkdir()
    items = [{"item_id": f"i{n}", "embedding": rng.normal(size=4).tolist()} for n in range(20)]
    recalls = [
        {"request_id": f"r{u}", "user_id": f"u{u}", "ts": u, "candidates": [f"i{n}" for n in range(8)]}
        for u in range(24)
    ]
    for name, rows in (("items", items), ("recalls", recalls), ("feedback", [])):
        (data / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = [(f"u{u}", f"i{n}", n % 2) for u in range(24) for n in rng.choice(20, 6, replace=False).tolist()]
    (data / "truth.csv").write_text("user,item,relevance\n" + "".join(f"{u},{i},{r}\n" for u, i, r in pairs))
    (data / "events.csv").write_text("user,item,order\n" + "".join(f"u{u},i{u % 20},{u}\n" for u in range(24)))

    def study(methods: str) -> dict[str, object]:
        arguments = ["evaluate", "--data", str(data), "--methods", methods, "--seeds", "1", "--out", str(out)]
        done = CliRunner().invoke(app, [*arguments, "--write", str(out / "page.md")])
        assert done.exit_code == 0, done.output
        (one,) = json.loads((out / "results.json").read_text(), parse_constant=pytest.fail)["sets"]
        return dict(one["facts"])

    assert study("popularity,ease")["click_rate"] is None
    assert "0 impressions (none clicked)" in (out / "page.md").read_text()
    assert (out / "popularity.png").is_file()
    study("ease")
    assert not (out / "popularity.png").exists() and (out / "bars.png").is_file()


@pytest.mark.parametrize(
    ("option", "target", "named"),
    [
        ("--out", "taken", "taken"),
        ("--out", "taken/below", "taken/below"),
        ("--out", "folder", "folder/results.json"),
        ("--write", "folder", "folder"),
        ("--write", "taken/below.md", "taken"),
        ("--write", "taken.md", "taken"),  # where its plots would be
    ],
)
def test_what_cannot_be_written_is_said_before_the_study(
    config: StudyConfig, tmp_path: Path, option: str, target: str, named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study, "run", lambda *_: pytest.fail("the study began"))
    (tmp_path / "taken").write_text("")
    (tmp_path / "folder" / "results.json").mkdir(parents=True)
    arguments = ["evaluate", str(config.datasets[0]), "--out", str(tmp_path / "out"), option, str(tmp_path / target)]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 1 and isinstance(done.exception, SystemExit)
    assert done.output.startswith(f"error: {option}: cannot write {tmp_path / named}: ")


def test_a_page_without_a_suffix_leaves_its_name_to_itself(config: StudyConfig, tmp_path: Path) -> None:
    arguments = ["evaluate", str(config.datasets[0]), "--methods", "popularity", "--seeds", "1"]
    done = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "out"), "--write", str(tmp_path / "page")])
    assert done.exit_code == 0, done.output
    assert "(page-plots/bars.png)" in (tmp_path / "page").read_text()
    assert (tmp_path / "page-plots" / "bars.png").is_file()


@pytest.mark.parametrize(("name", "file"), [("../../es\0c", ".._.._es_c"), ("ü" * 200, "ü" * 75), ("my set.v2", None)])
def test_any_name_of_a_set_has_its_files_in_the_cache(config: StudyConfig, name: str, file: str | None) -> None:
    (Path(config.datasets[0]) / "dataset.json").write_text(json.dumps({"name": name, "unlisted": "irrelevant"}))
    config = replace(config, methods=("anchor-history", "ease"), seeds=(0,))
    (found,) = run(config, lambda _: None)
    assert found.name == name
    kept = [path for path in config.cache.parent.rglob("*") if path.suffix in (".npz", ".json") and "ease" in path.name]
    assert sorted(path.parent.name for path in kept) == ["results", "settings"]
    assert all(path.name.startswith(f"{file or name}-") for path in [*kept, *(config.cache / "anchors").iterdir()])


def test_an_interrupt_ends_the_workers_without_a_word(
    config: StudyConfig, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C reaches all processes of the terminal, workers that start and those that compute."""

    def interrupt() -> None:
        workers = multiprocessing.active_children()
        assert len(workers) == 2
        for worker in workers:
            os.kill(worker.pid or 0, signal.SIGINT)

    def waited(futures: list[Future[list[str]]]) -> Iterator[Future[list[str]]]:
        interrupt()
        return as_completed(futures)

    monkeypatch.setattr(study, "as_completed", waited)
    tasks = [(config.datasets[0], seed) for seed in range(30)]
    lines = study._computed(replace(config, methods=("popularity",), jobs=2), tasks)
    assert "HR@10" in next(lines)
    interrupt()
    with pytest.raises(KeyboardInterrupt):
        lines.throw(KeyboardInterrupt)
    assert not multiprocessing.active_children()
    assert "Traceback" not in capfd.readouterr().err
    assert len(list((config.cache / "results").iterdir())) < len(tasks)
