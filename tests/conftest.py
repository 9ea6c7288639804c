"""Fixtures of the whole suite: the real Apache Kafka, and topics of a test's own on it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import fsspec
import pytest
from hypothesis import settings as hypothesis_settings
from kafka import KafkaAdminClient

from streams import topics
from streams.broker import toolchain
from streams.broker.apache import ApacheKafka
from streams.broker.process import BrokerError
from streams.kafka import client_options
from streams.settings import KafkaSettings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Small matrices on a busy machine: threads that wait for each other cost more than they bring.
os.environ.setdefault("OMP_NUM_THREADS", "1")

IN_CI = os.environ.get("CI", "").lower() in {"1", "true", "yes"}
JARS = Path(__file__).parents[1] / toolchain.DEFAULT_CACHE

# CI tries the same examples every time; elsewhere new ones. Deadlines would measure the machine.
hypothesis_settings.register_profile("ci", deadline=None, derandomize=True)
hypothesis_settings.register_profile("dev", deadline=None)
hypothesis_settings.load_profile("ci" if IN_CI else "dev")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--require-kafka",
        action="store_true",
        help="without Java 17 or Maven: an error at once, where tests would be skipped",
    )
    parser.addoption("--crash-rounds", type=int, default=4, help="kills a test of the crash suite; longer with more")
    parser.addoption("--crash-seed", type=int, default=1, help="of the moments at which the crash suite kills")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "kafka" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.kafka)


def pytest_sessionstart(session: pytest.Session) -> None:
    if session.config.getoption("--require-kafka") and not hasattr(session.config, "workerinput"):
        try:
            toolchain.check(JARS)
        except BrokerError as error:
            pytest.exit(f"{error}.\nTests that need no Kafka: .venv/bin/pytest -m 'not kafka'", returncode=1)


@pytest.fixture(scope="session")
def kafka_jars() -> Path:
    """The cache of Kafka's jars, given a Java that runs them; without one, skipped here and failed in CI."""
    try:
        toolchain.check(JARS)
    except BrokerError as error:
        if IN_CI:
            pytest.fail(str(error))
        pytest.skip(str(error))
    toolchain.fetch_jars(JARS)
    return JARS


@pytest.fixture(scope="session")
def kafka(kafka_jars: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApacheKafka]:
    """One real Apache Kafka for the session, on free ports, its data in a temporary directory."""
    with ApacheKafka(tmp_path_factory.mktemp("kafka"), heap_mb=384, cache=kafka_jars) as broker:
        yield broker


@pytest.fixture(autouse=True)
def _no_configuration_of_others() -> Iterator[None]:
    """Loading names the file in the environment, for child processes; the next test shall not find it there."""
    before = os.environ.pop("GPL_CONFIG", None)
    yield
    os.environ.pop("GPL_CONFIG", None)
    if before is not None:
        os.environ["GPL_CONFIG"] = before


@pytest.fixture
def kafka_settings(kafka: ApacheKafka) -> Iterator[KafkaSettings]:
    """Settings of a test's own on that broker: its prefixes, three partitions, all topics created."""
    name = f"test-{uuid.uuid4().hex[:8]}"
    own = KafkaSettings(bootstrap_servers=kafka.bootstrap, prefix=f"{name}.", group_prefix=f"{name}-", partitions=3)
    topics.create(own)
    yield own
    with KafkaAdminClient(**client_options(own)) as admin:
        mine = [topic for topic in admin.list_topics() if topic.startswith(own.prefix)]
        admin.delete_topics(mine, raise_errors=False)  # one that the test itself deleted may still be listed


@pytest.fixture(scope="session")
def s3_server() -> Iterator[None]:
    """An S3 server (moto's) in a process of its own; while it runs, the environment leads S3 clients to it."""
    with closing(socket.create_server(("127.0.0.1", 0))) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while True:
            assert server.poll() is None and time.monotonic() < deadline, "the S3 server did not start"
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                time.sleep(0.05)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
            patch.setenv("AWS_ACCESS_KEY_ID", "test")
            patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
            patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
            yield
    finally:
        server.kill()
        server.wait()


@pytest.fixture
def bucket(s3_server: None) -> str:
    """URL of a new bucket."""
    url = f"s3://bucket-{uuid.uuid4().hex}"
    fsspec.url_to_fs(url, skip_instance_cache=True)[0].mkdir(url)
    return url
