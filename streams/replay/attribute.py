"""Why a replayed label differs from the recorded one: established by putting the recorded inputs back, one at a time.

A label is a pure function of its inputs, and provenance names them: feedback, anchors, calibration, configuration,
catalogue (item vectors) and code. Inputs that differ are put back from the log; if all of them together give the record
again, nothing else was different. What an input did to an item is how far its label moves when that input alone is put
back. What remains after all is said of is given to an input that the log cannot give back, or named as what it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

import msgspec
import numpy as np

from streams.contracts import Calibration, Label
from streams.labels.joiner import Joined
from streams.labels.record import Lookup, make_label
from streams.replay.recorded import Recorded
from streams.replay.run import Replay, Result, Setup, ready_anchors
from streams.replay.state import AnchorHistory, Refresh, Vector
from streams.replay.values import Kind, Value, distance, kind, move, values
from streams.settings import LabelSettings

Cause = Literal[
    "feedback", "anchors", "catalogue", "calibration", "configuration", "code version", "numerics", "unexplained"
]
CAUSES: tuple[Cause, ...] = get_args(Cause)
ROUNDING = 2.5e-6
"""Labels made of the same inputs on another machine agree to about 1e-6, and are rounded to 6 digits after that."""
MOMENT_MS = 60_000
"""A label is made of the catalogue as its worker knew it, at most this long before the label was logged."""


@dataclass(frozen=True, slots=True)
class Move:
    """One item whose label differs. ``recorded``, ``replayed``: None where it has none."""

    item: str
    kind: Kind
    cause: Cause
    size: float
    recorded: Value | None
    replayed: Value | None


@dataclass(frozen=True)
class Difference:
    """A request whose labels differ. ``causes``: each input that differs, and how; ``reproduced``: whether the recorded
    inputs, put back, gave the recorded label again, so that nothing else can have been different.
    """

    recorded: Recorded
    result: Result
    causes: dict[Cause, str]
    reproduced: bool
    moves: list[Move]


@dataclass(frozen=True)
class _Inputs:
    """All that a label is made of."""

    joined: Joined
    anchors: Refresh | None
    calibration: Calibration | None
    setup: Setup
    configured: Joined
    """What the log joins under these settings, whatever was recorded."""
    vectors: Mapping[str, Vector | None] = field(default_factory=dict)
    """Items whose vector is not that of the catalogue as it is now."""


class Attribution:
    """Attributes the differences of one partition. ``known``: set-ups by the fingerprint that provenance names, each
    with its place in ``Result.request.joined``.
    """

    def __init__(self, replay: Replay, anchors: AnchorHistory) -> None:
        self._replay = replay
        self._anchors = anchors
        self._known = {setup.versions.config: (at, setup) for at, setup in reversed([*enumerate(replay.setups)])}

    def difference(self, result: Result, recorded: Recorded) -> Difference:
        """``result`` has a label that does not say what the recorded one says."""
        label = result.label
        assert label is not None
        joined = result.request.joined[0]
        now = _Inputs(joined, result.in_force.refresh, result.calibration, self._replay.setup, joined)
        then, causes, lost = self._recorded_inputs(result, recorded, now, label)
        target, present = values(recorded.label), values(label)
        again = values(self._label(then, result))
        if again != target:
            then, again = self._other_versions(then, result, recorded, again, causes)
        if again == target:
            lost.discard("configuration")
        elif "configuration" in lost:
            causes["configuration"] += "; the settings of then are not known here: their part is what is left"
        swapped = {
            cause: values(self._label(_put_back(now, then, cause), result)) for cause in causes if cause not in lost
        }
        rest = self._remainder(recorded.label, label, target, again, causes, lost)
        moves = []
        for item in dict.fromkeys([*target, *present]):
            was, is_now = target.get(item), present.get(item)
            if was == is_now:
                continue
            effects = {cause: distance(is_now, said.get(item)) for cause, said in swapped.items()}
            if rest is not None and again.get(item) != was:
                effects[rest] = max(effects.get(rest, 0.0), distance(was, again.get(item)))
            cause = max(effects, key=lambda c: effects[c]) if effects else (rest or "unexplained")
            moves.append(Move(item, kind(was, is_now), cause, move(was, is_now), was, is_now))
        moves.sort(key=lambda m: (-m.size, m.item))
        return Difference(recorded, result, causes, again == target, moves)

    def _label(self, inputs: _Inputs, result: Result) -> Label:
        anchors = ready_anchors(self._anchors, inputs.anchors, inputs.setup.config)
        lookup, versions = self._lookup(inputs.vectors), inputs.setup.versions
        return make_label(inputs.joined, result.request.partition, anchors, inputs.calibration, lookup, versions)

    def _lookup(self, other: Mapping[str, Vector | None]) -> Lookup:
        catalogue = self._replay.items.catalogue
        if not other:
            return catalogue.lookup

        def lookup(ids: list[str]) -> tuple[list[str], Vector]:
            rows: dict[str, Vector | None] = dict(zip(*catalogue.lookup(ids), strict=True))
            rows.update(other)
            known = [(item, row) for item in ids if (row := rows.get(item)) is not None]
            empty = np.zeros((0, catalogue.dim), np.float32)
            return [item for item, _ in known], np.stack([row for _, row in known]) if known else empty

        return lookup

    def _recorded_inputs(
        self, result: Result, recorded: Recorded, now: _Inputs, label: Label
    ) -> tuple[_Inputs, dict[Cause, str], set[Cause]]:
        """The recorded inputs as far as the log has them, what differs, and what of it the log does not have."""
        was, is_now = recorded.label.provenance, label.provenance
        causes: dict[Cause, str] = {}
        lost: set[Cause] = set()
        then = now
        at = 0
        if was.config != is_now.config:
            causes["configuration"] = f"{was.config} then, {is_now.config} now"
            # Of unknown settings those in force are tried: if the label comes out again, they say the same of it.
            at, setup = self._known.get(was.config, (len(self._replay.setups) - 1, self._replay.setups[-1]))
            then = replace(then, setup=setup)
            if was.config not in self._known:
                lost.add("configuration")
            else:
                causes["configuration"] = _settings(setup.labels, now.setup.labels) or causes["configuration"]
        joined = result.request.joined[at]
        then = replace(then, joined=joined, configured=joined)
        shown = dict(zip(recorded.label.exposed.item, map(bool, recorded.label.exposed.clicked), strict=True))
        if list(shown.items()) != list(joined.exposed.items()) and "configuration" not in lost:
            causes["feedback"] = _feedback(was.feedback, joined.feedback_offsets)
            then = replace(then, joined=msgspec.structs.replace(joined, exposed=shown, feedback_offsets=was.feedback))
        then = self._anchors_of(result, recorded, label, then, causes, lost)
        if was.calibration != is_now.calibration and None not in (was.calibration, is_now.calibration):
            causes["calibration"] = f"{was.calibration} then, {is_now.calibration} now"
            found = (
                None if was.calibration == "none" else self._replay.calibrations.by_version.get(str(was.calibration))
            )
            then = replace(then, calibration=found)
            if found is None and was.calibration != "none":
                lost.add("calibration")
                causes["calibration"] += "; the one of then is not in the log any more"
        if (was.encoder, was.quantiser) != (is_now.encoder, is_now.quantiser):
            causes["catalogue"] = f"another space: encoder {was.encoder} then, {is_now.encoder} now"
            lost.add("catalogue")
        else:
            items = self._replay.items
            named = [*dict.fromkeys([*result.request.recall.candidates, *joined.exposed, *shown])]
            changed = {
                item: items.as_of(item, recorded.kafka_ms) for item in items.changed_after(named, recorded.kafka_ms)
            }
            if changed:
                causes["catalogue"] = _items("changed since", changed)
                then = replace(then, vectors=changed)
        return then, causes, lost

    def _anchors_of(
        self,
        result: Result,
        recorded: Recorded,
        label: Label,
        then: _Inputs,
        causes: dict[Cause, str],
        lost: set[Cause],
    ) -> _Inputs:
        was, is_now = recorded.label.provenance, label.provenance
        named = (was.anchors_ts, was.anchors_version)
        other = was.anchors_digest is not None and was.anchors_digest != is_now.anchors_digest
        if named == (is_now.anchors_ts, is_now.anchors_version) and not other:
            return then
        causes["anchors"] = f"{_version(was.anchors_version)} then, {_version(is_now.anchors_version)} now"
        if was.anchors_ts is None or was.anchors_version is None:
            return replace(then, anchors=None)
        if named == (is_now.anchors_ts, is_now.anchors_version):
            causes["anchors"] += ", which says something else"
        user = result.request.recall.user_id
        refresh = self._anchors.recorded(user, was.anchors_ts, was.anchors_version, was.anchors_digest)
        if refresh is None:
            lost.add("anchors")
            causes["anchors"] += "; those of then are not in the log any more"
            return then
        return replace(then, anchors=refresh)

    def _other_versions(
        self,
        then: _Inputs,
        result: Result,
        recorded: Recorded,
        again: dict[str, Value],
        causes: dict[Cause, str],
    ) -> tuple[_Inputs, dict[str, Value]]:
        """Try the other versions of the items that are not reproduced: a label is made a moment before it is logged,
        and what it was made with is what reproduces it.
        """
        items, vectors, target = self._replay.items, dict(then.vectors), values(recorded.label)
        since = recorded.kafka_ms - MOMENT_MS
        absent = {i: None for i in again if i not in target and any(v.kafka_ms > since for v in items.versions(i))}
        found = list(absent)
        if absent:
            vectors.update(absent)
            again = values(self._label(replace(then, vectors=vectors), result))
        for item in [item for item, value in target.items() if again.get(item) != value]:
            versions = items.versions(item)
            for version in versions if len(versions) > 1 else ():
                trial = values(self._label(replace(then, vectors={**vectors, item: version.vector}), result))
                if trial.get(item) == target[item]:
                    vectors[item] = version.vector
                    found.append(item)
                    break
        if not found:
            return then, again
        then = replace(then, vectors=vectors)
        causes["catalogue"] = _items("with another vector than now", vectors)
        return then, values(self._label(then, result))

    def _remainder(
        self,
        recorded: Label,
        label: Label,
        target: dict[str, Value],
        again: dict[str, Value],
        causes: dict[Cause, str],
        lost: set[Cause],
    ) -> Cause | None:
        """What to give the difference to that is left when all recorded inputs that the log has are put back."""
        if again == target:
            return None
        if lost:
            # One of them: the log does not tell them apart.
            first = next(cause for cause in CAUSES if cause in lost)
            if len(lost) > 1:
                causes[first] += f"; the log cannot tell its part from that of {', '.join(sorted(lost - {first}))}"
            return first
        pairs = [(target.get(item), again.get(item)) for item in dict.fromkeys([*target, *again])]
        both = [(a, b) for a, b in pairs if a is not None and b is not None]
        if len(both) == len(pairs) and all(_close(a, b) for a, b in both):
            causes["numerics"] = "the same inputs, rounded otherwise: another machine, numpy or BLAS"
            return "numerics"
        was, is_now = recorded.provenance.code, label.provenance.code
        if was != is_now:
            causes["code version"] = f"{was or 'not recorded'} then, {is_now} now; all other inputs were put back"
            return "code version"
        if len(both) == len(pairs) and all((a.score, a.confidence) == (b.score, b.confidence) for a, b in both):
            causes["calibration"] = (
                f"{recorded.provenance.calibration} says something else now: scores and confidences are reproduced, "
                "the labels made of them are not"
            )
            return "calibration"
        if self._replay.items.incomplete:
            causes["catalogue"] = "by elimination: an item vector that has been compacted away; all else is the same"
            return "catalogue"
        causes["unexplained"] = "every input that provenance names is the same, and the label is not"
        return "unexplained"


def _put_back(now: _Inputs, then: _Inputs, cause: Cause) -> _Inputs:
    """The present inputs with one of them as it was."""
    if cause == "feedback":
        return replace(now, joined=then.joined)
    if cause == "anchors":
        return replace(now, anchors=then.anchors)
    if cause == "calibration":
        return replace(now, calibration=then.calibration)
    if cause == "configuration":
        return replace(now, setup=then.setup, joined=then.configured)
    if cause == "catalogue":
        return replace(now, vectors=then.vectors)
    return now


def _close(a: Value, b: Value) -> bool:
    parts = ((a.score, b.score), (a.label, b.label), (a.confidence, b.confidence))
    if a.exposed != b.exposed:
        return False
    return all(x == y or (x is not None and y is not None and abs(x - y) <= ROUNDING) for x, y in parts)


def _settings(then: LabelSettings, now: LabelSettings) -> str:
    before, after = then.model_dump(), now.model_dump()
    return "; ".join(
        f"labels.{name}: {before[name]} then, {after[name]} now" for name in before if before[name] != after[name]
    )


def _version(version: int | None) -> str:
    return "none" if version is None else f"version {version}"


def _feedback(then: list[int], now: list[int]) -> str:
    gone, new = sorted(set(then) - set(now)), sorted(set(now) - set(then))
    parts = [
        f"{len(some)} event{'s' * (len(some) != 1)} {how}"
        for some, how in ((new, "joined since"), (gone, "lost"))
        if some
    ]
    return " and ".join(parts) + f", at offsets {[*new, *gone][:5]}" if parts else "the same events, in another order"


def _items(how: str, changed: Mapping[str, object]) -> str:
    names = ", ".join(list(changed)[:3]) + (", ..." if len(changed) > 3 else "")
    return f"{len(changed)} item{'s' * (len(changed) != 1)} {how}: {names}"
