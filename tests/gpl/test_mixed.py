"""Labels of user and item: they find what was planted, online as in one go, and forget what they are told to."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpl.labels.calibration import Platt
from gpl.labels.mixed import SOURCES, MixedCalibration

USERS, ITEMS, SHOWN = 200, 60, 12


def log(seed: int, taste: float = 1.0, requests: int = 1_500) -> dict[str, np.ndarray]:
    """Feedback on items of planted quality by users of planted readiness, with a score that tells ``taste`` log-odds a
    standard deviation; ``truth`` is the probability of each pair."""
    rng = np.random.default_rng(seed)
    readiness, quality = rng.normal(0, 1, USERS + 1), rng.normal(0, 1.5, ITEMS + 1)
    user = rng.integers(1, USERS + 1, requests)
    item = np.stack([1 + rng.permutation(ITEMS)[:SHOWN] for _ in range(requests)]).ravel()
    request = np.repeat(np.arange(requests), SHOWN)
    z = rng.normal(size=len(item))
    truth = 1 / (1 + np.exp(-(-1 + taste * z + readiness[user][request] + quality[item])))
    return {
        "user": user,
        "item": item,
        "request": request,
        "score": (0.4 + 0.1 * z).astype(np.float32),
        "clicked": (rng.random(len(item)) < truth).astype(np.float32),
        "truth": truth,
        "exposed": rng.random(len(item)) < 0.5,
    }


def fitted(data: dict[str, np.ndarray], chunk: int) -> MixedCalibration:
    calibration = MixedCalibration()
    for start in range(0, len(data["user"]), chunk):
        at = slice(start * SHOWN, (start + chunk) * SHOWN)
        calibration.observe(
            data["user"][start : start + chunk],
            data["item"][at],
            data["request"][at] - start,
            data["score"][at],
            ["s"] * len(data["user"][start : start + chunk]),
            data["exposed"][at],
            np.where(data["exposed"][at], data["clicked"][at], 0).astype(np.float32),
        )
    return calibration


def labels(calibration: MixedCalibration, data: dict[str, np.ndarray]) -> np.ndarray:
    return calibration.label(data["user"], data["item"], data["request"], data["score"], ["s"] * len(data["user"]))


def excess(label: np.ndarray, data: dict[str, np.ndarray]) -> float:
    """Nats by which labels of what was not exposed are worse than the truth."""
    hidden = ~data["exposed"]
    q, p = np.clip(label[hidden], 1e-6, 1 - 1e-6), data["truth"][hidden]
    return float((p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))).mean())


def test_labels_of_what_was_not_exposed_are_near_the_truth_where_platt_s_are_not() -> None:
    data = log(0)
    shown = data["exposed"]
    platt = Platt.fit(data["score"][shown], data["clicked"][shown]).apply(data["score"])
    assert excess(labels(fitted(data, 32), data), data) < 0.15 * excess(platt, data)


def test_a_score_that_tells_nothing_moves_no_label_and_one_that_tells_does() -> None:
    for taste, low, high in ((0.0, -0.06, 0.06), (1.0, 0.8, 1.2)):
        data = log(1, taste)
        calibration = fitted(data, 32)
        user, item, request = np.array([0]), np.zeros(2, np.int64), np.zeros(2, np.int64)
        score = np.array([0.4, 0.5], np.float32)
        one, other = calibration.label(user, item, request, score, ["s"]).astype(np.float64)
        assert low < np.log(other / (1 - other)) - np.log(one / (1 - one)) < high


@pytest.mark.parametrize("chunk", [1, 16, 256])
def test_batches_of_any_size_end_near_what_one_fit_gives(chunk: int) -> None:
    data = log(2)
    at_once, online = labels(fitted(data, 10**6), data), labels(fitted(data, chunk), data)
    assert np.corrcoef(at_once, online)[0, 1] > 0.985
    assert excess(online, data) < 1.5 * excess(at_once, data)


def test_an_item_that_changes_is_followed() -> None:
    """Information is held at a maximum, so an item that was good for long and is bad now becomes bad."""
    calibration, rng, items = MixedCalibration(), np.random.default_rng(0), 20
    quality = np.full(items, 0.5)

    def shown(batches: int) -> np.ndarray:
        item, zeros = np.tile(np.arange(1, items + 1), 20), np.zeros(20 * items, np.int64)
        nothing, none = np.full(20 * items, np.nan, np.float32), np.array([0])
        for _ in range(batches):
            clicked = (rng.random(20 * items) < np.tile(quality, 20)).astype(np.float32)
            calibration.observe(none, item, zeros, nothing, [""], np.ones(20 * items, bool), clicked)
        return calibration.label(none, item[:items], zeros[:items], nothing[:items], [""])

    quality[0] = 0.8
    assert shown(3_000) == pytest.approx(quality, abs=0.06)
    quality[0] = 0.2
    assert shown(1_000) == pytest.approx(quality, abs=0.06)


def feed(calibration: MixedCalibration, source: str, batches: int, seed: int, mean: float, spread: float) -> float:
    """Exposures with scores of one source, none where ``spread`` is 0; clicks of base log-odds -3 and a slope of one a
    standard deviation. Returns the mean absolute error of labels of items that were never exposed."""
    rng = np.random.default_rng(seed)
    for _ in range(batches):
        user, item = rng.integers(1, 100, 32), rng.integers(1, 400, 320)
        request, z = np.repeat(np.arange(32), 10), rng.normal(size=320)
        clicked = (rng.random(320) < 1 / (1 + np.exp(3 - (z if spread else 0)))).astype(np.float32)
        score = (mean + spread * z if spread else np.full(320, np.nan)).astype(np.float32)
        calibration.observe(user, item, request, score, [source] * 32, np.ones(320, bool), clicked)
    z = np.linspace(-2, 2, 41)
    score, zeros = (mean + (spread or 1) * z).astype(np.float32), np.zeros(41, np.int64)
    label = calibration.label(np.array([0]), 1_000 + np.arange(41), zeros, score, [source])
    return float(np.abs(label - 1 / (1 + np.exp(3 - z))).mean())


def test_what_was_exposed_without_scores_does_not_mislead_labels_by_scores() -> None:
    """A new stream: at first nobody has anchors."""
    calibration = MixedCalibration()
    feed(calibration, "", 300, 0, 0.4, 0.0)
    assert feed(calibration, "s", 4, 1, 0.4, 0.1) < 0.03
    assert feed(calibration, "s", 30, 2, 0.4, 0.1) < 0.015


def test_another_source_of_scores_has_its_own_scale() -> None:
    calibration = MixedCalibration()
    feed(calibration, "old", 300, 0, 0.4, 0.1)
    assert np.isnan(feed(calibration, "new", 1, 1, 0.8, 0.05)), "too little to tell"
    assert feed(calibration, "new", 10, 2, 0.8, 0.05) < 0.025
    assert feed(calibration, "old", 1, 3, 0.4, 0.1) < 0.015
    for n in range(SOURCES):
        feed(calibration, f"s{n}", 1, n, 0.4, 0.1)
    assert calibration.state()[0] == [f"s{n}" for n in range(SOURCES)]


def test_a_score_that_speaks_against_clicks_never_turns_labels_round() -> None:
    data = log(6, taste=-1.0)
    score = np.array([0.2, 0.6], np.float32)
    zeros = np.zeros(2, np.int64)
    low, high = fitted(data, 32).label(np.array([0]), zeros, zeros, score, ["s"])
    assert low == high


def test_unknown_users_and_items_have_the_label_of_the_average_one_and_so_have_forgotten_ones() -> None:
    data = log(3)
    calibration = fitted(data, 32)
    zero, score = np.zeros(1, np.int64), np.array([0.4], np.float32)

    def label(user: int, item: int) -> float:
        return float(calibration.label(zero + user, zero + item, zero, score, ["s"])[0])

    average = label(0, 0)
    assert label(10**6, 10**6) == average
    best = int(np.argmax(calibration.state()[1]["items"][:, 0]))
    readiest = int(np.argmax(calibration.state()[1]["users"][:, 0]))
    assert label(0, best) > average + 0.2 and label(readiest, 0) > average + 0.2
    calibration.forget(np.array([readiest, 10**6]), np.array([best, 10**6]))
    assert label(readiest, best) == average


def test_a_state_is_taken_over_bit_for_bit_and_a_misshapen_one_is_refused() -> None:
    data = log(4, requests=300)
    first, second = fitted(data, 32), MixedCalibration()
    names, state = first.state()
    second.restore(names, state)
    more = log(5, requests=64)
    for calibration in (first, second):
        columns = (more[name] for name in ("user", "item", "request", "score"))
        calibration.observe(*columns, ["s"] * 64, more["exposed"], more["clicked"])
    assert second.state()[0] == first.state()[0] == ["s"]
    assert all(np.array_equal(a, second.state()[1][name]) for name, a in first.state()[1].items())
    assert not np.array_equal(state["items"], first.state()[1]["items"])
    with pytest.raises(ValueError, match="sources: missing"):
        second.restore(names, {name: array for name, array in state.items() if name != "sources"})
    with pytest.raises(ValueError, match=r"users: shape \(2, 3\)"):
        second.restore(names, {**state, "users": np.zeros((2, 3))})
    with pytest.raises(ValueError, match="sources: 1 rows for 2 names"):
        second.restore(["s", "t"], state)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_labels_stay_probabilities_whatever_comes(data: st.DataObject) -> None:
    calibration = MixedCalibration()
    for _ in range(data.draw(st.integers(1, 4))):
        n = data.draw(st.integers(1, 30))
        request = np.sort(np.array(data.draw(st.lists(st.integers(0, 2), min_size=n, max_size=n)), np.int64))
        rows = st.lists(st.integers(0, 5), min_size=n, max_size=n)
        scores = st.lists(st.sampled_from([np.nan, -1.0, 0.0, 0.3, 1.0]), min_size=n, max_size=n)
        flags = st.lists(st.booleans(), min_size=n, max_size=n)
        item, score = np.array(data.draw(rows), np.int64), np.array(data.draw(scores), np.float32)
        user = np.array([data.draw(st.integers(0, 5)) for _ in range(3)], np.int64)
        exposed, clicked = np.array(data.draw(flags)), np.array(data.draw(flags)).astype(np.float32)
        sources = [data.draw(st.sampled_from(["", "s", "t"])) for _ in range(3)]
        calibration.observe(user, item, request, score, sources, exposed, clicked)
        label = calibration.label(user, item, request, score, sources)
        told = ~np.isnan(label)
        assert label.dtype == np.float32 and ((label[told] >= 0) & (label[told] <= 1)).all()
        assert all(np.isfinite(array).all() for array in calibration.state()[1].values())
