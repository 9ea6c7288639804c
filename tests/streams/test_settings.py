from __future__ import annotations

from pathlib import Path

import pydantic
import pytest

from streams.settings import ConfigError, KafkaSettings, load


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
        ('config = "other.toml"\n', "config"),
    ],
)
def test_what_cannot_be_set_is_named(tmp_path: Path, text: str, named: str):
    (tmp_path / "gpl.toml").write_text(text)
    with pytest.raises(pydantic.ValidationError) as error:
        load()
    assert [".".join(map(str, e["loc"])) for e in error.value.errors()] == [named]


def test_a_named_file_must_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ConfigError, match=r"nope\.toml does not exist"):
        load(tmp_path / "nope.toml")
    monkeypatch.setenv("GPL_CONFIG", "gone.toml")
    with pytest.raises(ConfigError, match=r"gone\.toml does not exist"):
        load()


@pytest.mark.parametrize(
    ("content", "reason"), [(b"x = [", "Invalid value"), (b"\xff\xfe", "can't decode"), (None, "Is a directory")]
)
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, content: bytes | None, reason: str):
    path = tmp_path / "bad.toml"
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=f"^configuration file {path}: .*{reason}"):
        load(path)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("GPL_INDX__KIND", "server", "GPL_INDX__KIND: there is no section 'indx'"),
        ("GPL_CONFIG__KIND", "server", "GPL_CONFIG__KIND: there is no section 'config'"),
        ("GPL_ARTEFACT", "/nope", "GPL_ARTEFACT: there is no setting 'artefact'"),
        ("GPL_SERVE_PORT", "80", "GPL_SERVE_PORT: there is no setting 'serve_port'"),
    ],
)
def test_a_variable_of_no_setting_is_named(monkeypatch: pytest.MonkeyPatch, name: str, value: str, said: str):
    monkeypatch.setenv(name, value)
    with pytest.raises(pydantic.ValidationError, match=said):
        load()


def test_what_kubernetes_says_of_a_service_named_gpl_scorer_is_no_setting(monkeypatch: pytest.MonkeyPatch):
    for name, value in {
        "SERVICE_HOST": "10.0.0.1",
        "SERVICE_PORT": "80",
        "SERVICE_PORT_HTTP": "80",
        "PORT": "tcp://10.0.0.1:80",
        "PORT_80_TCP": "tcp://10.0.0.1:80",
        "PORT_80_TCP_PROTO": "tcp",
        "PORT_80_TCP_ADDR": "10.0.0.1",
    }.items():
        monkeypatch.setenv(f"GPL_SCORER_{name}", value)
    load()


@pytest.mark.parametrize("servers", ["a:1", "a", "a:1, b-2.example:65535", "10.0.0.1:9092", "[::1]:9092,[::1]"])
def test_addresses_of_brokers(servers: str):
    # Faust, unlike kafka-python, takes a blank for a part of the name.
    assert KafkaSettings(bootstrap_servers=servers).bootstrap_servers == servers.replace(" ", "")


@pytest.mark.parametrize(
    "servers", ["", "a:1,", "a:abc", "a:", ":1", "a:0", "a:65536", "::1:9092", "SSL://a:1", "a b:1"]
)
def test_what_is_no_address_of_a_broker_is_named(servers: str):
    with pytest.raises(pydantic.ValidationError, match=r"is not host\[:port\]") as error:
        KafkaSettings(bootstrap_servers=servers)
    assert [e["loc"] for e in error.value.errors()] == [("bootstrap_servers",)]


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
