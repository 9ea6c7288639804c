"""Apache Kafka itself, without Docker: one KRaft node, jars by Maven, all its files in one directory."""

from __future__ import annotations

import base64
import subprocess
import uuid
from pathlib import Path
from typing import ClassVar

from streams.broker.local import LocalBroker
from streams.broker.process import LOOPBACK, BrokerError
from streams.broker.toolchain import DEFAULT_CACHE, fetch_jars, find_java
from streams.kafka import BATCH_OVERHEAD_BYTES

_PROPERTIES = """\
# Written at every start of the broker; changes here are lost.
process.roles=broker,controller
node.id=1
controller.quorum.voters=1@{host}:{controller}
listeners=PLAINTEXT://{host}:{port},CONTROLLER://{host}:{controller}
advertised.listeners=PLAINTEXT://{host}:{advertised}
controller.listener.names=CONTROLLER
log.dirs=data
message.max.bytes={message_bytes}
auto.create.topics.enable=false
group.initial.rebalance.delay.ms=0
# One node: nothing to replicate to, few partitions of its own, small buffers.
offsets.topic.replication.factor=1
offsets.topic.num.partitions=4
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
transaction.state.log.num.partitions=4
share.coordinator.state.topic.replication.factor=1
share.coordinator.state.topic.min.isr=1
share.coordinator.state.topic.num.partitions=4
log.cleaner.dedupe.buffer.size=16777216
log.index.size.max.bytes=1048576
num.network.threads=2
num.io.threads=4
"""


class ApacheKafka(LocalBroker):
    """A real Kafka on this machine. Data stay in ``directory/data`` between starts.

    Needs Java 17 and, the first time, Maven: ``toolchain.check`` tells. ``heap_mb``: the JVM's maximum heap, MiB.
    ``advertised_port``: what clients are told to connect to, where something stands between them and the broker.
    """

    kind: ClassVar[str] = "apache"
    port_count: ClassVar[int] = 2  # clients, controller

    def __init__(
        self,
        directory: Path,
        port: int = 0,
        *,
        max_record_bytes: int = 8 * 2**20,
        heap_mb: int = 512,
        advertised_port: int | None = None,
        cache: Path = DEFAULT_CACHE,
    ) -> None:
        super().__init__(directory, port)
        self._max_record_bytes = max_record_bytes
        self._heap_mb = heap_mb
        self._advertised_port = advertised_port
        self._cache = cache

    def _prepare(self) -> list[str]:
        java = find_java().executable
        classpath = f"{fetch_jars(self._cache).absolute()}/*"
        port, controller = self._ports
        properties = self.directory / "server.properties"
        properties.write_text(
            _PROPERTIES.format(
                host=LOOPBACK,
                port=port,
                advertised=self._advertised_port or port,
                controller=controller,
                message_bytes=self._max_record_bytes + BATCH_OVERHEAD_BYTES,
            )
        )
        if not (self.directory / "data" / "meta.properties").is_file():
            self._format(java, classpath, properties)
        return [
            java,
            f"-Xmx{self._heap_mb}m",
            "-XX:+UseSerialGC",
            "-XX:+ExitOnOutOfMemoryError",
            "-Dorg.slf4j.simpleLogger.log.kafka.server.KafkaConfig=warn",
            "-Dorg.slf4j.simpleLogger.log.org.apache.kafka.common.config=warn",
            "-Dorg.slf4j.simpleLogger.log.org.apache.kafka.common.utils.AppInfoParser=warn",
            "-Dorg.slf4j.simpleLogger.showDateTime=true",
            "-Dorg.slf4j.simpleLogger.dateTimeFormat=yyyy-MM-dd HH:mm:ss.SSS",
            "-cp",
            classpath,
            "kafka.Kafka",
            str(properties),
        ]

    def _format(self, java: str, classpath: str, properties: Path) -> None:
        # 16 bytes in URL-safe base64 is how Kafka writes an id; a leading dash would look like an option.
        cluster = base64.urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=").replace("-", "_")
        command = [java, "-XX:TieredStopAtLevel=1", "-cp", classpath, "kafka.tools.StorageTool", "format"]
        command += ["--cluster-id", cluster, "--config", str(properties)]
        with self.log.open("ab") as output:
            done = subprocess.run(
                command,
                cwd=self.directory,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                check=False,
            )
        if done.returncode != 0:
            raise BrokerError(f"Kafka could not format {self.directory / 'data'}; see {self.log}")
