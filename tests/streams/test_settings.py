from __future__ import annotations

from pathlib import Path

import pydantic
import pytest

from streams.settings import load


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GPL_CONFIG", "")  # load() names the file for child processes; undo that after the test
    monkeypatch.delenv("GPL_CONFIG")


def test_environment_over_file_over_defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "my.toml").write_text('[kafka]\nprefix = "file."\npartitions = 4\n')
    monkeypatch.setenv("GPL_KAFKA__PARTITIONS", "5")
    settings = load(tmp_path / "my.toml")
    assert (settings.kafka.prefix, settings.kafka.partitions, settings.labels.window_seconds) == ("file.", 5, 1800)


def test_a_file_in_the_working_directory_is_taken(tmp_path: Path):
    (tmp_path / "gpl.toml").write_text("[labels]\nwindow_seconds = 7\n")
    assert load().labels.window_seconds == 7


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[kafka]\npartitionz = 3\n", "kafka.partitionz"),
        ("[kafka]\npartitions = 0\n", "kafka.partitions"),
        ("[labels]\nwindow_seconds = -1\n", "labels.window_seconds"),
        ("nonsense = 1\n", "nonsense"),
    ],
)
def test_what_cannot_be_set_is_named(tmp_path: Path, text: str, named: str):
    (tmp_path / "gpl.toml").write_text(text)
    with pytest.raises(pydantic.ValidationError) as error:
        load()
    assert [".".join(map(str, e["loc"])) for e in error.value.errors()] == [named]


def test_a_named_file_must_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(FileNotFoundError, match=r"nope\.toml"):
        load(tmp_path / "nope.toml")
    monkeypatch.setenv("GPL_CONFIG", "gone.toml")
    with pytest.raises(FileNotFoundError, match=r"gone\.toml"):
        load()


def test_a_variable_of_no_section_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("GPL_SCORER_PORT", "tcp://10.0.0.1:80")  # as Kubernetes sets for a service named gpl-scorer
    load()
    monkeypatch.setenv("GPL_INDX__KIND", "server")
    with pytest.raises(pydantic.ValidationError, match=r"GPL_INDX__KIND: there is no section 'indx'"):
        load()


def test_secrets_are_redacted(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("GPL_KAFKA__SASL_PASSWORD", "hunter2")
    monkeypatch.setenv("GPL_INDEX__API_KEY", "hunter3")
    settings = load()
    assert "hunter" not in repr(settings) + str(settings.model_dump(mode="json"))
    assert settings.kafka.sasl_password is not None
    assert settings.kafka.sasl_password.get_secret_value() == "hunter2"


def test_the_fingerprint_follows_what_changes_labels_only(tmp_path: Path):
    def fingerprint(text: str) -> str:
        (tmp_path / "gpl.toml").write_text(text)
        return load().fingerprint()

    plain = fingerprint("")
    assert fingerprint("[labels]\nidle_timeout_wall_seconds = 3\nretention_seconds = 1\n") == plain
    assert fingerprint("[trainer]\ndim = 8\n") == plain
    assert fingerprint("[labels]\nwindow_seconds = 1\n") != plain
    assert fingerprint("[labels]\nhistory = false\n") != plain
