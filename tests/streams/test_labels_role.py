"""The labels role without a broker: batches go in as the intake hands them over, what it publishes is caught."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest
from faust.types import TP
from prometheus_client import REGISTRY

from streams import metrics
from streams.contracts import Calibration, Feedback, Label, Recall, UserAnchors, encode
from streams.dead_letters import Original
from streams.labels import published
from streams.labels.agent import Have, LabelsRole
from streams.labels.published import Published, Said
from streams.labels.record import Versions
from streams.settings import DeadLetterSettings, Settings
from streams.views import vector_bytes

DAY = 86_400_000
START = 1_700_000_000_000
VECTORS = np.eye(4, 8, dtype=np.float32)


class Site:
    """A role that owns partition 0, whose labels have been read back: there are none."""

    def __init__(self, settings: Settings, have: Have | None = None) -> None:
        self.labels: dict[str, Label] = {}
        self.sent: list[SimpleNamespace] = []
        self.letters: list[str] = []
        self.messages: list[str] = []
        self._offsets = {"recalls": 0, "feedback": 0}
        failures: list[BaseException] = []
        role = LabelsRole(
            settings, Versions("e", "q", "c"), 8, 2, _lookup, lambda: True, metrics.Health(), failures.append, have
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

    async def receive(self, source: str, records: list[Recall | Feedback], **given: bytes | None) -> None:
        """``key``: by default each record's user; ``value``: by default the record."""
        batch = []
        for record in records:
            batch.append(
                SimpleNamespace(
                    topic=f"gpl.{source}",
                    partition=0,
                    offset=self._offsets[source],
                    timestamp=record.ts,
                    key=given.get("key", record.user_id.encode()),
                    value=given.get("value", encode(record)),
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
        self.messages.append(str(error))
        then()


def _lookup(ids: list[str]) -> tuple[list[str], np.ndarray]:
    return list(ids), VECTORS[[int(i) % 4 for i in ids]]


@pytest.mark.parametrize("key", [b"v", b"", None])
async def test_a_record_that_is_not_under_its_users_key_is_refused(key: bytes | None) -> None:
    site = Site(Settings())
    site.anchors(START - DAY, 1)
    end = START + DAY
    click = Feedback("e0", "u", "0", START + 1, "click", "r0")
    await site.receive("recalls", [Recall("r0", "u", START, ["0", "1"])])
    await site.receive("feedback", [click, Feedback("e9", "other", "0", end, "impression")])
    await site.receive(
        "recalls", [Recall("lost", "u", START + 2, ["0", "1"]), Recall("far", "u", 2 * end, ["0"])], key=key
    )
    await site.receive("feedback", [Feedback("e1", "u", "1", START + 3, "click", "r0")], key=key)
    assert site.letters == ["key"] * 3 and site.labels == {}  # event time has not been taken along
    await site.receive("recalls", [Recall("last", "u", end, ["0"])])
    assert site.labels.keys() == {"r0"} and site.labels["r0"].exposed.item == ["0"]
    assert site.failures == []


@pytest.mark.parametrize("source", ["recalls", "feedback"])
async def test_a_null_value_is_refused_as_one(source: str) -> None:
    site = Site(Settings())
    await site.receive(source, [Recall("r0", "u", START, ["0"])], value=None)
    assert site.letters == ["invalid"] and site.messages == ["value: null; only gpl.items takes a null value"]


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


async def test_a_tick_makes_so_many_corrections_and_lets_go_of_nothing_before_the_last() -> None:
    site = Site(Settings())
    site.anchors(START - DAY, 1)
    end = START + 1_900_000  # the window is over, the retention is not
    await site.receive("feedback", [Feedback("e0", "other", "0", end, "impression")])
    recalls = [Recall(f"r{n}", "u", START + n, ["0", "1", "2"]) for n in range(150)]
    await site.receive("recalls", [*recalls, Recall("last", "u", end, ["0"])])
    assert len(site.sent) == 150
    site.role.calibrations(SimpleNamespace(value=encode(Calibration("new", 0, "platt", 2.0, -1.0)), key=b"new"))
    partition, steps = site.role.partitions[0], 0

    def step() -> None:
        nonlocal steps
        steps += 1

    site.role.at_work = step  # type: ignore[method-assign]
    made = []
    while partition.touched:
        await site.role.advance(0, partition, START / 1000, set())
        made.append(len(site.sent) - 150 - sum(made))
    assert made == [64, 64, 22] and steps >= 150
    assert {label.revision for name, label in site.labels.items() if name != "last"} == {1}
    assert {label.provenance.calibration for name, label in site.labels.items() if name != "last"} == {"new"}


@pytest.mark.parametrize("who", ["intake", "tick"])
async def test_waiting_for_an_index_that_is_away_is_no_standstill(who: str) -> None:
    away, asked, now = True, asyncio.Event(), 1000.0

    async def have(_ids: Iterable[str], wanted: Callable[[], bool]) -> bool:
        while away and wanted():
            asked.set()
            await asyncio.sleep(0)
        return not away

    site = Site(Settings(), have)
    role = site.role
    role.clock = lambda: now
    role._ticked = role._stepped = now
    await site.receive("feedback", [Feedback("e", "other", "0", START + DAY, "impression")])
    role.state_ready = who == "intake"  # else nothing is labelled as it comes
    waiting = asyncio.ensure_future(
        site.receive("recalls", [Recall("r", "u", START, ["0"]), Recall("last", "u", START + DAY, ["0"])])
    )
    if who == "tick":
        await waiting
        role.state_ready = True
        waiting = asyncio.ensure_future(role.advance(0, role.partitions[0], now, set()))
    for _ in range(10):
        now += 30
        if who == "intake":
            role._ticked = now  # the tick has other partitions to look at
        asked.clear()
        await asked.wait()
        assert role.working_since(now - 60), "it asks again and again"
    away = False
    await waiting
    assert site.labels["r"].outcome == "no_anchors" and site.failures == []


async def test_a_batch_that_hangs_shows_although_the_tick_goes_on() -> None:
    now, hung = 1000.0, asyncio.Event()
    site = Site(Settings())
    role = site.role
    role.begin({TP(f"gpl.{source}", number): "" for source in ("recalls", "feedback") for number in (0, 1)})
    role.state_ready = True
    for partition in role.partitions.values():
        partition.published, partition.repeating = Published(), False
    role.clock = lambda: now
    role._ticked = role._stepped = now

    async def no_room(*_: object, **__: object) -> None:
        hung.set()
        await asyncio.Event().wait()

    role.publisher.send = no_room  # type: ignore[assignment,method-assign]
    await site.receive("feedback", [Feedback("e", "other", "0", START + DAY, "impression")])
    batch = [Recall("r", "u", START, ["0"]), Recall("last", "u", START + DAY, ["0"])]
    working = asyncio.ensure_future(site.receive("recalls", batch))
    await hung.wait()
    for _ in range(8):
        now += 10
        for number, partition in role.partitions.items():
            await role.advance(number, partition, now, set())
        role._ticked = now
    assert not role.working_since(now - 60)
    working.cancel()


async def test_recalls_whose_label_is_in_the_log_are_no_dead_letters_whatever_else_differs() -> None:
    a, b = Recall("a", "u", START + 10_000, ["0", "1"]), Recall("b", "u", START + 9_000, ["0", "1"])
    end = [Recall("last", "u", START + DAY, ["0"])]
    watermark = [Feedback("e", "other", "0", START + DAY, "impression")]
    before = Site(Settings())
    await before.receive("recalls", [a, b, *end])
    await before.receive("feedback", watermark)
    assert {"a", "b"} <= before.labels.keys()
    # The next owner: b is over, a is not, and the label of a is another one now.
    after = Site(Settings())
    horizon = str(b.ts + 2_400_000)
    after.role.begin({TP("gpl.recalls", 0): horizon, TP("gpl.feedback", 0): horizon})
    after.role.state_ready = True
    after.anchors(START - DAY, 1)
    after.role._read_back = lambda *_: None  # type: ignore[method-assign]
    await after.receive("recalls", [a, b, *end])
    await after.receive("feedback", watermark)
    partition = after.role.partitions[0]
    partition.published = Published(ends={"recalls": 3, "feedback": 1})
    for record in before.sent:
        partition.published.note(record)
    await after.role.advance(0, partition, START / 1000, set())
    assert after.letters == [] and after.labels["a"].revision == 1 and after.failures == []


async def test_anchors_are_let_go_of_beside_a_partition_that_has_seen_nothing() -> None:
    site = Site(Settings())
    site.role.begin({TP(f"gpl.{source}", number): "" for source in ("recalls", "feedback") for number in (0, 1)})
    for version in range(50):
        site.anchors(START + version * 3_600_000, version)
    site.role.partitions[0].joiner.forget(START + 100 * 3_600_000)
    site.role._forget_anchors(1e9)
    assert site.role._anchors.at(0, "u", START + 48 * 3_600_000) is None
    assert site.role._anchors.at(0, "u", START + DAY * 99) is not None


async def test_a_label_made_by_the_tick_says_when_its_request_was_closed() -> None:
    site = Site(Settings())
    site.role.state_ready = False  # a backlog: what is due waits for the anchors to be read
    end = START + DAY
    await site.receive("recalls", [Recall("r", "u", START, ["0"]), Recall("last", "u", end, ["0"])])
    await site.receive("feedback", [Feedback("e", "other", "0", end, "impression")])
    site.role.state_ready = True
    await site.role.advance(0, site.role.partitions[0], (end + 600_000) / 1000, set())
    assert dict(site.sent[0].headers)["gpl-closed-at"] == str(end).encode()


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


def test_records_of_others_among_the_labels_are_passed_over() -> None:
    ours = {
        published.REQUEST_ID: b"r",
        published.REVISION: b"2",
        published.DIGEST: b"d",
        published.OUTCOME: b"labelled",
    }
    others = [{}, *({**ours, name: value} for name in ours for value in (None, b"\xff") if name != published.DIGEST)]
    read = Published()
    for n, headers in enumerate([ours, *others, {**ours, published.DIGEST: None}]):
        read.note(SimpleNamespace(headers=list(headers.items()), timestamp=n))
    assert read.labels == {"r": Said(2, b"d", "labelled")}
