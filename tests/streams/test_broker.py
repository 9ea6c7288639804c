"""Local brokers: what they need, how they live and die, and that nothing is left behind."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from kafka import TopicPartition
from kafka.errors import KafkaError
from typer.testing import CliRunner

from streams import topics
from streams.broker import daemon, toolchain
from streams.broker.apache import ApacheKafka
from streams.broker.command import app, configured_port
from streams.broker.embedded import NoidaBroker
from streams.broker.process import (
    BrokerError,
    Child,
    accepts,
    free_ports,
    is_running,
    serves_metadata,
    wait_until,
)
from streams.broker.select import choose, open_broker
from streams.kafka import consumer, producer
from streams.settings import KafkaSettings

CHECKOUT = Path(__file__).parents[2]


def fake_program(directory: Path, name: str, says: str) -> Path:
    """An executable that prints ``says`` to standard error: a Java of an age that this machine does not have."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / name
    path.write_text(f"#!/bin/sh\ncat >&2 <<'EOF'\n{says}\nEOF\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine without Java and Maven: only /bin/cat's directory besides an own, empty bin."""
    own = tmp_path / "bin"
    own.mkdir()
    (own / "cat").symlink_to("/bin/cat")
    monkeypatch.setenv("PATH", str(own))
    monkeypatch.delenv("JAVA_HOME", raising=False)
    return own


# --- ports and processes ---


def test_free_ports_are_distinct_unused_and_below_the_ephemeral_range() -> None:
    ports = free_ports(20)
    assert len(set(ports)) == 20
    assert max(ports) < 32_768
    assert not any(accepts(port) for port in ports)


def test_attached_child_ends_when_its_parent_is_killed(tmp_path: Path) -> None:
    marker = "86399.25"
    script = (
        "import sys, pathlib, signal; from streams.broker.process import Child\n"
        f"child = Child(['sleep', '{marker}'], pathlib.Path('.'), pathlib.Path(sys.argv[1]), detached=False)\n"
        "print(child.pid, flush=True); signal.pause()"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "log")]
    with subprocess.Popen(command, cwd=CHECKOUT, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert wait_until(lambda: is_running(pid, marker), 10)
        parent.kill()
    assert wait_until(lambda: not is_running(pid, marker), 10)


def test_close_ends_the_whole_group(tmp_path: Path) -> None:
    log = tmp_path / "log"
    child = Child(["sh", "-c", "sleep 86398.25 & echo $!; wait"], tmp_path, log, detached=False)
    assert wait_until(lambda: log.read_text().endswith("\n"), 10)
    grandchild = int(log.read_text())
    assert wait_until(lambda: is_running(grandchild, "86398.25"), 10)  # while it becomes sleep it has no command line
    child.close()
    assert not child.alive()
    assert wait_until(lambda: not is_running(grandchild, "86398.25"), 10)


def test_a_reused_pid_is_not_taken_for_the_broker() -> None:
    assert is_running(os.getpid(), Path(sys.executable).name)
    assert not is_running(os.getpid(), "/no/such/broker")


# --- Java and Maven ---


@pytest.mark.parametrize(
    ("says", "version"),
    [
        ('openjdk version "17.0.15" 2025-04-15', "17.0.15"),
        ('openjdk version "21" 2023-09-19', "21"),
        ('Picked up JAVA_TOOL_OPTIONS: -Dx="1"\nopenjdk version "25-ea" 2025-09-16', "25-ea"),
    ],
)
def test_java_that_is_new_enough(bare: Path, says: str, version: str) -> None:
    expected = fake_program(bare, "java", says)
    assert toolchain.find_java() == toolchain.Java(str(expected), version)


@pytest.mark.parametrize("version", ["1.8.0_402", "11.0.22", "16"])
def test_java_that_is_too_old(bare: Path, version: str) -> None:
    fake_program(bare, "java", f'java version "{version}"')
    with pytest.raises(BrokerError, match=f"is Java {version}, Apache Kafka needs 17"):
        toolchain.find_java()


def test_java_home_comes_before_path(bare: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_program(bare, "java", 'openjdk version "11.0.22"')
    fake_program(tmp_path / "jdk" / "bin", "java", 'openjdk version "21.0.1"')
    monkeypatch.setenv("JAVA_HOME", str(tmp_path / "jdk"))
    assert toolchain.find_java().version == "21.0.1"


def test_missing_tools_are_named_with_what_to_install(bare: Path, tmp_path: Path) -> None:
    with pytest.raises(BrokerError, match=r"no Java: .*openjdk-17"):
        toolchain.check(tmp_path)
    fake_program(bare, "java", 'openjdk version "17.0.1"')
    with pytest.raises(BrokerError, match=r"no Maven .*apt install maven"):
        toolchain.check(tmp_path)
    toolchain.jars_directory(tmp_path).mkdir(parents=True)
    assert toolchain.check(tmp_path).version == "17.0.1"


def test_failed_maven_leaves_no_jars_and_shows_its_output(bare: Path, tmp_path: Path) -> None:
    fake_program(bare, "java", 'openjdk version "17.0.1"')
    fake_program(bare, "mvn", "[ERROR] repository unreachable").write_text(
        "#!/bin/sh\necho '[ERROR] repository unreachable'\nexit 1\n"
    )
    with pytest.raises(BrokerError, match="repository unreachable"):
        toolchain.fetch_jars(tmp_path / "cache")
    assert list((tmp_path / "cache").glob("*/*")) == []


def test_pom_pins_kafka_and_names_the_cache() -> None:
    assert toolchain.kafka_version() == "4.1.2"
    assert toolchain.jars_directory(Path("cache")).parent.name.startswith("4.1.2-")


# --- choice ---


def test_auto_takes_noida_without_java_and_says_why(bare: Path) -> None:
    choice = choose("auto")
    assert choice.kind == "noida"
    assert "no Java" in choice.reason


def test_auto_takes_apache_where_it_can_run(bare: Path, tmp_path: Path) -> None:
    fake_program(bare, "java", 'openjdk version "17.0.1"')
    toolchain.jars_directory(tmp_path).mkdir(parents=True)
    choice = choose("auto", cache=tmp_path)
    assert choice.kind == "apache"
    assert choice.description == "Apache Kafka 4.1.2 on Java 17.0.1"


@given(
    st.lists(
        st.tuples(st.sampled_from(["127.0.0.1", "kafka", "b-1.example", "[::1]"]), st.integers(1, 65535)),
        min_size=1,
        max_size=3,
    )
)
def test_addresses_are_external(addresses: list[tuple[str, int]]) -> None:
    option = ",".join(f"{host}:{port}" for host, port in addresses)
    choice = choose(option)
    assert (choice.kind, choice.bootstrap) == ("external", option)
    assert open_broker(choice, KafkaSettings(), Path("unused")).bootstrap == option


@pytest.mark.parametrize("option", ["", "kafka", "redpanda", "host:", ":9092", "host:9092,", "host:9092 "])
def test_other_options_are_errors_that_quote_them(option: str) -> None:
    with pytest.raises(BrokerError, match=f"--broker {option!r} is none of"):
        choose(option)


def test_unreachable_external_broker() -> None:
    address = f"127.0.0.1:{free_ports(1)[0]}"
    with pytest.raises(BrokerError, match=f"no Kafka broker answers at {address}"):
        open_broker(choose(address), KafkaSettings(), Path("unused")).start(timeout=0.3)


@pytest.mark.parametrize(
    ("servers", "port"), [("127.0.0.1:9092", 9092), ("localhost:1", 1), ("kafka:9092", None), ("a:1,b:2", None)]
)
def test_configured_port(servers: str, port: int | None) -> None:
    if port is not None:
        assert configured_port(servers) == port
    else:
        with pytest.raises(BrokerError, match=servers):
            configured_port(servers)


def test_start_reads_the_named_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPL_CONFIG", "")  # loading sets it; put back afterwards
    (tmp_path / "own.toml").write_text('[kafka]\nbootstrap_servers = "elsewhere:9092"\n')
    options = ["--kind", "noida", "--directory", str(tmp_path / "broker"), "--config", str(tmp_path / "own.toml")]
    result = CliRunner().invoke(app, ["start", *options])
    assert result.exit_code == 1 and "'elsewhere:9092' is not an address of this machine" in result.output


# --- noida-db ---


def test_noida_restart_keeps_data_and_a_new_run_begins_empty(tmp_path: Path) -> None:
    with NoidaBroker(tmp_path) as broker:
        settings = KafkaSettings(bootstrap_servers=broker.bootstrap, partitions=2)
        assert len(topics.create(settings)) == len(topics.TOPICS)
        assert broker.restart() == settings.bootstrap_servers
        assert topics.check(settings) == []
    assert not serves_metadata({"bootstrap_servers": [settings.bootstrap_servers]}, timeout=0.5)
    with NoidaBroker(tmp_path) as broker:
        settings = KafkaSettings(bootstrap_servers=broker.bootstrap, partitions=2)
        assert len(topics.check(settings)) == len(topics.TOPICS)


def test_taken_port_is_named(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(BrokerError, match=f"port {port} is taken"):
            NoidaBroker(tmp_path, port).start()


# --- in the background ---


def test_daemon_start_is_idempotent_and_stop_finds_it(tmp_path: Path) -> None:
    choice, kafka = choose("noida"), KafkaSettings()
    try:
        state, started = daemon.start(choice, kafka, tmp_path, port=0)
        assert started
        assert daemon.start(choice, kafka, tmp_path, port=0) == (state, False)
        assert daemon.running(tmp_path) == state
        assert daemon.serving(state)
        with pytest.raises(BrokerError, match=f"runs at {state.bootstrap}"):
            daemon.start(choice, kafka, tmp_path, port=1)
    finally:
        stopped = daemon.stop(tmp_path)
    assert stopped == state
    assert daemon.running(tmp_path) is None
    assert daemon.stop(tmp_path) is None


def test_stale_state_is_not_believed(tmp_path: Path) -> None:
    state = daemon.State("noida", "noida-db", os.getpid(), "127.0.0.1:1", "log")
    (tmp_path / "broker.json").write_bytes(msgspec.json.encode(state))
    assert daemon.running(tmp_path) is None
    assert not (tmp_path / "broker.json").exists()
    (tmp_path / "broker.json").write_text("{torn")
    assert daemon.running(tmp_path) is None


def test_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    gpl = CliRunner()
    assert gpl.invoke(app, ["status"]).exit_code == 1
    for kind in ("kafkaesque", "127.0.0.1:9092"):
        refused = gpl.invoke(app, ["start", "--kind", kind])
        assert refused.exit_code == 2 and "--kind" in refused.output
    try:
        started = gpl.invoke(app, ["start", "--kind", "noida", "--port", "0"])
        assert started.exit_code == 0, started.output
        assert "export GPL_KAFKA__BOOTSTRAP_SERVERS=127.0.0.1:" in started.output
        assert "already running" in gpl.invoke(app, ["start", "--port", "0"]).output
        status = gpl.invoke(app, ["status"])
        assert (status.exit_code, status.output.split()[0]) == (0, "serving")
    finally:
        stopped = gpl.invoke(app, ["stop"])
    assert (stopped.exit_code, stopped.output.split()[0]) == (0, "stopped")
    assert gpl.invoke(app, ["stop"]).exit_code == 0


# --- Apache Kafka ---


@pytest.mark.kafka
def test_kafka_that_ends_at_once_shows_its_log(tmp_path: Path, kafka_jars: Path) -> None:
    with pytest.raises(BrokerError, match=r"(?s)ended at once.*Too small maximum heap"):
        ApacheKafka(tmp_path, heap_mb=1, cache=kafka_jars).start()


@pytest.mark.kafka
def test_acknowledged_records_survive_a_kill(tmp_path: Path, kafka_jars: Path) -> None:
    with ApacheKafka(tmp_path, heap_mb=256, cache=kafka_jars) as broker:
        settings = KafkaSettings(bootstrap_servers=broker.bootstrap, partitions=1)
        topics.create(settings)
        sender = producer(settings)
        for i in range(200):
            sender.send("gpl.labels", f"{i}".encode())
        sender.flush(30)
        sender.close()
        first = broker.pid
        broker.kill()
        assert not is_running(first, str(tmp_path))
        assert broker.start() == settings.bootstrap_servers
        reader, partition = consumer(settings), TopicPartition("gpl.labels", 0)
        reader.assign([partition])
        values: list[bytes] = []

        def all_read() -> bool:
            for batch in reader.poll(timeout_ms=500).values():
                values.extend(record.value for record in batch)
            return len(values) >= 200

        assert wait_until(all_read, 30)
        assert values == [f"{i}".encode() for i in range(200)]
        reader.close()


def test_the_record_cap_fits_and_what_is_above_the_topic_limit_is_refused(kafka_settings: KafkaSettings) -> None:
    topic = topics.full_name(kafka_settings, "recalls")
    sender = producer(kafka_settings, max_request_size=2**25, compression_type=None)
    headers = [("error", b"x" * 20_000)]
    fits = sender.send(topic, key=b"k" * 256, value=os.urandom(kafka_settings.max_record_bytes - 256), headers=headers)
    assert fits.get(30).offset == 0
    too_large = sender.send(topic, value=os.urandom(kafka_settings.max_record_bytes + topics.BATCH_OVERHEAD_BYTES))
    with pytest.raises(KafkaError):
        too_large.get(30)
    sender.close()
