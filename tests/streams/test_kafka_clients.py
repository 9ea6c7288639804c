from __future__ import annotations

import pytest
from pydantic import SecretStr

from streams.kafka import RecordTooLargeError, check_size, client_options
from streams.settings import KafkaSettings


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
