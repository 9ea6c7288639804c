from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpl.labels.evidence import Evidence, EvidenceConfig, Reading

SMALL = EvidenceConfig(user_buckets=128)


def records(rng, count, users=40, items=30, informative=0.0, candidates=12, shown=5):
    """Requests over a planted world: popular items are shown and clicked more; anchors know the user or do not."""
    taste = np.random.default_rng(99).normal(size=(users, items))
    popularity = np.linspace(-2, 2, items)
    made = []
    for _ in range(count):
        user = int(rng.integers(users))
        item = rng.permutation(items)[:candidates]
        # The score grows with popularity whatever the user: evidence must not take that for personal taste.
        score = 0.1 * popularity[item] + 0.1 * rng.normal(size=candidates) + 0.1 * informative * taste[user, item]
        order = np.argsort(-(popularity[item] + rng.gumbel(size=candidates)))
        exposed = np.zeros(candidates, bool)
        exposed[order[:shown]] = True
        chance = 1 / (1 + np.exp(-(popularity[item] + taste[user, item] - 0.5)))
        clicked = (exposed & (rng.random(candidates) < chance)).astype(np.float32)
        made.append((user, item, score.astype(np.float32), exposed, clicked))
    return made


def observe(evidence, made, batch=8):
    for start in range(0, len(made), batch):
        part = made[start : start + batch]
        evidence.observe(
            np.array([r[0] for r in part]),
            np.concatenate([r[1] for r in part]),
            np.repeat(np.arange(len(part)), [len(r[1]) for r in part]),
            *(np.concatenate([r[column] for r in part]) for column in (2, 3, 4)),
        )
    return evidence


def oracle(made, config, batch=8):
    """The formulas of the module's docstring, pair by pair and request by request."""
    k, clip, rho = 5.0, 10.0, 40.0
    n, shown, total = {}, {}, {}
    xs, residuals = [], []
    for start in range(0, len(made), batch):
        part = made[start : start + batch]
        if n:
            everything = sum(n.values())
            q = (sum(shown.values()) + 1) / (everything + 1)
            judged = []
            for user, item, score, exposed, clicked in part:
                sides = {0: [0.0, 0.0], 1: [0.0, 0.0]}
                for i, s, c in zip(item[exposed], score[exposed], clicked[exposed], strict=True):
                    if i not in n:
                        continue
                    seen = n[i]
                    r = float(s) - total[i] / seen
                    w = seen / (seen + 1) * min(q / ((shown.get(i, 0) + k * q) / (seen + k)), clip)
                    sides[int(c)][0] += w
                    sides[int(c)][1] += w * r
                    residuals.append([r * r, 1.0])
                if sides[0][0] > 0 and sides[1][0] > 0:
                    judged.append((user, sides[1][1] / sides[1][0] - sides[0][1] / sides[0][0]))
            fade = 0.5 ** (len(judged) / config.half_life)
            fresh = sum(int(i in n) for r in part for i in r[1][r[3]])
            residuals = [[a * fade, b * fade] for a, b in residuals[: len(residuals) - fresh]] + residuals[-fresh:]
            xs = [(u, x, w * fade) for u, x, w in xs] + [(u, x, 1.0) for u, x in judged]
        for _, item, score, exposed, _ in part:
            for i, s, e in zip(item, score, exposed, strict=True):
                n[i], shown[i], total[i] = n.get(i, 0) + 1, shown.get(i, 0) + int(e), total.get(i, 0.0) + float(s)
    count = sum(w for _, _, w in xs)
    spread = math.sqrt(sum(a for a, _ in residuals) / sum(b for _, b in residuals))
    mean = sum(x * w for _, x, w in xs) / count
    variance = sum(sum(w * (x - mean) for v, x, w in xs if v == u) ** 2 for u in {u for u, _, _ in xs}) / spread**2
    bound = math.sqrt(2 * (variance + rho) * math.log(math.sqrt((variance + rho) / rho) / (2 * config.alpha) + 1))
    return mean / spread, mean / spread - bound / count, count


