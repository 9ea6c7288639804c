"""Fitting everything from items and events, and keeping it on disk."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from gpl.anchors.base import History
from gpl.artefacts import Artefacts, ArtefactsError
from gpl.catalogue import ItemContent
from gpl.codes.trie import SidTrie
from gpl.fit import Event, FitOptions, fit
from gpl.labels.calibration import Isotonic, NoCalibration, Platt

ITEMS, GROUPS, DIM = 120, 6, 16


def items(seed: int = 0) -> list[ItemContent]:
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(GROUPS, DIM))
    rows = centres[np.arange(ITEMS) % GROUPS] + 0.3 * rng.normal(size=(ITEMS, DIM))
    return [ItemContent(f"i{n}", "", row.tolist()) for n, row in enumerate(rows)]


def events(users: int = 60, seed: int = 0) -> list[Event]:
    """Users click what is of their group, and are shown everything."""
    rng = np.random.default_rng(seed)
    return [
        Event(f"u{u}", f"i{n}", 100 * t, bool(n % GROUPS == u % GROUPS))
        for u in range(users)
        for t, n in enumerate(rng.choice(ITEMS, 60, replace=False))
    ]


FAST = FitOptions(epochs=2, beams=5)


@pytest.fixture(scope="module")
def fitted() -> Artefacts:
    return fit(items(), [*events(), Event("u0", "unknown", 1, True)], None, FAST, seed=0)


def test_everything_fits_together(fitted: Artefacts):
    assert fitted.space.encoder == "precomputed"
    assert fitted.generator.version.startswith("near-history-")
    assert fitted.report["events_of_unknown_items"] == 1
    assert fitted.report["warnings"] == []
    raw = np.array([item.embedding for item in items()], np.float32)
    vectors = fitted.space.project(raw)
    sids = fitted.quantiser.encode(vectors)
    trie = SidTrie(sids, fitted.quantiser.codebook_size, vectors)
    (beams,) = fitted.generator.generate([History(sids[:6], vectors[:6])], trie, 5)
    assert len(beams) == 5


def test_other_quantisers_and_anchors_near_the_history_are_fitted_saved_and_loaded(tmp_path: Path):
    options = FitOptions(quantiser="rq-vae", levels=2, codebook_size=8, epochs=1, history_weight=3.0, exclude_seen=True)
    made = fit(items(), events(), None, options, seed=0)
    made.save(tmp_path / "a")
    loaded = Artefacts.load(tmp_path / "a")
    assert (loaded.quantiser.kind, loaded.quantiser.levels, loaded.quantiser.codebook_size) == ("rq-vae", 2, 8)
    assert loaded.generator.version == made.generator.version
    assert loaded.generator.version.startswith("near-history-")
    vectors = loaded.space.project(np.array([item.embedding for item in items()], np.float32))
    sids = loaded.quantiser.encode(vectors)
    (beams,) = loaded.generator.generate([History(sids[:6], vectors[:6])], SidTrie(sids, 8, vectors), 6)
    assert not set(map(tuple, beams.sids.tolist())) & set(map(tuple, sids[:6].tolist()))


def test_where_anchors_tell_of_clicks_the_calibration_rises():
    made = fit(items(), events(), None, FitOptions(generator="history", beams=3), seed=0)
    assert isinstance(made.calibration, Platt)
    assert made.calibration.slope > 1
    other = fit(items(), events(), None, FitOptions(generator="history", beams=3, calibration="isotonic"), seed=0)
    assert isinstance(other.calibration, Isotonic)
    assert other.calibration.fitted_on == made.calibration.fitted_on
    assert other.calibration.labels[0] < other.calibration.labels[-1]


def test_deterministic_whatever_the_order_of_events(fitted: Artefacts):
    shuffled = [*events(), Event("u0", "unknown", 1, True)]
    np.random.default_rng(5).shuffle(shuffled)  # type: ignore[arg-type]
    again = fit(items(), [Event(*event) for event in shuffled], None, FAST, seed=0)
    assert again.generator.version == fitted.generator.version
    assert again.space.version == fitted.space.version
    assert again.quantiser.version == fitted.quantiser.version
    assert fit(items(), events(), None, FAST, seed=1).generator.version != fitted.generator.version


def test_history_goes_by_clicks_and_what_comes_after_it_by_exposures():
    """Clicks in order are i1, i2, i3, i0: anchors are of the first two, and i3, i4, i5 were shown after them."""
    clicked = {0: 10, 1: 2, 2: 3, 3: 4}
    shown = [Event("u", f"i{n}", n + 1, n in clicked, clicked.get(n)) for n in range(6)]
    report = fit(items(), shown, None, FitOptions(generator="history")).report
    assert report["warnings"] == ["3 exposures after their user's anchors, 1 of the rarer kind: no calibration"]
    assert report["newest_ts"] == 10


def test_times_of_numpy_are_times(tmp_path: Path):
    past = [event._replace(ts=np.int64(event.ts)) for event in events()]
    fit(items(), past, None, FitOptions(generator="history"), seed=0).save(tmp_path / "artefacts")


def test_too_little_data_falls_back_and_says_so():
    made = fit(items(), events(users=3), None, FAST, seed=0)
    assert made.generator.version.startswith("history-")
    assert any("history clusters" in warning for warning in made.report["warnings"])
    nothing = fit(items(), [], None, FAST, seed=0)
    assert isinstance(nothing.calibration, NoCalibration)
    assert any("no calibration" in warning for warning in nothing.report["warnings"])


def test_an_item_without_its_vector_is_named():
    with pytest.raises(ValueError, match="'bad'"):
        fit([*items(), ItemContent("bad", "text only")], [], None, FAST)


def test_an_item_that_comes_twice_or_lies_at_the_mean_is_named():
    with pytest.raises(ValueError, match=r"item 'i3': its id comes twice, items\[3\] and items\[120\]"):
        fit([*items(), items()[3]], [], None, FAST)
    corners = [ItemContent(name, "", row) for name, row in (("a", [1.0, 0.0]), ("b", [0.0, 1.0]), ("c", [0.5, 0.5]))]
    with pytest.raises(ValueError, match="item 'c': its raw vector equals the mean"):
        fit(corners, [], None, FAST)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("generator", "large-lm"),
        ("quantiser", "rq"),
        ("calibration", "plat"),
        ("levels", 0),
        ("codebook_size", 0),
        ("beams", 0),
        ("history", None),
        ("epochs", 0),
        ("calibration_users", 0),
        ("temperature", 0.0),
        ("downsample_threshold", float("nan")),
        ("history_weight", float("inf")),
        ("history_weight", -0.1),
        ("device", "gpu"),
        ("device", "cuda:99"),
    ],
)
def test_options_name_what_they_refuse(name: str, value: object):
    with pytest.raises(ValueError, match=f"^{name}: {value!r},"):
        FitOptions(**{name: value})  # type: ignore[arg-type]


def test_artefacts_survive_the_disk(fitted: Artefacts, tmp_path: Path):
    fitted.save(tmp_path / "a")
    loaded = Artefacts.load(tmp_path / "a")
    for part in ("space", "quantiser", "generator"):
        assert getattr(loaded, part).version == getattr(fitted, part).version
    assert loaded.calibration == fitted.calibration
    assert loaded.report["items"] == ITEMS
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    with pytest.raises(FileExistsError):
        fitted.save(tmp_path / "a")


def test_who_generates_nothing_need_not_load_the_generator(fitted: Artefacts, tmp_path: Path):
    fitted.save(tmp_path / "a")
    loaded = Artefacts.load(tmp_path / "a", with_generator=False)
    assert loaded.generator.version == fitted.generator.version
    with pytest.raises(RuntimeError, match="not loaded"):
        loaded.generator.generate([], SidTrie(np.zeros((0, 3)), 8), 1)
    with pytest.raises(RuntimeError, match="not loaded"):
        loaded.save(tmp_path / "b")
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("how", ["flip", "truncate", "remove", "add", "manifest"])
def test_damaged_artefacts_are_refused_and_the_file_is_named(fitted: Artefacts, tmp_path: Path, how: str):
    fitted.save(tmp_path / "a")
    victim = sorted((tmp_path / "a").rglob("*.safetensors"))[0]
    if how == "flip":
        data = bytearray(victim.read_bytes())
        data[len(data) // 2] ^= 1
        victim.write_bytes(bytes(data))
    elif how == "truncate":
        victim.write_bytes(victim.read_bytes()[:-4])
    elif how == "remove":
        victim.unlink()
    elif how == "add":
        victim = victim.with_name("stray.bin")
        victim.write_bytes(b"x")
    else:
        victim = tmp_path / "a" / "manifest.json"
        victim.write_text("{")
    with pytest.raises(ArtefactsError, match=victim.name):
        Artefacts.load(tmp_path / "a")


@pytest.mark.parametrize("key", ["versions", "sha256", "report", "calibration"])
def test_a_manifest_that_lacks_a_part_is_refused(fitted: Artefacts, tmp_path: Path, key: str):
    fitted.save(tmp_path / "a")
    path = tmp_path / "a" / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({name: value for name, value in manifest.items() if name != key}))
    with pytest.raises(ArtefactsError, match=r"manifest\.json"):
        Artefacts.load(tmp_path / "a")
    manifest["versions"]["generator"] = "small-lm-000000000000"
    path.write_text(json.dumps(manifest))
    with pytest.raises(ArtefactsError, match="small-lm-000000000000"):
        Artefacts.load(tmp_path / "a")


def test_missing_artefacts_say_how_to_make_them(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="gpl fit"):
        Artefacts.load(tmp_path / "none")
