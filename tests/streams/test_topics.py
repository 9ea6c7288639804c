"""Topics: created once, as the settings say, and every difference told in a sentence."""

from __future__ import annotations

import pytest
from kafka import KafkaAdminClient
from typer.testing import CliRunner

from streams import topics
from streams.broker.process import free_ports, wait_until
from streams.contracts import TOPIC_RECORDS
from streams.kafka import NoBrokerError, client_options
from streams.settings import KafkaSettings
from streams.topics_command import app

NAMES = {spec.name for spec in topics.TOPICS}


def test_every_contract_has_its_topic() -> None:
    assert set(TOPIC_RECORDS) <= NAMES
    assert len(NAMES) == len(topics.TOPICS)


def test_topics_keyed_by_user_share_one_partition_count() -> None:
    kafka = KafkaSettings(partitions=7)
    assert {spec.partitions(kafka) for spec in topics.TOPICS if spec.by_user} == {7}
    assert {spec.name for spec in topics.TOPICS if spec.partitions(kafka) == 1} == {
        "calibrations",
        "model-updates",
        "dead-letters",
    }


def test_create_makes_what_is_missing_and_only_that(kafka_settings: KafkaSettings) -> None:
    assert topics.create(kafka_settings) == []
    assert topics.check(kafka_settings) == []
    with KafkaAdminClient(**client_options(kafka_settings)) as admin:
        present = {name for name in admin.list_topics() if name.startswith(kafka_settings.prefix)}
        assert present == {topics.full_name(kafka_settings, name) for name in NAMES}
        admin.delete_topics([topics.full_name(kafka_settings, "labels")])
    missing = [f"Topic {kafka_settings.prefix}labels does not exist; `gpl topics create` makes it."]
    # The controller has deleted it when it answers; the broker's own view follows.
    assert wait_until(lambda: topics.check(kafka_settings) == missing, 30)
    assert topics.create(kafka_settings) == [topics.full_name(kafka_settings, "labels")]
    assert topics.check(kafka_settings) == []


def test_check_tells_each_difference(kafka_settings: KafkaSettings) -> None:
    wrong = kafka_settings.model_copy(update={"prefix": f"{kafka_settings.prefix}wrong."})
    recalls, anchors = (topics.full_name(wrong, name) for name in ("recalls", "user-anchors"))
    with KafkaAdminClient(**client_options(wrong)) as admin:
        admin.create_topics(
            {
                recalls: {"num_partitions": 2, "replication_factor": 1, "configs": {"max.message.bytes": "1000"}},
                anchors: {"num_partitions": 3, "replication_factor": 1, "configs": {"max.message.bytes": "99999999"}},
            },
            wait_for_metadata=True,
        )
    problems = topics.check(wrong)
    assert len([problem for problem in problems if "does not exist" in problem]) == len(NAMES) - 2
    assert [problem for problem in problems if "does not exist" not in problem] == [
        f"Topic {recalls} has 2 partitions, 3 are configured; all topics keyed by user must have the same number.",
        f"Topic {recalls} has max.message.bytes = 1000, at least {wrong.max_record_bytes + 65_536} is needed.",
        f"Topic {anchors} has cleanup.policy = delete, it must be compact.",
        f"Topic {anchors} has min.compaction.lag.ms = 0, at least 86400000 is needed.",
    ]
    # Topics that exist are left as they are: what they hold is not ours to reshape.
    assert len(topics.create(wrong)) == len(NAMES) - 2
    assert topics.check(wrong) == [problem for problem in problems if "does not exist" not in problem]


def test_too_few_replicas_are_told(kafka_settings: KafkaSettings) -> None:
    wanted = kafka_settings.model_copy(update={"replication_factor": 3})
    problems = topics.check(wanted)
    assert len(problems) == len(NAMES)
    assert problems[0] == f"Topic {wanted.prefix}items has 1 replicas, kafka.replication_factor is 3."


def test_no_broker_is_an_error_that_names_the_setting() -> None:
    kafka = KafkaSettings(bootstrap_servers=f"127.0.0.1:{free_ports(1)[0]}")
    with pytest.raises(NoBrokerError, match=f"kafka.bootstrap_servers = '{kafka.bootstrap_servers}'"):
        topics.create(kafka, timeout=0.3)


def test_commands_exit_with_one_when_something_is_wrong(
    kafka_settings: KafkaSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPL_KAFKA__BOOTSTRAP_SERVERS", kafka_settings.bootstrap_servers)
    monkeypatch.setenv("GPL_KAFKA__PREFIX", kafka_settings.prefix)
    gpl = CliRunner()
    assert gpl.invoke(app, ["check"]).exit_code == 1  # 6 partitions by default, 3 here
    monkeypatch.setenv("GPL_KAFKA__PARTITIONS", "3")
    checked = gpl.invoke(app, ["check"])
    assert (checked.exit_code, checked.output.split()[:4]) == (0, ["11", "topics", "are", "as"])
    created = gpl.invoke(app, ["create"])
    assert created.exit_code == 0
    assert "0 created, 11 there before" in created.output
