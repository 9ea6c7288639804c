"""The labels role without a broker: batches go in as the intake hands them over, what it publishes is caught."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace

import msgspec
import numpy as np
from faust.types import TP
from prometheus_client import REGISTRY

from streams import metrics
from streams.contracts import Feedback, Label, Recall, UserAnchors, encode
from streams.dead_letters import Original
from streams.labels.agent import LabelsRole
from streams.labels.published import Published
from streams.labels.record import Versions
from streams.settings import DeadLetterSettings, Settings
from streams.views import vector_bytes

DAY = 86_400_000
START = 1_700_000_000_000
VECTORS = np.eye(4, 8, dtype=np.float32)


class Site:
    """A role that owns partition 0, whose labels have been read back: there are none."""

    def __init__(self, settings: Settings) -> None:
        self.labels: dict[str, Label] = {}
        self.sent: list[SimpleNamespace] = []
        self.letters: list[str] = []
        self._offsets = {"recalls": 0, "feedback": 0}
        failures: list[BaseException] = []
        role = LabelsRole(
            settings, Versions("e", "q", "c"), 8, 2, _lookup, lambda: True, metrics.Health(), failures.append
        )
        role.publisher = SimpleNamespace(send=self._send, dead_letter=self._dead_letter)  # type: ignore[assignment]
        role._follow_state = lambda *_: asyncio.sleep(0)  # type: ignore[assignment,method-assign]
        role.app._consumer = SimpleNamespace(assignment=set, _thread=SimpleNamespace(cpu_seconds=0.0))
        role.begin({TP("gpl.recalls", 0): "", TP("gpl.feedback", 0): ""})
        role.state_ready = True
        role.partitions[0].published = Published()
        role.partitions[0].repeating = False
        self.role, self.failures = role, failures

    def anchors(self, ts: int, version: int) -> None:
        record = UserAnchors(
            "u", ts, version, [[0, 0]], [-1.0], vector_bytes(VECTORS[version % 4][None]), [0.5], ["0"], "g", "q", "e"
        )
        self.role._anchors(SimpleNamespace(value=encode(record), key=b"u", partition=0))

    async def receive(self, source: str, records: list[Recall | Feedback]) -> None:
        batch = []
        for record in records:
            batch.append(
                SimpleNamespace(
                    topic=f"gpl.{source}",
                    partition=0,
                    offset=self._offsets[source],
                    timestamp=record.ts,
                    key=b"u",
                    value=encode(record),
                    headers=(),
                )
            )
            self._offsets[source] += 1
        await self.role.received(TP(f"gpl.{source}", 0), batch)

    async def _send(self, _topic: str, _key: bytes, value: bytes, headers: object, then: Callable[[], None], **_: int):
        await asyncio.sleep(0)  # as one that waits for room
        self.sent.append(SimpleNamespace(headers=headers, timestamp=START))
        label = msgspec.json.decode(value, type=Label)
        self.labels[label.request_id] = label
        then()

    async def _dead_letter(self, original: Original, error: Exception, then: Callable[[], None]) -> None:
        self.letters.append(getattr(error, "reason", ""))
        then()


def _lookup(ids: list[str]) -> tuple[list[str], np.ndarray]:
    return list(ids), VECTORS[[int(i) % 4 for i in ids]]


async def test_anchors_stay_as_long_as_a_request_may_ask_for_them() -> None:
    site = Site(Settings())
    site.anchors(START - DAY, 1)
    site.anchors(START + DAY, 2)
    end = START + 5 * DAY
    await site.receive("feedback", [Feedback("e0", "other", "0", end, "impression")])
    recalls = [Recall(f"r{n}", "u", START + 1000 * n, ["0", "1", "2"]) for n in range(200)]
    working = asyncio.ensure_future(site.receive("recalls", [*recalls, Recall("last", "u", end, ["0"])]))
    while not site.labels:
        await asyncio.sleep(0)
    assert len(site.labels) < 200
    await site.role.advanced(START / 1000)  # the tick, in the midst of a backlog
    await working
    assert {label.provenance.anchors_version for label in site.labels.values()} == {1}
    await site.receive("feedback", [Feedback("e1", "u", "1", START + 1500, "click", "r1")])
    assert (site.labels["r1"].revision, site.labels["r1"].provenance.anchors_version) == (1, 1)
    assert site.failures == []


async def test_anchors_that_are_compacted_away_take_nothing_from_a_label_that_they_made() -> None:
    events = [Recall("r", "u", START, ["0", "1", "2"]), Recall("last", "u", START + DAY, ["0"])]
    watermark = [Feedback("e", "other", "0", START + DAY, "impression")]
    before = Site(Settings())
    before.anchors(START - DAY, 1)
    await before.receive("feedback", watermark)
    await before.receive("recalls", events)
    assert before.labels["r"].outcome == "labelled"
    after = Site(Settings())  # the process that takes over finds the label, but the anchors no more
    published = after.role.partitions[0].published
    assert published is not None
    for record in before.sent:
        published.note(record)
    lost = REGISTRY.get_sample_value("gpl_anchors_lost_total") or 0.0
    await after.receive("feedback", watermark)
    await after.receive("recalls", events)
    assert after.labels == {} and REGISTRY.get_sample_value("gpl_anchors_lost_total") == lost + 1
    await after.receive("recalls", [Recall("new", "u", START + 1, ["0"])])
    await after.receive("feedback", [Feedback("f", "u", "1", START + 2, "click", "r")])
    assert after.labels["new"].outcome == "no_anchors"
    assert (after.labels["r"].revision, after.labels["r"].exposed.item) == (1, ["1"])


async def test_recalls_that_come_too_late_count_towards_the_cap() -> None:
    site = Site(Settings(dead_letters=DeadLetterSettings(max_consecutive=20)))
    role, clock = site.role, [START / 1000]
    role.clock = lambda: clock[0]
    await site.receive("recalls", [Recall("first", "u", START, ["0"])])
    await site.receive("feedback", [Feedback("e", "u", "0", START + 1, "click", "first")])
    later = START + DAY
    await site.receive("feedback", [Feedback("f", "u", "0", later, "impression")])
    await site.receive("recalls", [Recall("second", "u", later, ["0"])])
    clock[0] += 1000  # retention_wall_seconds
    await role.advance(0, role.partitions[0], clock[0], set())
    assert role.partitions[0].joiner.horizon > START
    for n in range(30):
        await site.receive("recalls", [Recall(f"late{n}", "u", START + n, ["0"])])
    assert site.letters == ["late"] * 20
    assert role.halted


async def test_the_lag_of_a_partition_that_has_gone_is_not_told_any_more() -> None:
    def lag(source: str) -> float | None:
        return REGISTRY.get_sample_value("gpl_consumer_lag", {"topic": source, "partition": "0"})

    role = Site(Settings()).role

    async def behind(*_: object) -> int:
        return 3

    async def gone_meanwhile(*_: object) -> int:
        role.revoked()
        return 4

    role._behind = behind  # type: ignore[method-assign]
    await role._tick()
    assert (lag("recalls"), lag("feedback")) == (3, 3)
    role._behind = gone_meanwhile  # type: ignore[method-assign]
    await role._tick()
    assert (lag("recalls"), lag("feedback")) == (None, None)