@given(seed=st.integers(0, 999), informative=st.floats(0, 3), half_life=st.sampled_from([50.0, 1e5]))
@settings(max_examples=15, deadline=None)
def test_the_reading_is_the_documented_formula(seed, informative, half_life):
    config = EvidenceConfig(half_life=half_life, user_buckets=128)
    made = records(np.random.default_rng(seed), 150, informative=informative)
    reading = observe(Evidence(config), made).read()
    effect, low, count = oracle(made, config)
    assert reading.requests == pytest.approx(count)
    assert reading.effect == pytest.approx(effect, abs=1e-6)
    assert reading.low == pytest.approx(low, abs=1e-6)
    assert reading.weight == pytest.approx(min(1, max(0, low) / config.full_effect), abs=1e-6)
    assert reading.concordance == pytest.approx(0.5 * (1 + math.erf(effect / 2)), abs=1e-6)


def test_anchors_that_know_their_user_earn_the_full_weight():
    reading = observe(Evidence(SMALL), records(np.random.default_rng(0), 1500, informative=2.0)).read()
    assert reading.weight == 1.0
    assert reading.concordance > 0.6


def test_anchors_that_know_only_what_is_popular_never_earn_any():
    # A look after every batch, in 60 streams: each may fail with a chance of alpha, 0.05, at most.
    opened = 0
    for seed in range(60):
        evidence, ever = Evidence(SMALL), False
        made = records(np.random.default_rng(seed), 600)
        for start in range(0, len(made), 50):
            ever = observe(evidence, made[start : start + 50]).read().weight > 0 or ever
        opened += ever
    assert opened <= 6  # of 60 at 0.05: more with a chance of 1 in 13 even if the bound were exact


def test_the_same_anchors_for_everybody_tell_nothing():
    rng = np.random.default_rng(0)
    made = [
        (u, item, np.float32(0.1) * item.astype(np.float32), exposed, clicked)
        for u, item, _, exposed, clicked in records(rng, 800)
    ]
    assert observe(Evidence(SMALL), made).read().weight == 0.0


def test_anchors_against_the_clicks_earn_nothing():
    assert observe(Evidence(SMALL), records(np.random.default_rng(0), 800, informative=-2.0)).read().weight == 0.0


def test_few_users_and_no_data_have_no_bound():
    assert Evidence(SMALL).read().weight == 0.0
    few = observe(Evidence(SMALL), records(np.random.default_rng(0), 800, users=20, informative=3.0)).read()
    assert (few.low, few.weight) == (-math.inf, 0.0)
    assert few.effect > 0.5
    assert few.users == 20


def test_evidence_fades_when_anchors_turn_bad():
    evidence = Evidence(EvidenceConfig(half_life=200, user_buckets=128))
    rng = np.random.default_rng(0)
    assert observe(evidence, records(rng, 800, informative=3.0)).read().weight > 0
    assert observe(evidence, records(rng, 3000, informative=-1.0)).read().weight == 0


def test_state_goes_on_bit_for_bit():
    made = records(np.random.default_rng(0), 400, informative=1.0)
    whole, first = observe(Evidence(SMALL), made), observe(Evidence(SMALL), made[:200])
    resumed = Evidence(SMALL)
    resumed.load_state_arrays({name: array.copy() for name, array in first.state_arrays().items()})
    observe(resumed, made[200:])
    for name, array in whole.state_arrays().items():
        np.testing.assert_array_equal(array, resumed.state_arrays()[name])


