"""The command line as a user meets it: in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest

from streams.topics import TOPICS

ROOT = Path(__file__).parents[2]


def gpl(*arguments: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("GPL_")}
    environment |= {"PYTHONPATH": str(ROOT), "COLUMNS": "200", **env}
    command = [sys.executable, "-m", "streams.cli", *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120, check=False)


def test_schemas_are_printed_and_written(tmp_path: Path):
    printed = json.loads(gpl("schemas", cwd=tmp_path).stdout)
    every = {spec.name for spec in TOPICS} - {"dead-letters"}
    assert printed.keys() == every
    assert gpl("schemas", "--out", "out", cwd=tmp_path).returncode == 0
    written = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert written == sorted(f"{topic}.v1.json" for topic in every)
    for path in (tmp_path / "out").iterdir():
        jsonschema.Draft202012Validator.check_schema(json.loads(path.read_text()))


def test_config_show_tells_what_is_in_force_without_secrets(tmp_path: Path):
    (tmp_path / "my.toml").write_text('[kafka]\nprefix = "shop."\n')
    done = gpl("config", "show", "--config", "my.toml", cwd=tmp_path, GPL_KAFKA__SASL_PASSWORD="hunter2")
    shown = json.loads(done.stdout)
    assert shown["kafka"]["prefix"] == "shop."
    assert "hunter2" not in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("arguments", "env", "code", "said"),
    [
        (["worker", "cook"], {}, 2, "'cook' is no role"),
        (["worker", "all"], {}, 1, "no artefacts there; `gpl fit` makes them"),
        (["worker", "all", "--config", "nope.toml"], {}, 2, "nope.toml does not exist"),
        (["demo", "--config", "nope.toml"], {}, 2, "configuration file nope.toml does not exist"),
        (["demo", "--data", "nowhere", "--broker", "foo"], {}, 1, "--broker 'foo' is none of"),
        (["config", "show", "--config", "bad.toml"], {}, 2, "configuration file bad.toml: Invalid value"),
        (["fit", "nowhere"], {"GPL_CONFIG": "latin.toml"}, 2, "configuration file latin.toml: 'utf-8' codec"),
        (["config", "show"], {"GPL_KAFKA__PARTITIONS": "0"}, 2, "kafka.partitions"),
        (["topics", "check"], {"GPL_KAFKA__BOOTSTRAP_SERVERS": "a:abc"}, 2, "kafka.bootstrap_servers: 'a:abc' is not"),
        (["fit", "nowhere"], {}, 1, "nowhere/items.jsonl: no such file; docs/data-format.md"),
        (["validate", "nowhere"], {}, 1, "nowhere"),
    ],
)
def test_an_error_of_use_is_one_clear_message(tmp_path: Path, arguments, env, code, said):
    (tmp_path / "bad.toml").write_text("x = [")
    (tmp_path / "latin.toml").write_bytes(b"# \xe9\n")
    done = gpl(*arguments, cwd=tmp_path, **env)
    output = done.stdout + done.stderr
    assert said in output
    assert "Traceback" not in output
    assert done.returncode == code


def test_an_error_shows_no_value_that_may_be_a_secret(tmp_path: Path):
    for name in ("SASL_PASWORD", "SASL_PASSWORD__X"):
        mistyped = gpl("config", "show", cwd=tmp_path, **{f"GPL_KAFKA__{name}": "hunter2"})
        assert mistyped.returncode == 2 and "kafka.sasl_pas" in mistyped.stderr and "hunter2" not in mistyped.stderr
    done = gpl("config", "show", cwd=tmp_path, GPL_FOO="1", GPL_KAFKA__SASL_PASSWORD="hunter2")
    assert (done.returncode, done.stderr) == (2, "configuration:\n  GPL_FOO: there is no setting 'foo'\n")
