"""The configuration of a demo run: what lies over what, and that it reads back as it was meant."""

from __future__ import annotations

import tomllib

import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streams.demo.config import Place, install, merged, toml, wanted

names = st.text(min_size=1, max_size=8)
values = st.one_of(st.text(max_size=20), st.booleans(), st.integers(-(2**53), 2**53), st.floats(-1e9, 1e9))
documents = st.recursive(
    st.dictionaries(names, values, max_size=4), lambda inner: st.dictionaries(names, inner, max_size=3), max_leaves=8
)


@given(documents)
def test_what_is_written_reads_back(document):
    assert tomllib.loads(toml(document)) == document


@given(documents, documents)
def test_what_lies_over_wins_and_the_rest_stays(under, over):
    result = merged(under, over)
    assert merged(result, over) == result
    assert set(result) == set(under) | set(over)
    assert all(result[name] == value for name, value in over.items() if not isinstance(value, dict))


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setenv("GPL_CONFIG", "none.toml")  # set by loading; put back afterwards


def test_the_users_file_lies_over_the_demo_and_under_what_makes_the_run(tmp_path):
    own = tmp_path / "own.toml"
    own.write_text('[labels]\nwindow_seconds = 60.0\nmatching = "kernel"\n[kafka]\npartitions = 3\nprefix = "mine."\n')
    place = Place(tmp_path / "run", "gpl-demo-1")
    settings = install(place, wanted(place, own, None), tmp_path / "artefacts", "127.0.0.1:9999")
    assert (settings.labels.window_seconds, settings.labels.matching) == (60.0, "kernel")
    assert settings.labels.allowed_lateness_seconds == 600.0
    assert (settings.kafka.partitions, settings.kafka.prefix) == (3, "gpl-demo-1.")
    assert settings.kafka.bootstrap_servers == "127.0.0.1:9999"
    assert settings.trainer.journal == place.journal
    assert install(place, wanted(place, own, 5.0), tmp_path, "127.0.0.1:1").labels.window_seconds == 5.0


def test_a_key_that_is_none_is_an_error_that_names_it(tmp_path):
    own = tmp_path / "own.toml"
    own.write_text("[labels]\nwindow = 60.0\n")
    place = Place(tmp_path / "run", "gpl-demo-1")
    with pytest.raises(pydantic.ValidationError, match=r"labels\.window"):
        install(place, wanted(place, own, None), tmp_path, "127.0.0.1:9999")
