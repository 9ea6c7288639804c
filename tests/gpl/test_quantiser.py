import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpl.codes import ResidualKMeans, ResidualVAE, VAEConfig, load_quantiser, suggest_codebook_size, suggest_levels


def unit_rows(n, dim, seed):
    rows = np.random.default_rng(seed).standard_normal((n, dim)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def clustered(clusters, per_cluster, dim, seed, spread=0.02):
    rng = np.random.default_rng(seed)
    centres = np.repeat(unit_rows(clusters, dim, seed), per_cluster, axis=0)
    return (centres + spread * rng.standard_normal(centres.shape)).astype(np.float32)


def test_first_level_finds_well_separated_clusters():
    vectors = clustered(clusters=8, per_cluster=30, dim=16, seed=0)
    codes = ResidualKMeans.fit(vectors, levels=2, codebook_size=8, seed=0).encode(vectors)
    groups = codes[:, 0].reshape(8, 30)
    assert (groups == groups[:, :1]).all()
    assert len(set(groups[:, 0].tolist())) == 8


def test_encode_takes_the_nearest_centroid_of_each_level_and_decode_sums_them():
    vectors = unit_rows(300, 12, 1)
    quantiser = ResidualKMeans.fit(vectors, levels=3, codebook_size=16, seed=0)
    new = unit_rows(50, 12, 2)
    codes = quantiser.encode(new)

    assert codes.dtype == np.int32
    for vector, sid, decoded in zip(new, codes, quantiser.decode(codes), strict=True):
        residual, total = vector.astype(np.float64), np.zeros(12)
        for level, code in enumerate(sid):
            distances = np.linalg.norm(quantiser.codebooks[level, : quantiser.used[level]] - residual, axis=1)
            assert distances[code] <= distances.min() + 1e-5
            residual = residual - quantiser.codebooks[level, code]
            total += quantiser.codebooks[level, code]
        np.testing.assert_allclose(decoded, total, atol=1e-5)


def test_each_level_lowers_the_error_and_keeps_its_codes_in_use():
    # Isotropic vectors are the hard case: k-means++ leaves most of a later level in one cluster.
    vectors = unit_rows(1500, 64, 3)
    errors = []
    for levels in (1, 2, 3):
        report = ResidualKMeans.fit(vectors, levels, 64, seed=0).report(vectors)
        errors.append(report["relative_error"])
        assert min(report["perplexity"]) > 32
    assert errors == sorted(errors, reverse=True)
    assert errors[0] < 1
    assert report["collision_rate"] < 0.05


def test_same_seed_same_codebooks_another_seed_others():
    vectors = unit_rows(200, 8, 4)
    first, second, third = (ResidualKMeans.fit(vectors, 3, 8, seed) for seed in (5, 5, 6))
    np.testing.assert_array_equal(first.codebooks, second.codebooks)
    assert first.version == second.version != third.version


def test_input_is_left_alone():
    vectors = unit_rows(50, 8, 4)
    before = vectors.copy()
    ResidualKMeans.fit(vectors, 2, 4, 0).encode(vectors)
    np.testing.assert_array_equal(vectors, before)


@given(distinct=st.integers(1, 6), copies=st.integers(1, 4), size=st.integers(1, 9), seed=st.integers(0, 3))
def test_few_or_repeated_vectors_get_a_code_each_and_equal_ones_the_same(distinct, copies, size, seed):
    values = unit_rows(distinct, 5, seed)
    vectors = np.tile(values, (copies, 1))
    quantiser = ResidualKMeans.fit(vectors, levels=3, codebook_size=size, seed=seed)
    codes = quantiser.encode(vectors)

    np.testing.assert_array_equal(codes, np.tile(codes[:distinct], (copies, 1)))
    assert np.isfinite(quantiser.codebooks).all()
    assert (codes < np.asarray(quantiser.used)).all()
    assert all(used <= min(size, distinct) for used in quantiser.used)
    if distinct <= size:
        assert len(np.unique(codes[:, 0])) == distinct
        np.testing.assert_allclose(quantiser.decode(codes), vectors, atol=1e-5)
        assert quantiser.used[1:] == (1, 1), "nothing is left over, so later levels tell nothing apart"
        assert quantiser.report(vectors)["relative_error"] < 1e-6


def test_report_counts_codes_collisions_and_error():
    vectors = np.array([[1, 0], [1, 0], [0, 1], [-1, 0]], np.float32)
    report = ResidualKMeans.fit(vectors, levels=1, codebook_size=4, seed=0).report(vectors)
    assert report["items"] == 4
    assert report["used_codes"] == [3]
    assert report["collision_rate"] == 0.5
    assert report["perplexity"][0] == pytest.approx(np.exp(-(0.5 * np.log(0.5) + 2 * 0.25 * np.log(0.25))))
    assert report["relative_error"] == pytest.approx(0, abs=1e-9)

    coarse = ResidualKMeans.fit(vectors, levels=1, codebook_size=1, seed=0).report(vectors)
    assert coarse["collision_rate"] == 1.0
    assert coarse["relative_error"] == pytest.approx(1.0, abs=1e-6), "one code is the mean, whose error is the variance"


def test_more_points_than_a_fit_reads_still_all_get_codes():
    vectors = clustered(clusters=4, per_cluster=400, dim=6, seed=7)  # 1,600 rows, 4 x 256 are read
    quantiser = ResidualKMeans.fit(vectors, levels=2, codebook_size=4, seed=0)
    groups = quantiser.encode(vectors)[:, 0].reshape(4, 400)
    assert (groups == groups[:, :1]).all()


def test_saved_quantiser_is_the_same_and_a_mixed_up_directory_is_refused(tmp_path):
    vectors = unit_rows(60, 6, 8)
    quantiser = ResidualKMeans.fit(vectors, 3, 8, seed=0)
    quantiser.save(tmp_path / "a")
    loaded = load_quantiser(tmp_path / "a")
    assert (loaded.version, loaded.used) == (quantiser.version, quantiser.used)
    assert (loaded.levels, loaded.codebook_size, loaded.dim) == (3, 8, 6)
    np.testing.assert_array_equal(loaded.encode(vectors), quantiser.encode(vectors))

    ResidualKMeans.fit(vectors, 3, 8, seed=1).save(tmp_path / "b")
    (tmp_path / "b" / "quantiser.safetensors").replace(tmp_path / "a" / "quantiser.safetensors")
    with pytest.raises(ValueError, match=f"version {quantiser.version}"):
        load_quantiser(tmp_path / "a")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((np.zeros((0, 3)), 3, 8, 0), "no rows"),
        ((np.zeros(3), 3, 8, 0), r"vectors: shape \(3,\)"),
        ((np.array([[0.0], [np.nan]]), 3, 8, 0), r"vectors\[1\]"),
        ((np.eye(3), 0, 8, 0), "levels: 0"),
        ((np.eye(3), 3, 0, 0), "codebook_size: 0"),
    ],
)
def test_fit_names_what_it_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        ResidualKMeans.fit(*arguments)


