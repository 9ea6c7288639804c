"""From a joined request to its label record. Pure: what replay and explain run is this."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from gpl.labels import labeller
from streams import contracts
from streams.labels.code import code_version
from streams.labels.joiner import Joined
from streams.views import calibration_of, history_of, prepared_anchors

Lookup = Callable[[list[str]], tuple[list[str], NDArray[np.float32]]]
"""ids -> the known among them, in order, and their vectors (n, dim)."""

_CODE = b',"code":'  # the last field of the record

DIGITS = 6
"""Scores, labels and confidences are recorded to this many decimals."""


@dataclass(frozen=True)
class AnchorSet:
    """A user's anchors as a record gave them, and the ``history`` that they were made of; ``prepared`` is None for a
    record without anchors, or whose anchors are of another space: their cosines with our items would mean nothing.

    ``digest``: hash of what is matched. A refresh that was answered twice, over a catalogue that had changed in
    between, has the same version and another digest.
    """

    ts: int
    version: int
    generator: str
    prepared: labeller.PreparedAnchors | None
    history: list[str]
    digest: str


@dataclass(frozen=True)
class Versions:
    """What this process labels with. ``code``: by default that of the source that runs."""

    encoder: str
    quantiser: str
    config: str
    code: str = field(default_factory=code_version)

    @property
    def space(self) -> tuple[str, str]:
        """What vectors must share to be compared: the versions of encoder and quantiser."""
        return self.encoder, self.quantiser


def anchor_set(
    record: contracts.UserAnchors, space: tuple[str, str], dim: int, levels: int, config: labeller.Config
) -> AnchorSet:
    """Prepare an anchors record for matching in ``space`` (versions of encoder and quantiser).

    Raises ValueError when its columns do not fit each other.
    """
    prepared = None
    if record.sid and (record.encoder, record.quantiser) == space:
        prepared = prepared_anchors(record, dim, levels, config)
    said = msgspec.json.encode([record.vectors, record.logprob, record.history_factor])
    digest = hashlib.blake2b(said, digest_size=6).hexdigest()
    return AnchorSet(record.ts, record.version, record.generator, prepared, history_of(record), digest)


def make_label(
    joined: Joined,
    partition: int,
    anchors: AnchorSet | None,
    calibration: contracts.Calibration | None,
    lookup: Lookup,
    versions: Versions,
    stages: dict[str, float] | None = None,
) -> contracts.Label:
    """The label of a request, as revision 0.

    Every candidate that was not exposed and that the catalogue knows is labelled once, in the order of recall;
    without anchors none is. Exposed items carry their raw score, null where there is none. ``stages``: seconds by
    stage, added to.
    """
    began = time.thread_time()
    recall = joined.recall
    exposed = list(joined.exposed)
    others = dict.fromkeys(recall.candidates)
    candidates = len(others)
    for item in exposed:
        others.pop(item, None)
    asked = [*exposed, *others]
    known, vectors = lookup(asked)
    looked_up = time.thread_time()
    first_unexposed = next((i for i, item in enumerate(known) if item not in joined.exposed), len(known))
    exposed_score: dict[str, float] = {}
    unexposed = contracts.Unexposed([], [], [], [])
    matched = anchors is not None and anchors.prepared is not None
    if anchors is not None and anchors.prepared is not None and known:
        result = labeller.label(anchors.prepared, calibration_of(calibration), vectors)
        score = _rounded(result.score)
        exposed_score = dict(zip(known[:first_unexposed], score[:first_unexposed], strict=True))
        unexposed = contracts.Unexposed(
            item=known[first_unexposed:],
            score=score[first_unexposed:],
            label=_rounded(result.label[first_unexposed:]),
            confidence=_rounded(result.confidence[first_unexposed:]),
        )
    if stages is not None:
        stages["lookup"] += looked_up - began
        stages["match"] += time.thread_time() - looked_up
    return contracts.Label(
        request_id=recall.request_id,
        revision=0,
        user_id=recall.user_id,
        ts=recall.ts,
        outcome="labelled" if matched else "no_anchors",
        history=anchors.history if matched and anchors else [],
        exposed=contracts.Exposed(
            item=exposed,
            clicked=[int(clicked) for clicked in joined.exposed.values()],
            score=[exposed_score.get(item) for item in exposed],
        ),
        unexposed=unexposed,
        provenance=contracts.Provenance(
            recall=(partition, joined.recall_offset),
            feedback=joined.feedback_offsets,
            candidates=candidates,
            unknown=len(asked) - len(known),
            anchors_ts=anchors.ts if matched and anchors else None,
            anchors_version=anchors.version if matched and anchors else None,
            encoder=versions.encoder,
            quantiser=versions.quantiser,
            generator=anchors.generator if matched and anchors else None,
            calibration=(calibration.version if calibration else "none") if matched else None,
            config=versions.config,
            correction=None,
            anchors_digest=anchors.digest if matched and anchors else None,
            code=versions.code,
        ),
    )


def digest(label: contracts.Label) -> bytes:
    """Hash of what a label of revision 0 says."""
    return digest_of(contracts.encode(label))


def digest_of(encoded: bytes) -> bytes:
    """Hash of what a label says, from the bytes of its revision 0: equal for equal content.

    The code's version is left out, or every deployment would correct all labels that are still retained.
    """
    content, found, _ = encoded.rpartition(_CODE)
    return hashlib.blake2b(content if found else encoded, digest_size=16).hexdigest().encode()


def corrected(label: contracts.Label, revision: int, cause: contracts.Cause) -> contracts.Label:
    """The same label as a higher revision."""
    provenance = msgspec.structs.replace(label.provenance, correction=cause)
    return msgspec.structs.replace(label, revision=revision, provenance=provenance)


def _rounded(values: NDArray[Any]) -> list[float]:
    # Through float64, or the shortest decimal form of a float32 would carry its binary tail.
    rounded: list[float] = np.round(values.astype(np.float64), DIGITS).tolist()
    return rounded
