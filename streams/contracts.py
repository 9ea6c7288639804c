"""The records on the wire: one msgspec struct a topic, JSON, strict.

Unknown fields, wrong types and out-of-range values are errors that name the field; what a consumer does
with such a record is write it to the dead letters. ``ts`` is always integer milliseconds since the epoch,
of the event, never of a machine. Lists that can hold thousands of entries are columns: parallel arrays.
"""

from __future__ import annotations

import hashlib
from typing import Annotated, Any, Literal, TypeVar

import msgspec

SCHEMA_VERSION = 1

Id = Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
Millis = Annotated[int, msgspec.Meta(ge=0, le=253_402_300_799_999, description="milliseconds since the epoch")]


class Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Base of every record: immutable, strict about unknown fields, defaults left out on the wire."""


class Item(Record, frozen=True):
    """``gpl.items``: one catalogue item. A null value (tombstone) under its key removes the item."""

    item_id: Id
    text: str
    category: str | None = None
    embedding: Annotated[list[float], msgspec.Meta(min_length=1)] | None = None
    attributes: dict[str, Any] | None = None
    ts: Millis | None = None


class Recall(Record, frozen=True):
    """``gpl.recalls``: what recall returned for one request. ``sources`` is parallel to ``candidates``."""

    request_id: Id
    user_id: Id
    ts: Millis
    candidates: Annotated[list[Id], msgspec.Meta(min_length=1)]
    sources: list[str] | None = None

    def __post_init__(self) -> None:
        if self.sources is not None and len(self.sources) != len(self.candidates):
            raise ValueError(
                f"sources: {len(self.sources)} entries for {len(self.candidates)} candidates; they are parallel"
            )


class Feedback(Record, frozen=True):
    """``gpl.feedback``: one impression or click. A click implies the impression.

    Without ``request_id`` the event joins by user and item, to the latest recall that holds the item.
    ``weight`` is carried for training (dwell, price); it does not change the label.
    """

    event_id: Id
    user_id: Id
    item_id: Id
    ts: Millis
    kind: Literal["impression", "click"]
    request_id: Id | None = None
    position: Annotated[int, msgspec.Meta(ge=0)] | None = None
    weight: Annotated[float, msgspec.Meta(ge=0)] | None = None


class ItemVector(Record, frozen=True):
    """``gpl.item-vectors`` (compacted): an item in the frozen space, written once by the catalogue agent.

    ``vector``: little-endian float32, unit length, base64 in JSON. ``content`` is the hash of what was encoded.
    """

    item_id: Id
    vector: bytes
    sid: list[int]
    content: str
    encoder: str
    quantiser: str


class AnchorRequest(Record, frozen=True):
    """``gpl.anchor-requests``: the anchors of a user are wanted as of ``ts``.

    ``sequence`` counts a user's requests from 1 and becomes the anchors' version.
    ``positives`` are the recent positively met items, oldest first, up to and including ``ts``. ``miss``: mean anchor
    miss of the newest of them, null where there are no anchors to miss; with the reason it says how needy the user is.
    """

    user_id: Id
    ts: Millis
    sequence: int
    reason: Literal["cold", "drift", "stale", "version"]
    positives: list[Id]
    miss: float | None = None


class UserAnchors(Record, frozen=True):
    """``gpl.user-anchors`` (compacted): the answer to one anchor request; in force from ``ts`` on.

    K anchors as columns: ``sid`` K x levels, ``logprob`` K natural logs of the whole beam's probability,
    ``vectors`` K x dim little-endian float32 unit rows (base64 in JSON), ``history_factor`` K values in [0, 1].
    """

    user_id: Id
    ts: Millis
    version: int
    sid: list[list[int]]
    logprob: list[float]
    vectors: bytes
    history_factor: list[float]
    history: list[Id]
    generator: str
    quantiser: str
    encoder: str


class Calibration(Record, frozen=True):
    """``gpl.calibrations`` (compacted): from the raw score to the label, in force from ``ts`` on.

    ``kind`` "platt": sigmoid(slope * score + intercept); "isotonic": linear between the knots (``scores``, ``labels``),
    which are parallel and ascending; "none": the cosine linearly to [0, 1], (1 + score) / 2.
    """

    version: str
    ts: Millis
    kind: Literal["platt", "isotonic", "none"]
    slope: float = 1.0
    intercept: float = 0.0
    fitted_on: int = 0
    scores: list[float] = []
    labels: list[float] = []


class Exposed(Record, frozen=True, omit_defaults=False):
    """Columns of the exposed items. ``score``: raw anchor score, null without anchors or vector."""

    item: list[Id]
    clicked: list[int]
    score: list[float | None]


class Unexposed(Record, frozen=True, omit_defaults=False):
    """Columns of the unexposed candidates: raw anchor score, calibrated label, confidence; rounded to 6 digits."""

    item: list[Id]
    score: list[float]
    label: list[float]
    confidence: list[float]


Cause = Literal["recall", "feedback", "anchors", "calibration", "restart"]


class Provenance(Record, frozen=True, omit_defaults=False):
    """What a label was made of: enough to explain and to recompute it.

    ``recall``: [partition, offset]; ``feedback``: offsets in the same partition of the feedback topic.
    ``unknown``: candidates and exposed items without a vector. ``correction``: why there is a revision above 0;
    "restart": the request was labelled again after a restart and came out differently. ``anchors_digest``: hash of
    what the anchors say; ``code``: hash of the source that labels. Null in records older than these fields.
    """

    recall: tuple[int, int]
    feedback: list[int]
    candidates: int
    unknown: int
    anchors_ts: int | None
    anchors_version: int | None
    encoder: str
    quantiser: str
    generator: str | None
    calibration: str | None
    config: str
    correction: Cause | None
    anchors_digest: str | None = None
    code: str | None = None


class Label(Record, frozen=True, omit_defaults=False, kw_only=True):
    """``gpl.labels``: the labels of one request. request_id + item + revision identify a label; of two records of one
    revision the first in the log stands (a worker that was put out of its group may have sent the other).

    ``outcome`` "no_anchors": the user had none as of the request, so nothing is pseudo-labelled. ``history``: the
    positives that the anchors were made of, oldest first; an input of the pre-ranker. Empty without anchors, and in
    records older than this field.
    """

    request_id: Id
    revision: int
    user_id: Id
    ts: Millis
    outcome: Literal["labelled", "no_anchors"]
    history: list[Id] = []
    exposed: Exposed
    unexposed: Unexposed
    provenance: Provenance


class ModelUpdate(Record, frozen=True, omit_defaults=False):
    """``gpl.model-updates`` (compacted by model name): a published pre-ranker.

    ``source_offsets``: next offset to read, per partition of the labels topic.
    ``newest_event_ts``: newest event trained on.
    """

    model: str
    version: str
    uri: str
    checksum: str
    source_offsets: dict[str, int]
    newest_event_ts: int
    metrics: dict[str, float]


def under_its_user(key: bytes | None, record: Recall | Feedback) -> bool:
    """Whether a record came under the id of its user as key: only then it is where what it joins is."""
    return key == record.user_id.encode()


def calibration_record(said: dict[str, Any], ts: int = 0) -> Calibration:
    """A fitted calibration (``to_dict`` of the library's) as a record in force from ``ts`` on.

    Its version is a hash of what it says.
    """
    version = hashlib.sha256(msgspec.json.encode(said, order="sorted")).hexdigest()[:12]
    return msgspec.convert({**said, "version": version, "ts": ts}, Calibration)


R = TypeVar("R", bound=Record)

_decoders: dict[type[Any], msgspec.json.Decoder[Any]] = {}
_encoder = msgspec.json.Encoder()


def decode(kind: type[R], data: bytes) -> R:
    """Parse and check one record. Raises msgspec.DecodeError: malformed, or (ValidationError) names the field."""
    decoder = _decoders.get(kind)
    if decoder is None:
        decoder = _decoders[kind] = msgspec.json.Decoder(kind)
    try:
        record: R = decoder.decode(data)
    except UnicodeDecodeError as error:
        wrong = error.object[error.start]
        raise msgspec.DecodeError(f"invalid UTF-8: {error.reason} (byte 0x{wrong:02x})") from error
    except RecursionError as error:
        raise msgspec.DecodeError("JSON is nested too deeply") from error
    return record


def encode(record: Record) -> bytes:
    """The record as JSON bytes; equal records give equal bytes."""
    return _encoder.encode(record)


TOPIC_RECORDS: dict[str, type[Record]] = {
    "items": Item,
    "recalls": Recall,
    "feedback": Feedback,
    "item-vectors": ItemVector,
    "anchor-requests": AnchorRequest,
    "user-anchors": UserAnchors,
    "calibrations": Calibration,
    "labels": Label,
    "model-updates": ModelUpdate,
}


def json_schema(topic: str, record: type[Record] | None = None) -> dict[str, Any]:
    """JSON Schema (2020-12) of a topic's record. ``record``: of a topic that ``TOPIC_RECORDS`` does not have.

    Raises KeyError for an unknown topic name.
    """
    schema = msgspec.json.schema(record or TOPIC_RECORDS[topic])
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": f"gpl.{topic}.v{SCHEMA_VERSION}",
        **schema,
    }
