from __future__ import annotations

import re

import pytest
from pydantic import SecretStr

from streams.broker.process import free_ports
from streams.faust_app import make_app
from streams.kafka import NoBrokerError, RecordTooLargeError, admin, check_size, client_options, consumer, producer
from streams.settings import ConfigError, KafkaSettings


def test_a_record_over_the_cap_is_refused_and_named():
    kafka = KafkaSettings(max_record_bytes=1024)
    check_size(kafka, "gpl.recalls", b"key", b"x" * 1021)
    check_size(kafka, "gpl.items", b"key", None)
    with pytest.raises(RecordTooLargeError, match=r"gpl\.recalls: record under key b'key' has 1025 bytes.*1024"):
        check_size(kafka, "gpl.recalls", b"key", b"x" * 1022)


def test_security_reaches_the_clients():
    kafka = KafkaSettings(
        bootstrap_servers="a:1,b:2",
        security_protocol="SASL_SSL",
        sasl_mechanism="SCRAM-SHA-512",
        sasl_username="me",
        sasl_password=SecretStr("hunter2"),
    )
    assert client_options(kafka) == {
        "bootstrap_servers": ["a:1", "b:2"],
        "security_protocol": "SASL_SSL",
        "sasl_mechanism": "SCRAM-SHA-512",
        "sasl_plain_username": "me",
        "sasl_plain_password": "hunter2",
    }


@pytest.mark.parametrize("client", [client_options, lambda kafka: make_app(kafka, "labels")])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"sasl_mechanism": None}, "kafka.sasl_mechanism: kafka.security_protocol = 'SASL_SSL' needs it"),
        ({"sasl_username": None}, "kafka.sasl_username: kafka.security_protocol = 'SASL_SSL' needs it"),
        ({"sasl_password": None}, "kafka.sasl_password: kafka.security_protocol = 'SASL_SSL' needs it"),
        ({"ssl_cafile": "nope.pem"}, "kafka.ssl_cafile = 'nope.pem': no certificates could be read"),
        ({"ssl_cafile": __file__}, "no certificates could be read"),
    ],
)
def test_security_that_is_not_complete_is_named_by_whoever_connects(client, change, said):
    given = {"sasl_mechanism": "PLAIN", "sasl_username": "me", "sasl_password": "hunter2"}
    kafka = KafkaSettings(security_protocol="SASL_SSL", **{**given, **change})  # of files alone one may look
    with pytest.raises(ConfigError, match=re.escape(said)):
        client(kafka)


@pytest.mark.parametrize(
    "connect",
    [
        lambda kafka: admin(kafka, timeout=0.3),
        lambda kafka: consumer(kafka, bootstrap_timeout_ms=300),
        lambda kafka: producer(kafka, bootstrap_timeout_ms=300),
    ],
)
def test_a_broker_that_does_not_answer_is_named_with_its_setting(connect):
    kafka = KafkaSettings(bootstrap_servers=f"127.0.0.1:{free_ports(1)[0]}")
    said = f"kafka.bootstrap_servers = '{kafka.bootstrap_servers}': no broker answers (KafkaTimeoutError: "
    with pytest.raises(NoBrokerError, match=f"^{re.escape(said)}"):
        connect(kafka)
