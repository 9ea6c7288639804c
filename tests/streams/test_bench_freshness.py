"""The freshness study: what serves at a time was trained on what was labelled by then, and its figures are right."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from gpl.artefacts import Artefacts
from gpl.catalogue import ItemContent
from gpl.evaluation.metrics import auc
from gpl.fit import Event as PastEvent
from gpl.fit import FitOptions, fit
from gpl.labels import labeller
from gpl.preranker.ids import IdTable
from gpl.preranker.model import PreRanker
from streams.bench.freshness import ARMS, DRIFT, HOUR, POLICIES, Run, Study, _Pairs, _Ranked, fingerprint, page, study
from streams.bench.live import Plan, Stages
from streams.bench.sync import ANCHORS, MINUTE, Outcomes, run
from streams.bench.timed import TimedStream
from streams.contracts import Feedback, Item, Label, Recall
from streams.demo.upstream import Rating
from streams.fitting import catalogue_of
from streams.frame import Frame
from streams.history.pipeline import Pipeline, in_event_time
from streams.settings import LabelSettings, ProfileSettings, Settings, TrainerSettings
from streams.trainer.trainer import Trainer

DIM, ITEMS, USERS, REQUESTS = 8, 40, 10, 160
START, STEP, WINDOW = 1_700_000_000_000, 20_000, 60
JUDGED_FROM = START + 80 * STEP
INTERVALS = {"never": None, "10 min": 10 * MINUTE, "1 min": MINUTE}


def items() -> list[Item]:
    vectors = np.random.default_rng(7).normal(size=(ITEMS, DIM))
    return [Item(f"i{n}", "", embedding=vector.tolist()) for n, vector in enumerate(vectors)]


def requests() -> list[tuple[Recall, list[Feedback]]]:
    rng = np.random.default_rng(3)
    found = []
    for n in range(REQUESTS):
        user, ts = int(rng.integers(USERS)), START + n * STEP
        candidates = [f"i{i}" for i in rng.choice(ITEMS, 15, replace=False)]
        events = [
            Feedback(f"e{n}-{k}", f"u{user}", i, ts + k, "impression", f"r{n}") for k, i in enumerate(candidates[:5])
        ]
        clicks = [i for i in candidates[:5] if int(i[1:]) % 4 == user % 4]
        events += [Feedback(f"c{n}-{k}", f"u{user}", i, ts + 9 + k, "click", f"r{n}") for k, i in enumerate(clicks)]
        found.append((Recall(f"r{n}", f"u{user}", ts, candidates), events))
    return found


@pytest.fixture(scope="module")
def artefacts(tmp_path_factory: pytest.TempPathFactory) -> Artefacts:
    past = [PastEvent(f"past{u}", f"i{(u % 4) + 4 * k}", k, bool(k % 3)) for u in range(30) for k in range(10)]
    contents = [ItemContent(item.item_id, item.text, item.embedding) for item in items()]
    return fit(contents, past, None, FitOptions(generator="history"), seed=0)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(
        labels=LabelSettings(window_seconds=WINDOW, retention_seconds=0),
        profiles=ProfileSettings(min_interval_seconds=60),
        trainer=TrainerSettings(models=tmp_path, dim=4, batch_records=8),
    )


def outcomes(artefacts: Artefacts, settings: Settings, period_ms: int | None = None) -> Outcomes:
    catalogue = catalogue_of(items(), artefacts, settings.space)
    return run(requests(), artefacts, catalogue, settings, INTERVALS, JUDGED_FROM, period_ms)


def test_the_model_in_service_is_the_one_of_the_last_synchronisation(artefacts: Artefacts, settings: Settings) -> None:
    found = outcomes(artefacts, settings)
    assert found.requests == 80
    catalogue = catalogue_of(items(), artefacts, settings.space)
    frame = Frame.of(artefacts)

    def logits_of(n: int, until: int) -> list[float]:
        """Request ``n`` scored by a trainer of its own that saw the labels that closed before ``until``."""
        pipeline = Pipeline(settings, artefacts, catalogue)
        trainer = Trainer(settings.trainer, frame, catalogue)
        recall = requests()[n][0]
        events = [event for of, page in requests() for event in (of, *page)]
        for offset, event in in_event_time(enumerate(events)):
            if event.ts > recall.ts:
                break
            by_minute: dict[int, list[Label]] = {}
            for label in pipeline.advance(event.ts):
                by_minute.setdefault((label.ts + WINDOW * 1000) // MINUTE, []).append(label)
            for minute, some in by_minute.items():
                if minute * MINUTE < until:
                    trainer.step(some)
            pipeline.take(offset, event)
        weights, ids = trainer.model()
        network = PreRanker.of_state(weights, DIM)
        rows = catalogue.rows(recall.candidates[:5])
        anchors = pipeline.anchors(recall.user_id, recall.ts)
        cross = None
        if anchors is not None and anchors.prepared is not None:
            cross = labeller.score(anchors.prepared, catalogue.vectors[rows])[0]
        user = IdTable.from_list(ids.users).row(recall.user_id)
        item_rows = IdTable.from_list(ids.items).rows(recall.candidates[:5])
        liked = IdTable.from_list(ids.items).rows([] if anchors is None else anchors.history)
        return network.score(user, item_rows, catalogue.vectors[rows], cross, liked[liked > 0]).tolist()

    for n in (85, 120, 159):
        ts, pairs = START + n * STEP, slice(5 * (n - 80), 5 * (n - 79))
        for name, until in (
            ("never", JUDGED_FROM // MINUTE * MINUTE),
            ("10 min", ts // (10 * MINUTE) * 10 * MINUTE),
            ("1 min", ts // MINUTE * MINUTE),
        ):
            expected = logits_of(n, max(until, JUDGED_FROM // MINUTE * MINUTE))
            assert found.pair_logit[name][pairs] == pytest.approx(expected, abs=1e-4), (n, name)


def test_an_arm_is_trained_as_if_it_were_alone(artefacts: Artefacts, settings: Settings) -> None:
    catalogue = catalogue_of(items(), artefacts, settings.space)
    arm = settings.trainer.model_copy(update={"negatives_weight": 0.0, "pseudo_weight": 0.0})
    alone = settings.model_copy(update={"trainer": arm})
    beside = run(requests(), artefacts, catalogue, settings, INTERVALS, JUDGED_FROM, None, {"arm": arm})
    expected = run(requests(), artefacts, catalogue, alone, {"1 min": MINUTE}, JUDGED_FROM, None)
    assert beside.pair_logit["arm"] == expected.pair_logit["1 min"] != beside.pair_logit["1 min"]
    assert beside.pair_logit["1 min"] == outcomes(artefacts, settings).pair_logit["1 min"]


def test_results_are_taken_up_under_the_settings_that_made_them(settings: Settings) -> None:
    def changed(section: str, **update: object) -> Settings:
        return settings.model_copy(update={section: getattr(settings, section).model_copy(update=update)})

    same = fingerprint(settings)
    for other in (
        changed("labels", matching="kernel"),
        changed("trainer", learning_rate=0.01),
        changed("profiles", min_interval_seconds=61.0),
        changed("generator", beams=11),
        changed("codes", levels=2),
        changed("space", encoder="precomputed"),
    ):
        assert fingerprint(other) != same
    for other in (
        changed("kafka", bootstrap_servers="elsewhere:9092"),
        changed("trainer", models=Path("elsewhere"), seed=7),
        changed("space", cache=Path("elsewhere")),
    ):
        assert fingerprint(other) == same


def test_after_a_failure_no_run_is_begun_and_what_was_done_is_taken_up(settings: Settings, tmp_path: Path) -> None:
    settings = settings.model_copy(
        update={
            "space": settings.space.model_copy(update={"encoder": "precomputed"}),
            "generator": settings.generator.model_copy(update={"kind": "history"}),
        }
    )
    rng = np.random.default_rng(4)
    ratings = [Rating(f"u{n % USERS}", f"i{rng.integers(ITEMS)}", START + n * HOUR, 5.0 * (n % 2)) for n in range(60)]
    stream, plan = TimedStream("Made up", "", items(), ratings, 0), Study(1, 30)

    def interrupt(line: str) -> None:
        if "judged" in line:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        study(stream, settings, plan, tmp_path / "out", 1, interrupt)
    (directory,) = (tmp_path / "out").iterdir()
    first = directory / "weekly-0.json"
    assert sorted(directory.glob("*.json")) == [first]
    for policy in POLICIES:
        (directory / f"{policy}-0.json").write_bytes(first.read_bytes())
    assert [run.policy for run in study(stream, settings, plan, tmp_path / "out", 1, interrupt)] == list(POLICIES)


def test_auc_is_that_of_the_library_with_any_weights() -> None:
    rng = np.random.default_rng(2)
    clicked, scores = rng.random(300) < 0.3, rng.integers(20, size=300) / 4
    assert _Ranked(clicked, scores.tolist()).auc(np.ones(300)) == pytest.approx(auc(clicked.astype(int), scores))
    weight = rng.integers(0, 4, size=300)
    repeated = auc(np.repeat(clicked, weight).astype(int), np.repeat(scores, weight))
    assert _Ranked(clicked, scores.tolist()).auc(weight.astype(float)) == pytest.approx(repeated)


def test_the_page_tells_every_interval_and_policy(artefacts: Artefacts, settings: Settings) -> None:
    from streams.bench import freshness

    catalogue = catalogue_of(items(), artefacts, settings.space)
    arms = {name: settings.trainer.model_copy(update=changed) for name, changed in ARMS.items()}
    runs = [
        Run(0, policy, run(requests(), artefacts, catalogue, settings, freshness.INTERVALS, JUDGED_FROM, period, arms))
        for policy, period in POLICIES.items()
    ]
    live = Stages(Plan(20, 1, 2, 1), "Some Kafka 1.2", 2, *([seconds] * 20 for seconds in (2.25, 0.5, 0.125, 2.875)))
    streams = [(TimedStream("Made up", "", items(), [], 0), runs)]
    text = page(streams, settings, Study(1, 15), "gpl bench freshness", live)
    assert "| click -> in service | 2.88 | 2.88 |" in text and "running system: Some Kafka 1.2," in text
    assert "## From a click" not in page(streams, settings, Study(1, 15), "gpl bench freshness")
    for name in (*freshness.INTERVALS, *POLICIES, *ARMS):
        assert f"| {name} | " in text
    drift = next(run.outcomes for run in runs if run.policy == DRIFT)
    value, gain = _Pairs([drift], [drift]).auc(ANCHORS, ANCHORS)
    assert value.low <= value.estimate <= value.high and gain == (0, 0, 0)
    assert f"{value.estimate:.4f}" in text
