"""Anchor generators: the beam against enumeration, the language model against a planted pattern, the baseline."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gpl.anchors.base import Beams, History, anchors_of, load_generator
from gpl.anchors.beam import Decoding, beam_search
from gpl.anchors.history import HistoryClusters
from gpl.anchors.near_history import WEIGHT, NearHistory, choose_weight
from gpl.anchors.sampling import batches, keep_probabilities, thin, windows
from gpl.anchors.small_lm import SmallLM, SmallLMConfig
from gpl.anchors.training import Resume, Schedule, train
from gpl.anchors.transformer import Shape, SidTransformer
from gpl.codes.centroids import SidCentroids
from gpl.codes.trie import SidTrie

LEVELS, SIZE, DIM = 3, 4, 8


def catalogue(seed: int, n: int = 25) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(n, DIM)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return rng.integers(0, SIZE, size=(n, LEVELS)).astype(np.int32), vectors


def table_scorer(seed: int):
    """Scores that depend on the whole prefix."""
    tables = {
        level: torch.randn((SIZE,) * (level + 1), generator=torch.Generator().manual_seed(seed + level))
        for level in range(LEVELS)
    }

    def score(prefixes: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        return tables[prefixes.shape[2]][tuple(prefixes.unbind(-1))].expand(*prefixes.shape[:2], SIZE)

    return tables, score


def enumerated(sids: np.ndarray, tables: dict[int, torch.Tensor]) -> dict[tuple[int, ...], float]:
    """Log-probability of every SID that exists, each step renormalised over the codes that exist after its prefix."""
    existing = {tuple(int(code) for code in sid) for sid in sids}
    result = {}
    for sid in existing:
        total = 0.0
        for level in range(LEVELS):
            allowed = sorted({other[level] for other in existing if other[:level] == sid[:level]})
            scores = tables[level][sid[:level]] if level else tables[0]
            total += float(scores[sid[level]] - torch.logsumexp(scores[allowed], 0))
        result[sid] = total
    return result


@given(st.integers(0, 10**6))
@settings(max_examples=30)
def test_a_wide_beam_finds_every_sid_with_its_probability(seed):
    sids, _ = catalogue(seed)
    tables, score = table_scorer(seed)
    expected = enumerated(sids, tables)
    assert abs(sum(np.exp(list(expected.values()))) - 1) < 1e-5
    found, logprobs = beam_search(score, SidTrie(sids, SIZE), batch=2, beams=SIZE**LEVELS)
    for user in range(2):
        real = torch.isfinite(logprobs[user])
        got = {tuple(sid): float(lp) for sid, lp in zip(found[user][real].tolist(), logprobs[user][real], strict=True)}
        assert got.keys() == expected.keys()
        assert all(abs(got[sid] - expected[sid]) < 1e-4 for sid in expected)
        assert (logprobs[user].diff()[: real.sum() - 1] <= 0).all()


def test_a_narrow_beam_gives_existing_sids_in_falling_order():
    sids, _ = catalogue(3, n=60)
    _, score = table_scorer(3)
    found, logprobs = beam_search(score, SidTrie(sids, SIZE), batch=1, beams=5)
    existing = set(map(tuple, sids.tolist()))
    assert {tuple(sid) for sid in found[0].tolist()} <= existing
    assert len({tuple(sid) for sid in found[0].tolist()}) == 5
    assert (logprobs[0].diff() <= 0).all()


def test_ties_go_to_the_smaller_sid():
    sids = np.array(list(itertools.product(range(2), repeat=3)), dtype=np.int32)
    found, _ = beam_search(lambda p, _: torch.zeros(*p.shape[:2], SIZE), SidTrie(sids, SIZE), batch=1, beams=8)
    assert found[0].tolist() == sids.tolist()


@pytest.mark.parametrize("beams", [0, -1])
def test_no_beams_are_refused(beams):
    sids, _ = catalogue(0)
    with pytest.raises(ValueError, match="beams"):
        beam_search(lambda p, _: torch.zeros(*p.shape[:2], SIZE), SidTrie(sids, SIZE), 1, beams)


CYCLE = np.array([[0, 1, 2], [1, 2, 3], [2, 3, 0], [3, 0, 1], [0, 2, 1]], dtype=np.int32)


def cycle_sequences(n: int, seed: int) -> list[np.ndarray]:
    """Users who walk the same cycle of five items, each from another start."""
    rng = np.random.default_rng(seed)
    return [CYCLE[(rng.integers(5) + np.arange(rng.integers(6, 14))) % 5] for _ in range(n)]


@pytest.fixture(scope="module")
def cycle_lm() -> SmallLM:
    config = SmallLMConfig(dim=32, schedule=Schedule(epochs=15, batch_items=100, downsample_threshold=1.0))
    return SmallLM.train(cycle_sequences(120, 0), cycle_sequences(20, 1), LEVELS, SIZE, config, seed=0)


def history_of(steps: range) -> History:
    sids = CYCLE[np.array(steps) % 5]
    return History(sids, np.eye(DIM, dtype=np.float32)[np.array(steps) % 5])


def test_the_language_model_learns_what_comes_next(cycle_lm: SmallLM):
    trie = SidTrie(CYCLE, SIZE)
    for end in range(5, 10):
        (beams,) = cycle_lm.generate([history_of(range(end))], trie, 3)
        assert beams.sids[0].tolist() == CYCLE[end % 5].tolist()
        assert np.exp(beams.logprobs[0]) > 0.8
    assert cycle_lm.validation_losses[-1] < cycle_lm.validation_losses[0]


def test_an_answer_does_not_depend_on_the_others_in_the_call(cycle_lm: SmallLM):
    trie = SidTrie(CYCLE, SIZE)
    histories = [history_of(range(n)) for n in (1, 7, 3, 12, 7)]
    together = cycle_lm.generate(histories, trie, 4)
    for history, answer in zip(histories, together, strict=True):
        (alone,) = cycle_lm.generate([history], trie, 4)
        np.testing.assert_array_equal(alone.sids, answer.sids)
        np.testing.assert_array_equal(alone.logprobs, answer.logprobs)
    assert all(np.isclose(np.exp(cycle_lm.generate([h], trie, 9)[0].logprobs).sum(), 1, atol=1e-4) for h in histories)


@torch.no_grad()
def test_spelling_code_by_code_scores_as_whole_sequences_do():
    """The beam decodes with ``next_code`` after one reading of the history; training scores all places at once."""
    torch.manual_seed(0)
    model = SidTransformer(Shape(LEVELS, SIZE, history=12, dim=16, layers=2, heads=2)).eval()
    codes = torch.randint(0, SIZE, (3, 9, LEVELS))
    together = model.all_codes(codes)
    items = model.embed(codes).sum(dim=2)
    for n in range(9):
        context = model.context(items[:, :n])[:, -1]
        for level in range(LEVELS):
            alone = model.next_code(context, codes[:, n : n + 1, :level])[:, 0]
            torch.testing.assert_close(alone, together[:, n, level], atol=1e-5, rtol=1e-5)


def test_generated_probabilities_are_those_of_the_network(cycle_lm: SmallLM):
    """Every SID of a trie, its probability taken from the training path, codes that do not exist left out by hand."""
    sids, _ = catalogue(11, n=40)
    history = history_of(range(6))
    (found,) = cycle_lm.generate([history], SidTrie(sids, SIZE), SIZE**LEVELS)
    existing = {tuple(sid) for sid in sids.tolist()}
    assert {tuple(sid) for sid in found.sids.tolist()} == existing
    for sid, logprob in zip(found.sids.tolist(), found.logprobs, strict=True):
        scores = cycle_lm._model.all_codes(torch.tensor([[*history.sids.tolist(), sid]]))[0, -1]
        expected = 0.0
        for level in range(LEVELS):
            allowed = sorted({other[level] for other in existing if list(other[:level]) == sid[:level]})
            expected += float(scores[level, sid[level]] - torch.logsumexp(scores[level, allowed], 0))
        assert abs(expected - logprob) < 1e-4


def test_what_was_seen_is_left_out_and_the_rest_is_renormalised(cycle_lm: SmallLM):
    sids, _ = catalogue(11, n=40)
    trie, history = SidTrie(sids, SIZE), History(sids[:7], np.eye(DIM, dtype=np.float32)[:7])
    (every,) = cycle_lm.generate([history], trie, SIZE**LEVELS)
    unseen = cycle_lm.with_decoding(Decoding(exclude_seen=True))
    (found,) = unseen.generate([history], trie, SIZE**LEVELS)
    seen = set(map(tuple, history.sids.tolist()))
    assert set(map(tuple, found.sids.tolist())) == set(map(tuple, every.sids.tolist())) - seen
    assert abs(np.exp(found.logprobs.astype(np.float64)).sum() - 1) < 1e-4
    assert unseen.version != cycle_lm.version
    everything = History(sids, np.eye(DIM, dtype=np.float32)[np.arange(len(sids)) % DIM])
    assert len(unseen.generate([everything], trie, 5)[0]) == 0


def test_temperature_flattens(cycle_lm: SmallLM):
    trie, history = SidTrie(CYCLE, SIZE), history_of(range(6))
    (plain,) = cycle_lm.generate([history], trie, 5)
    (flat,) = cycle_lm.with_decoding(Decoding(temperature=50.0)).generate([history], trie, 5)
    assert plain.logprobs[0] > flat.logprobs[0]
    assert np.ptp(flat.logprobs) < 1 < np.ptp(plain.logprobs)
    for temperature in (0.0, 1e-40, float("inf"), float("nan")):
        with pytest.raises(ValueError, match=f"temperature: {temperature}"):
            Decoding(temperature=temperature)
    with pytest.raises(ValueError, match="beams: 0"):
        cycle_lm.generate([], trie, 0)


@pytest.mark.parametrize("history", [1, 3])
def test_what_follows_as_many_items_as_are_read_is_learned(history: int):
    """Of a cycle each item tells the next, so also one that is all that is read."""
    schedule = Schedule(epochs=15, batch_items=100, downsample_threshold=1.0)
    config = SmallLMConfig(dim=32, history=history, schedule=schedule)
    model = SmallLM.train(cycle_sequences(120, 0), [], LEVELS, SIZE, config, seed=0)
    trie = SidTrie(CYCLE, SIZE)
    for at in range(5):
        past = History(CYCLE[(at + np.arange(history)) % 5], np.eye(history, 8, dtype=np.float32))
        (beams,) = model.generate([past], trie, 1)
        assert beams.sids[0].tolist() == CYCLE[(at + history) % 5].tolist() and beams.logprobs[0] > np.log(0.8)


class _Killed(Exception):
    pass


@pytest.mark.parametrize("killed_at", [3, 7, 12])
def test_an_interrupted_training_goes_on_to_the_same_weights(tmp_path: Path, killed_at: int):
    config = SmallLMConfig(dim=16, schedule=Schedule(epochs=4, batch_items=100, downsample_threshold=1.0))
    data = cycle_sequences(40, 0), cycle_sequences(8, 1)
    straight = SmallLM.train(*data, LEVELS, SIZE, config, seed=0)
    steps: list[int] = []

    def kill(step: int, total: int, loss: float) -> None:
        if step == killed_at:
            raise _Killed

    resume = Resume(tmp_path / "state.safetensors", every=2)
    with pytest.raises(_Killed):
        SmallLM.train(*data, LEVELS, SIZE, config, seed=0, on_progress=kill, resume=resume)
    resumed = SmallLM.train(
        *data, LEVELS, SIZE, config, seed=0, on_progress=lambda step, *_: steps.append(step), resume=resume
    )
    assert steps[0] > 1, "it did not start anew"
    assert resumed.version == straight.version
    assert resumed.validation_losses == straight.validation_losses
    # Of another seed it is not taken up, and a damaged one is refused.
    other = SmallLM.train(*data, LEVELS, SIZE, config, seed=1, resume=resume)
    assert other.version == SmallLM.train(*data, LEVELS, SIZE, config, seed=1).version
    resume.path.write_bytes(resume.path.read_bytes()[:50])
    with pytest.raises(ValueError, match=r"state\.safetensors"):
        SmallLM.train(*data, LEVELS, SIZE, config, seed=1, resume=resume)


@pytest.mark.parametrize("changed", ["heads", "dropout", "split"])
def test_the_state_of_another_training_is_passed_over(tmp_path: Path, changed: str):
    schedule = Schedule(epochs=2, batch_items=100, downsample_threshold=1.0)
    config = SmallLMConfig(dim=16, schedule=schedule)
    sequences, validation = cycle_sequences(20, 0), cycle_sequences(4, 1)
    resume = Resume(tmp_path / "state.safetensors", every=2)
    SmallLM.train(sequences, validation, LEVELS, SIZE, config, 0, resume=resume)
    if changed == "heads":
        config = SmallLMConfig(dim=16, heads=4, schedule=schedule)
    elif changed == "dropout":
        config = SmallLMConfig(dim=16, dropout=0.3, schedule=schedule)
    else:
        sequences, validation = sequences[:-2], [*sequences[-2:], *validation]
    steps: list[int] = []
    SmallLM.train(
        sequences, validation, LEVELS, SIZE, config, 0, on_progress=lambda step, *_: steps.append(step), resume=resume
    )
    assert steps[:1] == [1]


@pytest.mark.parametrize(
    ("broken", "named"), [(True, "loss nan at step 1;"), (False, "validation loss nan at step 3;")]
)
def test_training_that_diverges_is_refused_and_leaves_no_state(tmp_path: Path, broken: bool, named: str):
    network = torch.nn.Linear(1, 1)

    def likelihood(cut: list[np.ndarray]) -> torch.Tensor:
        loss = network(torch.ones(1)).sum() ** 2
        return loss * torch.nan if network.training == broken else loss

    resume = Resume(tmp_path / "state.safetensors", every=1000)
    data = cycle_sequences(20, 0), cycle_sequences(4, 1)
    with pytest.raises(ValueError, match=f"diverged: {named} lower learning_rate"):
        train(network, likelihood, 12, *data, Schedule(batch_items=100, downsample_threshold=1.0), 0, resume=resume)
    assert not resume.path.exists()


def test_sids_and_tries_that_do_not_fit_are_refused(cycle_lm: SmallLM):
    train = cycle_sequences(4, 0)
    with pytest.raises(ValueError, match=r"sequences\[1\]\[2\]\[0\]: 9"):
        bad = train[0].copy()
        bad[2, 0] = 9
        SmallLM.train([train[0], bad], [], LEVELS, SIZE, SmallLMConfig(), seed=0)
    with pytest.raises(ValueError, match="sequences"):
        SmallLM.train([train[0][:0]], [], LEVELS, SIZE, SmallLMConfig(), seed=0)
    with pytest.raises(ValueError, match="trie"):
        cycle_lm.generate([history_of(range(3))], SidTrie(CYCLE[:, :2], SIZE), 3)


def test_training_is_deterministic_by_seed_and_leaves_the_global_generator_alone():
    def train(seed: int) -> str:
        config = SmallLMConfig(dim=16, schedule=Schedule(epochs=1))
        return SmallLM.train(cycle_sequences(10, 0), cycle_sequences(3, 1), LEVELS, SIZE, config, seed).version

    torch.manual_seed(123)
    expected = torch.rand(1)
    torch.manual_seed(123)
    assert train(0) == train(0)
    assert train(0) != train(1)
    assert torch.equal(torch.rand(1), expected)


def test_save_and_load_give_the_same_answers_and_damage_is_refused(cycle_lm: SmallLM, tmp_path: Path):
    cycle_lm.save(tmp_path)
    loaded = load_generator(tmp_path)
    assert loaded.version == cycle_lm.version
    trie = SidTrie(CYCLE, SIZE)
    before, after = (g.generate([history_of(range(4))], trie, 5)[0] for g in (cycle_lm, loaded))
    np.testing.assert_array_equal(before.logprobs, after.logprobs)
    (weights,) = tmp_path.glob("*.safetensors")
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    with pytest.raises(ValueError, match="version"):
        load_generator(tmp_path)
    weights.write_bytes(bytes(data[: len(data) // 2]))
    with pytest.raises(ValueError, match="does not fit the weights"):
        load_generator(tmp_path)


@pytest.mark.parametrize("text", ["{}", "not json", json.dumps({"kind": "oracle"})])
def test_an_unknown_generator_is_refused(tmp_path: Path, text: str):
    with pytest.raises(FileNotFoundError):
        load_generator(tmp_path)
    (tmp_path / "generator.json").write_text(text)
    with pytest.raises(ValueError, match=r"generator\.json"):
        load_generator(tmp_path)


@given(st.integers(0, 10**6), st.integers(1, 30), st.integers(1, 12))
@settings(max_examples=40)
def test_history_clusters_answer_with_what_the_user_met(seed, length, beams):
    sids, vectors = catalogue(seed)
    rows = np.random.default_rng(seed).integers(0, len(sids), size=length)
    history = History(sids[rows], vectors[rows])
    trie = SidTrie(sids[: len(sids) // 2], SIZE)
    (found,) = HistoryClusters().generate([history], trie, beams)
    (again,) = HistoryClusters().generate([history], trie, beams)
    np.testing.assert_array_equal(found.sids, again.sids)
    met = {tuple(sid) for sid in history.sids.tolist() if trie.contains(sid)}
    assert {tuple(sid) for sid in found.sids.tolist()} <= met
    assert len(found) <= beams
    assert len(found) == 0 if not met else abs(np.exp(found.logprobs).sum() - 1) < 1e-5
    assert (np.diff(found.logprobs) <= 1e-6).all()


@given(st.integers(0, 10**6), st.integers(0, 20))
@settings(max_examples=40)
def test_history_clusters_pass_over_what_the_trie_does_not_hold(seed, held):
    sids, vectors = catalogue(seed)
    trie = SidTrie(sids[:held], SIZE)
    strange = np.random.default_rng(seed).integers(-1, SIZE + 2, size=sids.shape).astype(np.int32)
    history = History(np.concatenate((sids, strange)), np.concatenate((vectors, vectors)))
    (found,) = HistoryClusters().generate([history], trie, len(history))
    assert {tuple(sid) for sid in found.sids.tolist()} <= {tuple(sid) for sid in sids[:held].tolist()}
    kept = np.array([trie.contains(sid) for sid in history.sids.tolist()], bool)
    (expected,) = HistoryClusters().generate([History(history.sids[kept], history.vectors[kept])], trie, len(history))
    np.testing.assert_array_equal(found.sids, expected.sids)
    np.testing.assert_array_equal(found.logprobs, expected.logprobs)
    with pytest.raises(ValueError, match="levels"):
        HistoryClusters().generate([History(history.sids[:, :2], history.vectors)], trie, 3)


def test_of_equally_near_items_the_newest_stands_for_a_cluster():
    rng = np.random.default_rng(0)
    pair = rng.normal(size=(200, 2, DIM)).astype(np.float32)
    pair /= np.linalg.norm(pair, axis=2, keepdims=True)
    sids = np.array([[0, 0, 0], [1, 1, 1]], dtype=np.int32)
    histories = [History(sids, vectors) for vectors in pair]
    answers = HistoryClusters().generate(histories, SidTrie(sids, SIZE), 1)
    assert all(answer.sids.tolist() == [[1, 1, 1]] for answer in answers)


@given(st.integers(0, 10**6), st.integers(1, 30), st.integers(1, 12))
@settings(max_examples=40)
def test_history_clusters_can_answer_with_what_was_not_met(seed, length, beams):
    sids, vectors = catalogue(seed)
    rows = np.random.default_rng(seed).integers(0, len(sids) // 2, size=length)
    history = History(sids[rows], vectors[rows])
    trie = SidTrie(sids, SIZE, vectors)
    (found,) = HistoryClusters(exclude_seen=True).generate([history], trie, beams)
    met = set(map(tuple, history.sids.tolist()))
    assert not set(map(tuple, found.sids.tolist())) & met
    assert all(trie.contains(sid) for sid in found.sids.tolist())
    assert 0 < len(found) <= beams
    assert abs(np.exp(found.logprobs).sum() - 1) < 1e-5
    if beams == 1:
        unseen = [row for row in range(len(sids)) if tuple(sids[row].tolist()) not in met]
        centroids = SidCentroids(sids, vectors)
        near = centroids.vectors_of(sids[unseen]) @ history.vectors.sum(axis=0)
        assert near.max() - centroids.vectors_of(found.sids)[0] @ history.vectors.sum(axis=0) < 1e-5


def test_history_clusters_separate_two_interests(tmp_path: Path):
    sids = np.array([[0, 0, 0], [1, 1, 1]], dtype=np.int32)
    axes = np.eye(2, DIM, dtype=np.float32)
    rows = np.array([0, 0, 0, 1])
    generator = HistoryClusters()
    (found,) = generator.generate([History(sids[rows], axes[rows])], SidTrie(sids, SIZE), 5)
    assert found.sids.tolist() == [[0, 0, 0], [1, 1, 1]]
    np.testing.assert_allclose(np.exp(found.logprobs), [0.75, 0.25], atol=1e-6)
    generator.save(tmp_path)
    assert load_generator(tmp_path).version == generator.version


@pytest.mark.parametrize("weight", [0.5, 8.0])
def test_anchors_near_the_history_are_the_formula(cycle_lm: SmallLM, tmp_path: Path, weight: float):
    sids, vectors = catalogue(11, n=40)
    trie, history = SidTrie(sids, SIZE, vectors), History(sids[:6], vectors[:6])
    near = NearHistory(cycle_lm, weight, 3)
    (found,) = near.generate([history], trie, 5)
    (wide,) = cycle_lm.generate([history], trie, 15)
    centroids = SidCentroids(sids, vectors)
    score = {}
    for sid, logprob in zip(wide.sids, wide.logprobs, strict=True):
        closest = max(float(centroids.vectors_of(sid[None])[0] @ item) for item in history.vectors)
        score[tuple(sid.tolist())] = float(logprob) + weight * closest
    total = np.logaddexp.reduce(list(score.values()))
    best = sorted(score, key=lambda sid: (-score[sid], sid))[:5]
    assert [tuple(sid) for sid in found.sids.tolist()] == best
    np.testing.assert_allclose(found.logprobs, [score[sid] - total for sid in best], atol=1e-5)

    none = History(sids[:0], vectors[:0])
    (without,) = near.generate([none], trie, 5)
    (wide,) = cycle_lm.generate([none], trie, 15)
    np.testing.assert_array_equal(without.sids, wide.sids[:5])
    np.testing.assert_array_equal(without.logprobs, wide.logprobs[:5])
    with pytest.raises(ValueError, match="beams: 0"):
        near.generate([history], trie, 0)
    near.save(tmp_path)
    loaded = load_generator(tmp_path)
    assert NearHistory(cycle_lm, 8, 3).version == NearHistory(cycle_lm, 8.0, 3).version
    others = NearHistory(cycle_lm, 2 * weight, 3), NearHistory(cycle_lm, weight, 4)
    assert loaded.version == near.version and near.version not in {other.version for other in others}
    np.testing.assert_array_equal(loaded.generate([history], trie, 5)[0].sids, found.sids)


def test_what_keeps_no_anchors_near_the_history_is_refused(cycle_lm: SmallLM):
    for weight in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match=f"weight: {weight}"):
            NearHistory(cycle_lm, weight, 3)
    with pytest.raises(ValueError, match="candidates: 0"):
        NearHistory(cycle_lm, 1.0, 0)
    sids, vectors = catalogue(11, n=40)
    with pytest.raises(ValueError, match="without vectors"):
        NearHistory(cycle_lm, 1.0, 3).generate([History(sids[:6], vectors[:6])], SidTrie(sids, SIZE), 5)


class Expecting:
    """A generator that names the same SIDs for everybody, each a little less probable than the one before."""

    version = "expecting"

    def __init__(self, sids: np.ndarray) -> None:
        self.sids = sids

    def generate(self, histories, trie, beams):
        found = self.sids[:beams]
        return [Beams(found, -0.02 * np.arange(1.0, len(found) + 1, dtype=np.float32)) for _ in histories]

    def save(self, directory: Path) -> None:
        raise NotImplementedError


@pytest.mark.parametrize("near", [True, False])
def test_the_weight_is_the_one_that_finds_what_is_taken_next(near: bool):
    """Items of 12 groups. A user goes on within a group, or, where the history tells nothing, takes what the model
    names first, whatever the user had before."""
    rng = np.random.default_rng(5)
    groups = np.arange(120) % 12
    centres = rng.normal(size=(12, DIM))
    vectors = (centres[groups] + 0.1 * rng.normal(size=(120, DIM))).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    sids = np.array([[n // 36, n % 36 // 6, n % 6] for n in range(120)], np.int32)
    trie = SidTrie(sids, 6, vectors)
    sequences = []
    for user in range(40):
        mine = np.flatnonzero(groups == user % 11 + 1)
        past = rng.choice(mine, 8, replace=False)
        sequences.append(sids[past if near else np.append(past[:6], rng.choice(np.flatnonzero(groups == 0), 2, False))])
    first = np.concatenate([np.flatnonzero(groups == 0), rng.permutation(np.flatnonzero(groups > 0))])
    choice = choose_weight(Expecting(sids[first]), sequences, trie, 5, 24)
    assert choice.weight == (WEIGHT if near else 0.0) and choice.users == 40
    assert (choice.near > choice.alone) == near and max(choice.near, choice.alone) > 0.3
    few = choose_weight(Expecting(sids[first]), sequences[:19], trie, 5, 24)
    nobody = choose_weight(Expecting(sids[first]), [s[:1] for s in sequences], trie, 5, 24)
    assert (few.weight, few.users, nobody.weight, nobody.users) == (WEIGHT, 19, WEIGHT, 0)
    nothing = choose_weight(Expecting(sids[:0]), sequences, trie, 5, 24)
    assert (nothing.weight, nothing.alone) == (WEIGHT, nothing.near)


def test_anchors_are_the_means_of_the_items_that_carry_a_sid():
    sids = np.array([[0, 0, 0], [0, 0, 0], [1, 1, 1]], dtype=np.int32)
    axes = np.eye(3, dtype=np.float32)
    beams = Beams(np.array([[0, 0, 0], [1, 1, 1]], np.int32), np.array([-0.5, -1.0], np.float32))
    anchors = anchors_of(beams, SidCentroids(sids, axes), History(sids[:1], axes[:1]))
    np.testing.assert_allclose(anchors.vectors, [[0.5**0.5, 0.5**0.5, 0], [0, 0, 1]], atol=1e-6)
    np.testing.assert_allclose(anchors.history_factor, [0.5**0.5, 0], atol=1e-6)
    without = anchors_of(beams, SidCentroids(sids, axes), History(sids[:0], axes[:0]))
    assert without.history_factor.tolist() == [0, 0]


sequences_of_sids = st.lists(
    st.lists(st.tuples(*[st.integers(0, 2)] * 2), max_size=12).map(lambda s: np.array(s, np.int32).reshape(-1, 2)),
    min_size=1,
    max_size=6,
)


@given(sequences_of_sids, st.floats(1e-4, 1.0))
def test_keep_probability_is_its_formula(sequences, threshold):
    every = [tuple(sid) for sequence in sequences for sid in sequence.tolist()]
    kept = keep_probabilities(sequences, threshold)
    assert [len(k) for k in kept] == [len(s) for s in sequences]
    for sequence, probabilities in zip(sequences, kept, strict=True):
        for sid, p in zip(sequence.tolist(), probabilities, strict=True):
            share = every.count(tuple(sid)) / len(every)
            assert abs(p - min(1.0, (max(threshold, 1 / len(set(every))) / share) ** 0.5)) < 1e-9


def test_sids_of_equal_shares_are_not_popular_however_few_they_are():
    sequences = [np.array([[code, 0] for code in range(5)], np.int32)] * 4
    assert all((kept == 1).all() for kept in keep_probabilities(sequences, 1e-3))
    skewed = [np.array([[0, 0]] * 8 + [[1, 0]] * 2, np.int32)]
    (kept,) = keep_probabilities(skewed, 1e-3)
    np.testing.assert_allclose(kept, [(0.5 / 0.8) ** 0.5] * 8 + [1.0] * 2)


@given(sequences_of_sids, st.integers(1, 5), st.booleans())
def test_windows_lose_nothing_and_keep_order(sequences, size, random_cut):
    rng = np.random.default_rng(0) if random_cut else None
    cut = windows(sequences, size, rng)
    assert all(1 <= len(window) <= size for window in cut)
    joined = [sid for window in cut for sid in window.tolist()]
    assert joined == [sid for sequence in sequences for sid in sequence.tolist()]
    if cut:
        grouped = batches(cut, 8)
        assert sum(map(len, grouped)) == len(cut)


def test_thinning_keeps_order_and_what_is_certain():
    sequence = np.arange(20, dtype=np.int32).reshape(-1, 2)
    (kept,) = thin([sequence], [np.array([1.0, 0.0] * 5)], np.random.default_rng(0))
    assert kept.tolist() == sequence[::2].tolist()
