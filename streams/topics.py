"""Names and settings of the topics, their creation, and the check that a cluster's topics are as they must be."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from kafka.admin import ConfigResource, ConfigResourceType
from kafka.errors import TopicAlreadyExistsError, for_code

from streams.kafka import BATCH_OVERHEAD_BYTES, admin
from streams.settings import KafkaSettings


@dataclass(frozen=True)
class TopicSpec:
    """``name`` is without the prefix. ``by_user``: keyed by user id, so all such topics share one partition count.

    ``single``: one partition, because few records come and their order across keys is worth having. ``overhead``: bytes
    that a batch may add to its record.
    """

    name: str
    by_user: bool
    config: dict[str, str] = field(default_factory=dict)
    single: bool = False
    overhead: int = BATCH_OVERHEAD_BYTES

    def partitions(self, kafka: KafkaSettings) -> int:
        """Partition count under these settings."""
        return 1 if self.single else kafka.partitions

    def configs(self, kafka: KafkaSettings) -> dict[str, str]:
        """The topic's configuration on the broker under these settings."""
        return {
            "cleanup.policy": "delete",
            "compression.type": "producer",
            "max.message.bytes": str(kafka.max_record_bytes + self.overhead),
            **self.config,
        }


# Anchors are picked as of a recall's time, so what they replaced must outlive the requests that may still need it.
_COMPACTED = {"cleanup.policy": "compact", "min.compaction.lag.ms": str(24 * 3600 * 1000)}

# A guard against events of the future compares them with the record's Kafka time, which the producer's clock gives: a
# record that is itself this far ahead of the broker is refused to its producer. As labels.max_ahead_seconds by default.
_EVENTS = {"message.timestamp.after.max.ms": str(300 * 1000)}

TOPICS: tuple[TopicSpec, ...] = (
    TopicSpec("items", by_user=False, config={"cleanup.policy": "compact"}),
    TopicSpec("item-vectors", by_user=False, config=_COMPACTED),
    TopicSpec("recalls", by_user=True, config=_EVENTS),
    TopicSpec("feedback", by_user=True, config=_EVENTS),
    # Compaction keeps what was written last; for a day, what had come further is there beside it (profiles.further).
    TopicSpec("profiles", by_user=True, config=_COMPACTED),
    TopicSpec("anchor-requests", by_user=True),
    TopicSpec("user-anchors", by_user=True, config=_COMPACTED),
    TopicSpec("calibrations", by_user=False, config=_COMPACTED, single=True),
    TopicSpec("labels", by_user=True),
    TopicSpec("model-updates", by_user=False, config={"cleanup.policy": "compact"}, single=True),
    # A month to look at them. The largest record of another topic fits with what is told of it.
    TopicSpec(
        "dead-letters",
        by_user=False,
        single=True,
        config={"retention.ms": str(30 * 24 * 3600 * 1000)},
        overhead=2 * BATCH_OVERHEAD_BYTES,
    ),
)

_AT_LEAST = {"max.message.bytes", "min.compaction.lag.ms"}  # more of these does no harm
_CHECKED = ("cleanup.policy", "max.message.bytes", "min.compaction.lag.ms")


def full_name(kafka: KafkaSettings, name: str) -> str:
    """The topic's name on the broker."""
    return f"{kafka.prefix}{name}"


def create(kafka: KafkaSettings, timeout: float = 30.0) -> list[str]:
    """Create the topics that are missing and wait until each has its leaders; the full names of those created.

    Topics that exist are left as they are: ``check`` tells whether that is right. Raises NoBrokerError when no broker
    answers, kafka.errors.KafkaError when the broker refuses.
    """
    specs = {full_name(kafka, spec.name): spec for spec in TOPICS}
    with admin(kafka, timeout) as client:
        present = set(client.list_topics())
        missing = {
            name: {
                "num_partitions": spec.partitions(kafka),
                "replication_factor": kafka.replication_factor,
                "configs": spec.configs(kafka),
            }
            for name, spec in specs.items()
            if name not in present
        }
        created = []
        if missing:
            answer = client.create_topics(missing, timeout_ms=int(timeout * 1000), raise_errors=False)
            for topic in answer["topics"]:
                error = for_code(topic["error_code"])
                if topic["error_code"] == 0:
                    created.append(topic["name"])
                elif error is not TopicAlreadyExistsError:  # somebody else may have just made it
                    raise error(f"topic {topic['name']}: {topic['error_message']}")
        client.wait_for_topics(list(specs), timeout_ms=int(timeout * 1000))
    return created


def check(kafka: KafkaSettings, timeout: float = 30.0) -> list[str]:
    """What is wrong with the topics on the broker, a sentence each; empty when all is well.

    Raises NoBrokerError when no broker answers.
    """
    problems: list[str] = []
    with admin(kafka, timeout) as client:
        present = set(client.list_topics())
        names = [name for name in (full_name(kafka, spec.name) for spec in TOPICS) if name in present]
        described = {topic["name"]: topic for topic in client.describe_topics(names)} if names else {}
        resources = [ConfigResource(ConfigResourceType.TOPIC, name) for name in names]
        configs = client.describe_configs(resources, config_filter="all")["topic"] if names else {}
    for spec in TOPICS:
        name = full_name(kafka, spec.name)
        # A topic that is being deleted may be listed and have nothing to describe any more.
        if described.get(name, {}).get("partitions") and configs.get(name):
            problems += _compare(kafka, spec, name, described[name]["partitions"], configs[name])
        else:
            problems.append(f"Topic {name} does not exist; `gpl topics create` makes it.")
    return problems


def _compare(
    kafka: KafkaSettings, spec: TopicSpec, name: str, partitions: list[Any], configs: dict[str, Any]
) -> Iterator[str]:
    wanted = spec.partitions(kafka)
    if len(partitions) != wanted:
        why = "; all topics keyed by user must have the same number" if spec.by_user else ""
        yield f"Topic {name} has {len(partitions)} partitions, {wanted} are configured{why}."
    replicas = min(len(partition["replica_nodes"]) for partition in partitions)
    if replicas < kafka.replication_factor:
        yield f"Topic {name} has {replicas} replicas, kafka.replication_factor is {kafka.replication_factor}."
    for key, value in spec.configs(kafka).items():
        if key not in _CHECKED:
            continue
        actual = configs[key]["value"]
        if key in _AT_LEAST and int(actual) < int(value):
            yield f"Topic {name} has {key} = {actual}, at least {value} is needed."
        elif key not in _AT_LEAST and actual != value:
            yield f"Topic {name} has {key} = {actual}, it must be {value}."