def test_encode_and_decode_name_what_they_refuse():
    quantiser = ResidualKMeans.fit(np.eye(3, dtype=np.float32), 2, 8, 0)
    with pytest.raises(ValueError, match=r"vectors: shape \(1, 4\), expected \(n, 3\)"):
        quantiser.encode(np.ones((1, 4), np.float32))
    with pytest.raises(ValueError, match=r"codes\[1\]\[0\]: 3, the level has codes 0 to 2"):
        quantiser.decode(np.array([[0, 0], [3, 0]]))
    with pytest.raises(ValueError, match=r"codes: shape \(1, 3\), expected \(n, 2\)"):
        quantiser.decode(np.array([[0, 0, 0]]))


@given(st.integers(1, 10**7))
def test_suggested_size_is_a_power_of_two_near_the_square_root(n):
    size = suggest_codebook_size(n)
    assert size & (size - 1) == 0
    assert size == 8 or size == 1024 or size / 2 < n**0.5 <= size
    assert size > 8 or n <= 64


def test_suggested_size_for_nothing_is_an_error():
    with pytest.raises(ValueError, match="n_items: 0"):
        suggest_codebook_size(0)


@given(st.integers(1, 10**6), st.integers(2, 1024))
def test_suggested_levels_have_room_for_every_item_and_one_to_spare(n, size):
    levels = suggest_levels(n, size)
    assert size ** (levels - 1) >= n
    assert levels == 2 or size ** (levels - 2) < n


