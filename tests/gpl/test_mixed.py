"""Labels of user and item: they find what was planted, online as in one go, and forget what they are told to."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpl.labels.calibration import Platt
from gpl.labels.mixed import MixedCalibration

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
            data["exposed"][at],
            np.where(data["exposed"][at], data["clicked"][at], 0).astype(np.float32),
        )
    return calibration


def labels(calibration: MixedCalibration, data: dict[str, np.ndarray]) -> np.ndarray:
    return calibration.label(data["user"], data["item"], data["request"], data["score"])


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
        one, other = calibration.label(user, item, request, np.array([0.4, 0.5], np.float32)).astype(np.float64)
        assert low < np.log(other / (1 - other)) - np.log(one / (1 - one)) < high


@pytest.mark.parametrize("chunk", [1, 16, 256])
def test_batches_of_any_size_end_near_what_one_fit_gives(chunk: int) -> None:
    data = log(2)
    at_once, online = labels(fitted(data, 10**6), data), labels(fitted(data, chunk), data)
    assert np.corrcoef(at_once, online)[0, 1] > 0.985
    assert excess(online, data) < 1.5 * excess(at_once, data)


def test_what_changes_is_followed() -> None:
    """Information is held at a maximum, so an item that was good for long and is bad now becomes bad."""
    calibration, rng = MixedCalibration(), np.random.default_rng(0)

    def shown(rate: float, batches: int) -> float:
        item, zeros = np.ones(200, np.int64), np.zeros(200, np.int64)
        nothing = np.full(200, np.nan, np.float32)
        for _ in range(batches):
            clicked = (rng.random(200) < rate).astype(np.float32)
            calibration.observe(np.array([0]), item, zeros, nothing, np.ones(200, bool), clicked)
        return float(calibration.label(np.array([0]), item[:1], zeros[:1], nothing[:1])[0])

    assert shown(0.8, 2_000) == pytest.approx(0.8, abs=0.05)
    assert shown(0.2, 300) == pytest.approx(0.2, abs=0.05)


def test_unknown_users_and_items_have_the_label_of_the_average_one_and_so_have_forgotten_ones() -> None:
    data = log(3)
    calibration = fitted(data, 32)
    one, score = np.zeros(1, np.int64), np.array([0.4], np.float32)
    average = calibration.label(one, one, one, score)
    assert calibration.label(one + 10**6, one + 10**6, one, score) == average
    best = int(np.argmax(calibration.state_arrays()["items"][:, 0]))
    assert calibration.label(one, one + best, one, score) > average + 0.2
    calibration.forget(np.arange(1, 5), np.array([best, 10**6]))
    assert calibration.label(one + 3, one + best, one, score) == average


def test_a_state_is_taken_over_bit_for_bit_and_a_misshapen_one_is_refused() -> None:
    data = log(4, requests=300)
    first, second = fitted(data, 32), MixedCalibration()
    state = {name: array.copy() for name, array in first.state_arrays().items()}
    second.load_state_arrays(state)
    more = log(5, requests=64)
    for calibration in (first, second):
        calibration.observe(
            more["user"], more["item"], more["request"], more["score"], more["exposed"], more["clicked"]
        )
    assert second.exposures == first.exposures
    assert all(np.array_equal(a, second.state_arrays()[name]) for name, a in first.state_arrays().items())
    with pytest.raises(ValueError, match="moments: missing"):
        second.load_state_arrays({name: array for name, array in state.items() if name != "moments"})
    with pytest.raises(ValueError, match=r"common: shape \(2, 2\)"):
        second.load_state_arrays({**state, "common": np.zeros((2, 2))})


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
        before = calibration.exposures
        calibration.observe(user, item, request, score, exposed, clicked)
        assert calibration.exposures == before + exposed.sum()
        label = calibration.label(user, item, request, score)
        assert label.dtype == np.float32 and ((label >= 0) & (label <= 1)).all()
