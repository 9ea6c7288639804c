"""Converters: a made sample in each source's format, and the real sets where they lie beside the project."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest

from gpl.evaluation import neutral
from gpl.evaluation.dataset import DataError
from gpl.evaluation.sources import BUILT_IN, CONVERTERS, movielens, open_dataset

SHARED = Path(__file__).resolve().parents[4] / "shared" / "data"
REAL = {
    "jester": "jester",
    "kuairec": "kuairec",
    "coat": "coat",
    "mind": "mind_subset",
    "amazon-office": "amazon_office",
    "online-retail": "online_retail",
}


def write(directory: Path, **files: str) -> Path:
    for name, text in files.items():
        path = directory / name.replace("__", ".")
        if path.suffix == ".gz":
            path.write_bytes(gzip.compress(text.encode()))
        else:
            path.write_text(text)
    return directory


def test_jester_keeps_users_who_rated_every_joke(tmp_path: Path) -> None:
    write(
        tmp_path,
        jokes__csv='joke,text\nj1,"Two, jokes"\nj2,One\n',
        ratings__csv__gz="user,joke,rating\nu1,j1,7.5\nu1,j2,-3\nu2,j1,9\n",
    )
    dataset = CONVERTERS["jester"](tmp_path)
    assert dataset.kind == "full" and dataset.users == ["u1"]
    assert dataset.items[0].text == "Two, jokes"
    assert dataset.truth is not None and dataset.truth.relevance.tolist() == [1.0, 0.0]


def test_kuairec_lists_positives_and_every_other_cell_is_negative(tmp_path: Path) -> None:
    write(
        tmp_path,
        small_items__csv="video_id\n5\n7\n",
        small_users__csv="user_id\n1\n2\n",
        small_positives__csv="user_id,video_id\n1,7\n2,5\n9,5\n",
        big_positives_train__csv="user_id,video_id\n3,7\n4,7\n",
        videos__csv="video_id,caption,topic_tag,first_level_category_name,"
        "second_level_category_name,third_level_category_name\n"
        '5,a cat,"[cats, fun]",pets,UNKNOWN,UNKNOWN\n7,,[],music,,\n',
    )
    dataset = CONVERTERS["kuairec"](tmp_path)
    assert dataset.truth is not None and dataset.truth.every_cell
    assert list(zip(dataset.truth.user.tolist(), dataset.truth.item.tolist(), strict=True)) == [(0, 1), (1, 0)]
    assert [item.text for item in dataset.items] == ["a cat. cats, fun. pets", "music"]
    assert dataset.popularity is not None and dataset.popularity.tolist() == [0.0, 2.0]


def coat(directory: Path, **more: str) -> Path:
    return write(
        directory,
        train__ascii="5 0 1 4 0 0\n0 4 0 0 2 5\n",
        item_features__ascii="\n".join(["1 0 1 0", "0 1 0 1"] * 3) + "\n",
        item_features_map__txt="gender:men\ngender:women\njackettype:pea\ncolor:black\n",
        **more,
    )


def test_coat_takes_the_random_exposure_as_truth_where_there_is_one(tmp_path: Path) -> None:
    dataset = CONVERTERS["coat"](coat(tmp_path, test__ascii="4 5 0 0 0 1\n0 0 3 4 0 0\n"))
    assert dataset.log is not None and dataset.log.exposed[0].tolist() == [0, 2, 3]
    assert dataset.log.clicked.tolist() == [True, False, True, True, False, True]
    truth = dataset.truth
    assert truth is not None
    pairs = zip(truth.user.tolist(), truth.item.tolist(), truth.relevance.tolist(), strict=True)
    # The coat that user 0 also rated himself is exposed: its feedback is in the log, so it is no truth.
    assert list(pairs) == [(0, 1, 1.0), (0, 5, 0.0), (1, 2, 0.0), (1, 3, 1.0)]
    assert "pea" in dataset.items[0].text


def test_coat_holds_out_a_third_without_one(tmp_path: Path) -> None:
    dataset = CONVERTERS["coat"](coat(tmp_path))
    assert dataset.log is not None and dataset.log.exposed.sizes.tolist() == [2, 2]


def test_mind_splits_users_and_takes_the_history_along(tmp_path: Path) -> None:
    rows = [f"{n}\tU{n}\t11/{10 + n % 3}/2019 2:14:46 PM\tN1 N9\tN1-0 N2-1" for n in range(20)]
    write(tmp_path, behaviors__tsv="\n".join(rows) + "\n", news__tsv="N1\tnews\tsub\tTitle\tAbstract\turl\t[]\t[]\n")
    dataset = CONVERTERS["mind"](tmp_path)
    assert dataset.log is not None and dataset.truth is not None and dataset.events is not None
    assert 0 < len(dataset.log) < 20
    assert len(dataset.log) + len(np.unique(dataset.truth.user)) == 20
    assert [(item.item_id, item.text) for item in dataset.items] == [("N1", "Title. Abstract"), ("N2", "")]
    assert len(dataset.events.user) == 20  # N9 was neither shown nor has a title


def test_amazon_leaves_undated_events_out(tmp_path: Path) -> None:
    write(
        tmp_path,
        items__csv="item,title,description,brand\n0,Ink,Ink. Black ink.,HP\n1,HP Paper, ,HP\n",
        events__csv="user,item,order,global_row,split\nA,1,2,,test\nA,0,1,,train\nA,0,0,,undated\nB,1,0,,train\n",
    )
    dataset = CONVERTERS["amazon-office"](tmp_path)
    assert dataset.events is not None
    assert dataset.events.user.tolist() == [0, 0, 1] and dataset.events.item.tolist() == [0, 1, 1]
    assert [item.text for item in dataset.items] == ["HP Ink. Black ink.", "HP Paper"]


def test_retail_invoices_are_sessions(tmp_path: Path) -> None:
    write(
        tmp_path,
        items__csv="item,title,median_price,in_5core\n10,GLOBE,1,True\n11,RUBBER,1,True\n",
        events__csv="user,item,timestamp,basket,qty\n7,11,200,b2,1\n7,10,100,b1,1\n7,11,100,b1,1\n7,99,100,b1,1\n",
    )
    dataset = CONVERTERS["online-retail"](tmp_path)
    assert dataset.events is not None and dataset.events.item.tolist() == [0, 1, 1]
    assert len(set(dataset.events.session.tolist())) == 2


@pytest.mark.parametrize("name", sorted(CONVERTERS))
def test_an_empty_directory_is_a_clear_error(name: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="expected"):
        CONVERTERS[name](tmp_path)


def test_a_missing_column_and_a_bad_number_are_named(tmp_path: Path) -> None:
    write(tmp_path, jokes__csv="joke,text\nj1,a\n", ratings__csv="user,joke\nu1,j1\n")
    with pytest.raises(DataError, match="column 'rating' is missing"):
        CONVERTERS["jester"](tmp_path)
    write(tmp_path, ratings__csv="user,joke,rating\nu1,j1,high\n")
    with pytest.raises(DataError, match="rating 'high', expected a number"):
        CONVERTERS["jester"](tmp_path)


@pytest.mark.parametrize("name", sorted(REAL))
def test_the_real_set_converts_and_is_read_back(name: str, tmp_path: Path) -> None:
    source = SHARED / REAL[name]
    if not source.is_dir():
        pytest.skip(f"{name}: its files are not beside the project")
    dataset = CONVERTERS[name](source)
    neutral.save(dataset, tmp_path / "out", name)
    again = open_dataset(str(tmp_path / "out"))
    assert again.kind == dataset.kind and len(again.items) == len(dataset.items)
    for part in ("events", "log"):
        assert (getattr(again, part) is None) == (getattr(dataset, part) is None)
    if dataset.truth is not None:
        assert again.truth is not None
        assert (again.truth.relevance > 0).sum() == (dataset.truth.relevance > 0).sum()
        assert not dataset.truth.every_cell or again.users == dataset.users


def test_movielens_comes_with_an_installed_package() -> None:
    split, whole = BUILT_IN["ml-100k-time"](), BUILT_IN["ml-100k-completed"]()
    assert (len(split.users), len(split.items)) == (len(whole.users), len(whole.items)) == (943, 1682)
    assert split.log is not None and split.truth is not None and whole.truth is not None
    exposed = set(zip(split.log.user[split.log.exposed.rows].tolist(), split.log.exposed.values.tolist(), strict=True))
    held_out = set(zip(split.truth.user.tolist(), split.truth.item.tolist(), strict=True))
    assert not exposed & held_out
    # Ratings 4 and 5 are 8.8% of the cells where users do not choose what they rate.
    assert whole.truth.every_cell
    assert len(whole.truth.user) / (943 * 1682) == pytest.approx(0.088, abs=1e-3)


def test_matrix_factorisation_recovers_a_matrix_of_low_rank() -> None:
    rng = np.random.default_rng(0)
    matrix = rng.normal(size=(60, 3)) @ rng.normal(size=(3, 50)) + rng.normal(size=(1, 50))
    user, item = np.nonzero(rng.random(matrix.shape) < 0.5)
    predicted = movielens.factorise(user, item, matrix[user, item], matrix.shape, rank=3, seed=0, regularisation=0.01)
    hidden = np.ones(matrix.shape, dtype=bool)
    hidden[user, item] = False
    assert np.corrcoef(predicted[hidden], matrix[hidden])[0, 1] > 0.95