# --- rq-vae

QUICK = VAEConfig(hidden=(32,), latent=8, steps=300, batch_size=64)


@pytest.fixture(scope="module")
def vae() -> ResidualVAE:
    return ResidualVAE.fit(clustered(12, 25, 16, seed=0), levels=3, codebook_size=8, seed=0, config=QUICK)


def test_vae_learns_to_reconstruct_and_keeps_its_codes_in_use(vae):
    vectors = clustered(12, 25, 16, seed=0)
    report = vae.report(vectors)
    assert report["relative_error"] < 0.3
    assert min(report["perplexity"]) > 3
    assert report["used_codes"] == list(vae.used)
    groups = vae.encode(vectors)[:, 0].reshape(12, 25)
    assert (groups == groups[:, :1]).mean() > 0.95, "what lies together begins alike"


def test_vae_codes_new_items_by_its_own_formula(vae):
    new = clustered(12, 2, 16, seed=3)
    latent = new.astype(np.float64)
    for at, (weight, bias) in enumerate(vae.encoder):
        latent = (latent / (1 + np.exp(-latent)) if at else latent) @ weight.T + bias
    codes = vae.encode(new)
    for row, sid in zip(latent, codes, strict=True):
        for level, code in enumerate(sid):
            distances = np.linalg.norm(vae.codebooks[level, : vae.used[level]] - row, axis=1)
            assert distances[code] <= distances.min() + 1e-5
            row = row - vae.codebooks[level, code]
    for at in range(len(new)):
        np.testing.assert_array_equal(vae.encode(new[at : at + 1])[0], codes[at])
    assert vae.decode(codes).shape == new.shape


def test_vae_is_deterministic_by_seed():
    vectors = unit_rows(80, 12, 5)
    quick = VAEConfig(hidden=(16,), latent=4, steps=40, batch_size=32)
    first, second, third = (ResidualVAE.fit(vectors, 2, 8, seed, quick) for seed in (1, 1, 2))
    assert first.version == second.version != third.version


@pytest.mark.parametrize(("distinct", "copies", "size"), [(1, 1, 1), (1, 5, 8), (3, 4, 2), (6, 1, 9)])
def test_vae_takes_few_or_repeated_vectors(distinct, copies, size):
    vectors = np.tile(unit_rows(distinct, 5, 0), (copies, 1))
    made = ResidualVAE.fit(vectors, 3, size, 0, VAEConfig(hidden=(8,), latent=4, steps=30))
    codes = made.encode(vectors)
    np.testing.assert_array_equal(codes, np.tile(codes[:distinct], (copies, 1)))
    assert np.isfinite(made.codebooks).all()
    assert (codes < np.asarray(made.used)).all()
    assert made.codebook_size == size


def test_saved_vae_is_the_same_and_damage_is_refused(vae, tmp_path):
    vectors = clustered(12, 25, 16, seed=0)
    vae.save(tmp_path)
    loaded = load_quantiser(tmp_path)
    assert (loaded.kind, loaded.version, loaded.used) == ("rq-vae", vae.version, vae.used)
    assert (loaded.levels, loaded.codebook_size, loaded.dim) == (3, 8, 16)
    np.testing.assert_array_equal(loaded.encode(vectors), vae.encode(vectors))
    weights = tmp_path / "quantiser.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    with pytest.raises(ValueError, match=f"version {vae.version}"):
        load_quantiser(tmp_path)
    weights.write_bytes(bytes(data[:100]))
    with pytest.raises(ValueError, match="does not fit"):
        load_quantiser(tmp_path)


@pytest.mark.parametrize("text", ["{", "{}", '{"kind": "lsh"}'])
def test_an_unknown_quantiser_is_refused(tmp_path, text):
    (tmp_path / "quantiser.json").write_text(text)
    with pytest.raises(ValueError, match=r"quantiser\.json"):
        load_quantiser(tmp_path)


@pytest.mark.parametrize(
    ("changes", "named"), [({"latent": 0}, "latent"), ({"decay": 1.0}, "decay"), ({"hidden": (0,)}, "hidden")]
)
def test_vae_config_names_what_it_refuses(changes, named):
    with pytest.raises(ValueError, match=named):
        VAEConfig(**changes)