@pytest.mark.parametrize("reused", [False, True])
def test_useless_anchors_have_no_weight_also_when_rows_are_given_to_other_items(reused):
    """A score of the item alone: residuals are nothing but what is wrong with the item's mean."""
    rng, evidence = np.random.default_rng(0), Evidence(SMALL)
    level = rng.normal(size=(20, 60))
    for era in range(20):
        quality = rng.normal(size=60) if reused else np.linspace(-1, 1, 60)
        made = []
        for _ in range(200):
            item = rng.permutation(60)[:12]
            score = (level[era if reused else 0, item] + 0.1 * rng.normal(size=12)).astype(np.float32)
            exposed = np.arange(12) < 6
            clicked = exposed & (rng.random(12) < 1 / (1 + np.exp(-quality[item] - level[era if reused else 0, item])))
            made.append((int(rng.integers(40)), item, score, exposed, clicked.astype(np.float32)))
        observe(evidence, made)
        if reused:
            evidence.forget(np.arange(60))
    assert evidence.read().weight == 0.0


def test_what_is_forgotten_is_as_if_never_seen():
    rng = np.random.default_rng(0)
    evidence = observe(Evidence(SMALL), records(rng, 100, items=30))
    evidence.forget(np.arange(5, 2000))
    kept = evidence.state_arrays()["items"]
    assert not kept[5:].any() and kept[:5].any()
    np.testing.assert_allclose(evidence.state_arrays()["total"], kept.sum(axis=0), atol=1e-6)
    few, many = Evidence(SMALL), observe(Evidence(SMALL), records(rng, 100, items=1500))
    few.load_state_arrays(many.state_arrays())
    few.load_state_arrays(evidence.state_arrays())
    observe(few, records(np.random.default_rng(7), 50)), observe(evidence, records(np.random.default_rng(7), 50))
    for name, array in evidence.state_arrays().items():
        np.testing.assert_array_equal(array, few.state_arrays()[name])


def test_memory_is_bounded_and_pairs_without_a_score_are_passed_over():
    evidence = observe(Evidence(EvidenceConfig(user_buckets=5)), records(np.random.default_rng(0), 50))
    assert {n: a.shape for n, a in evidence.state_arrays().items()} == {
        "items": (30, 3),
        "total": (3,),
        "users": (5, 2),
        "residuals": (2,),
    }
    before = {name: array.copy() for name, array in evidence.state_arrays().items()}
    bare = [(u, i, np.full_like(s, np.nan), e, c) for u, i, s, e, c in records(np.random.default_rng(1), 10)]
    observe(evidence, bare)
    for name, array in before.items():
        np.testing.assert_array_equal(array, evidence.state_arrays()[name])


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="alpha: 0"):
        EvidenceConfig(alpha=0)
    with pytest.raises(ValueError, match="user_buckets: 0"):
        EvidenceConfig(user_buckets=0)
    with pytest.raises(ValueError, match="users: missing"):
        Evidence(SMALL).load_state_arrays({"items": np.zeros((64, 3)), "total": np.zeros(3)})
    with pytest.raises(ValueError, match=r"items: shape \(3,\)"):
        Evidence(SMALL).load_state_arrays({name: np.zeros(3) for name in Evidence(SMALL).state_arrays()})


@given(st.floats(-2, 3), st.floats(0, 1))
def test_sharpness_is_the_effect_at_most_one_and_counts_only_with_weight(effect, weight):
    reading = Reading(effect, 0.0, weight if effect > 0 else 0.0, 100.0, 50)
    assert 0 < reading.sharpness <= 1
    assert reading.sharpness == (min(1.0, effect) if reading.weight > 0 else 1.0)


def test_sharpness_is_the_slope_of_a_request_s_log_odds():
    """With normal scores, softmax(effect * z) over a request says how often each item is the clicked one."""
    rng, effect = np.random.default_rng(0), 0.4
    z = rng.normal(size=(200_000, 2))
    z[:, 0] += effect  # the clicked one
    chance = 1 / (1 + np.exp(-effect * (z[:, 0] - z[:, 1])))
    # Calibrated: of pairs of which it says p of either item, that item was clicked in p of the cases.
    stated = np.concatenate([chance, 1 - chance])
    clicked = np.concatenate([np.ones(len(z)), np.zeros(len(z))])
    for low in (0.3, 0.4, 0.5, 0.6):
        some = (stated >= low) & (stated < low + 0.1)
        assert abs(stated[some].mean() - clicked[some].mean()) < 0.01
