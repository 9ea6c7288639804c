"""The choice of a broker: one option, ``auto`` | ``apache`` | ``noida`` | ``host:port[,host:port]``."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, Protocol, Self

from streams.broker.apache import ApacheKafka
from streams.broker.embedded import NoidaBroker, find_noida, noida_version
from streams.broker.process import BrokerError, serves_metadata
from streams.broker.toolchain import DEFAULT_CACHE, check, jars_directory, kafka_version
from streams.kafka import client_options
from streams.settings import KafkaSettings

_ADDRESSES = re.compile(r"^(?:[\w.-]+|\[[0-9A-Fa-f:.]+\]):\d{1,5}(?:,(?:[\w.-]+|\[[0-9A-Fa-f:.]+\]):\d{1,5})*$")


class Broker(Protocol):
    """What the demo and the tests need of a broker, whoever runs it."""

    @property
    def kind(self) -> str: ...
    @property
    def bootstrap(self) -> str: ...
    def start(self, timeout: float = ...) -> str: ...
    def stop(self) -> None: ...
    def __enter__(self) -> Self: ...
    def __exit__(self, *exception: object) -> None: ...


@dataclass(frozen=True)
class Choice:
    """``description`` says what it is, ``reason`` why it was taken. ``bootstrap``: of an external broker only."""

    kind: Literal["apache", "noida", "external"]
    description: str
    reason: str
    bootstrap: str | None = None


class ExternalBroker:
    """A broker that somebody else runs: reached, never started or stopped."""

    kind: ClassVar[str] = "external"

    def __init__(self, kafka: KafkaSettings) -> None:
        self._kafka = kafka

    @property
    def bootstrap(self) -> str:
        return self._kafka.bootstrap_servers

    def start(self, timeout: float = 10.0) -> str:
        """The bootstrap string. Raises BrokerError when no broker answers there within ``timeout`` seconds."""
        if not serves_metadata(client_options(self._kafka), timeout):
            raise BrokerError(f"no Kafka broker answers at {self.bootstrap}")
        return self.bootstrap

    def stop(self) -> None:
        """Nothing: it is not ours."""

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()


def choose(option: str = "auto", cache: Path = DEFAULT_CACHE) -> Choice:
    """The broker that the option means on this machine.

    ``auto`` is Apache Kafka where Java 17 and its jars (or Maven, to fetch them) are present, else noida-db.
    Raises BrokerError when the option means nothing or what it names cannot run here, and says what is missing.
    """
    if option == "auto":
        return _best(cache)
    if option == "apache":
        return _apache(cache, 'asked for by "apache"')
    if option == "noida":
        return _noida('asked for by "noida"')
    if _ADDRESSES.match(option):
        return Choice("external", f"Kafka at {option}", "asked for by its address", option)
    raise BrokerError(f'--broker {option!r} is none of "auto", "apache", "noida" and host:port[,host:port]')


def _best(cache: Path) -> Choice:
    try:
        return _apache(cache, "the best that is present")
    except BrokerError as no_apache:
        try:
            return _noida(f"Apache Kafka cannot run here ({no_apache})")
        except BrokerError as no_noida:
            raise BrokerError(f"no broker can run here.\nApache Kafka: {no_apache}\nnoida-db: {no_noida}") from None


def _apache(cache: Path, reason: str) -> Choice:
    java = check(cache)
    fetching = "" if jars_directory(cache).is_dir() else "; Maven fetches its jars now, once"
    return Choice("apache", f"Apache Kafka {kafka_version()} on Java {java.version}", reason + fetching)


def _noida(reason: str) -> Choice:
    find_noida()
    return Choice("noida", f"noida-db {noida_version()} (for the demo only)".replace("  ", " "), reason)


def open_broker(
    choice: Choice,
    kafka: KafkaSettings,
    directory: Path,
    *,
    port: int = 0,
    cache: Path = DEFAULT_CACHE,
) -> Broker:
    """The chosen broker, not started yet. ``directory`` and ``port`` (0: a free one) are of a local one."""
    if choice.kind == "external":
        return ExternalBroker(kafka.model_copy(update={"bootstrap_servers": choice.bootstrap}))
    return local_broker(choice, kafka, directory, port=port, cache=cache)


def local_broker(
    choice: Choice, kafka: KafkaSettings, directory: Path, *, port: int = 0, cache: Path = DEFAULT_CACHE
) -> ApacheKafka | NoidaBroker:
    """The chosen local broker, not started yet. Raises BrokerError for an external one."""
    if choice.kind == "apache":
        return ApacheKafka(directory, port, max_record_bytes=kafka.max_record_bytes, cache=cache)
    if choice.kind == "noida":
        return NoidaBroker(directory, port)
    raise BrokerError(f"{choice.bootstrap} is not a broker of this machine's; it cannot be started from here")
