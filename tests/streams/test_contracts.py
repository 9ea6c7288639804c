from __future__ import annotations

import json

import jsonschema
import msgspec
import pytest

from streams import contracts
from streams.contracts import Feedback, Item, Label, Recall, decode, encode

RECALL = {"request_id": "r", "user_id": "u", "ts": 1, "candidates": ["a", "b"]}


def test_round_trip_leaves_defaults_out():
    data = encode(Recall("r", "u", 1, ["a", "b"]))
    assert json.loads(data) == RECALL
    assert decode(Recall, data) == Recall("r", "u", 1, ["a", "b"])


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"ts": "1"}, "$.ts"),
        ({"ts": -1}, "$.ts"),
        ({"ts": 1.5}, "$.ts"),
        ({"candidates": []}, "$.candidates"),
        ({"candidates": ["a", ""]}, "$.candidates[...]"),
        ({"candidates": ["a", 3]}, "$.candidates[1]"),
        ({"user_id": None}, "$.user_id"),
        ({"extra": 1}, "extra"),
        ({"sources": ["popular"]}, "sources"),
    ],
)
def test_what_is_wrong_is_named(change, named):
    with pytest.raises(msgspec.ValidationError) as error:
        decode(Recall, json.dumps({**RECALL, **change}).encode())
    assert named in str(error.value) or named.replace("[...]", "[1]") in str(error.value)


def test_a_missing_field_is_named():
    with pytest.raises(msgspec.ValidationError, match="user_id"):
        decode(Recall, b'{"request_id": "r", "ts": 1, "candidates": ["a"]}')


@pytest.mark.parametrize("data", [b"", b"{", b"\xff", b"null", b"[1]", b'{"a":' * 10**5, b'{"event_id": "\xff"}'])
def test_malformed_bytes_are_errors_of_decoding(data):
    with pytest.raises(msgspec.DecodeError):
        decode(Feedback, data)


@pytest.mark.parametrize("topic", contracts.TOPIC_RECORDS)
def test_every_schema_is_valid_and_refuses_unknown_fields(topic):
    schema = contracts.json_schema(topic)
    jsonschema.Draft202012Validator.check_schema(schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"no such field": 1}, schema)


def test_schema_and_decoder_agree_on_an_example():
    item = {"item_id": "i", "text": "a film", "embedding": [0.1, 0.2], "attributes": {"year": 1995}}
    jsonschema.validate(item, contracts.json_schema("items"))
    assert decode(Item, json.dumps(item).encode()).attributes == {"year": 1995}


def test_labels_carry_every_field_on_the_wire():
    label = Label(
        request_id="r",
        revision=0,
        user_id="u",
        ts=1,
        outcome="no_anchors",
        exposed=contracts.Exposed(["a"], [1], [None]),
        unexposed=contracts.Unexposed([], [], [], []),
        provenance=contracts.Provenance((0, 1), [], 1, 0, None, None, "e", "q", None, None, "c", None),
    )
    data = json.loads(encode(label))
    assert data["history"] == []
    assert data["exposed"] == {"item": ["a"], "clicked": [1], "score": [None]}
    assert data["provenance"]["anchors_ts"] is None
    jsonschema.validate(data, contracts.json_schema("labels"))
