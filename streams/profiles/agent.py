"""The profiles role: clicks in event-time order -> profile state and anchor requests.

State is the compacted topic ``profiles``, read back at every assignment. A click is acknowledged once its user's
state is durable, and the state is written only after the request that it says is pending: a crash in between repeats
the same request, which has the same answer.
"""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import msgspec

from streams import metrics
from streams.contracts import AnchorRequest, Feedback, UserAnchors, decode, encode
from streams.log_view import Handler
from streams.profiles.state import (
    AnchorsInForce,
    Positive,
    Profile,
    VectorOf,
    advance,
    answered,
    apply_positive,
    further,
)
from streams.role import PartitionState, Role
from streams.settings import Settings
from streams.views import vectors_from
from streams.watermark import Watermark

SOURCE = "feedback"


@dataclass(order=True)
class Waiting:
    """A click that the watermark has not passed yet, in the order of application."""

    ts: int
    event_id: str
    offset: int
    feedback: Feedback = field(compare=False)


class Partition(PartitionState):
    """Clicks in waiting and the profiles of one partition."""

    def __init__(self, settings: Settings, now: float) -> None:
        super().__init__((SOURCE,), now)
        self.watermark = Watermark((SOURCE,), int(settings.profiles.allowed_lateness_seconds * 1000))
        self.waiting: list[Waiting] = []
        self.profiles: dict[str, Profile] = {}
        self.anchors: dict[str, AnchorsInForce] = {}
        # Users whose anchors came since the last round.
        self.answered: set[str] = set()


class ProfilesRole(Role[Partition]):
    """One worker of the profiles role. The labels role reads the same feedback and writes its dead letters.

    ``versions``: generator, quantiser, encoder in force; ``vector_of``: an item's unit vector, None when unknown.
    """

    writes_dead_letters = False
    own_state = ("profiles",)

    def __init__(
        self,
        settings: Settings,
        versions: tuple[str, str, str],
        dim: int,
        vector_of: VectorOf,
        catalogue_ready: Callable[[], bool],
        health: metrics.Health,
        on_failure: Callable[[BaseException], None],
    ) -> None:
        super().__init__("profiles", (SOURCE,), settings, health, on_failure)
        self._versions = versions
        self._dim = dim
        self._vector_of = vector_of
        self._catalogue_ready = catalogue_ready
        profiles = settings.profiles
        self._idle_timeout = profiles.idle_timeout_wall_seconds or max(1.0, profiles.allowed_lateness_seconds)

    def new_partition(self, now: float) -> Partition:
        return Partition(self.settings, now)

    def ready(self) -> bool:
        return self._catalogue_ready() and self.state_ready

    def state_handlers(self) -> dict[str, Handler]:
        partitions = self.partitions

        def profile_read(record: Any) -> None:
            if record.value is not None:
                profile = decode(Profile, record.value)
                profiles = partitions[record.partition].profiles
                profiles[profile.user_id] = further(profiles.get(profile.user_id), profile)

        def anchors_read(record: Any) -> None:
            if record.value is None:
                return
            anchors = decode(UserAnchors, record.value)
            partition = partitions[record.partition]
            known = partition.anchors.get(anchors.user_id)
            if known is None or (anchors.ts, anchors.version) >= (known.ts, known.version):
                partition.anchors[anchors.user_id] = AnchorsInForce(
                    version=anchors.version,
                    ts=anchors.ts,
                    versions=(anchors.generator, anchors.quantiser, anchors.encoder),
                    vectors=vectors_from(anchors.vectors, self._dim),
                )
                partition.answered.add(anchors.user_id)

        return {"profiles": profile_read, "user-anchors": anchors_read}

    async def take(self, number: int, partition: Partition, source: str, message: Any) -> None:
        feedback = decode(Feedback, message.value or b"")
        self.check_time(feedback.ts, message)
        self.check_key(feedback, message)
        partition.watermark.observe(source, feedback.ts)
        if feedback.kind == "click":
            waiting = Waiting(feedback.ts, feedback.event_id, message.offset, feedback)
            heapq.heappush(partition.waiting, waiting)
        else:
            partition.acks[source].done(message.offset)
        await self._settle(number, partition)

    async def advance(self, number: int, partition: Partition, now: float, idle: set[str]) -> None:
        if SOURCE in idle and self.quiet_for(partition, SOURCE, now) >= self._idle_timeout:
            partition.watermark.idle(SOURCE)
        await self._settle(number, partition)

    async def _settle(self, number: int, partition: Partition) -> None:
        """Apply the clicks that the watermark has passed and ask for the anchors that are needed."""
        nothing_due = not partition.waiting or partition.waiting[0].ts >= partition.watermark.value()
        if not self.ready() or (nothing_due and not partition.answered):
            return
        async with partition.lock:
            if not self.owns(number, partition):
                return
            changed = self._apply_due(partition)
            users, partition.answered = partition.answered | changed.keys(), set()
            requests: list[AnchorRequest] = []
            for user_id in users:
                profile = partition.profiles.get(user_id)
                if profile is None:
                    continue
                anchors = partition.anchors.get(user_id)
                after = profile if anchors is None else answered(profile, anchors)
                after, request = advance(
                    after,
                    anchors,
                    self._versions,
                    self._vector_of,
                    self.settings.profiles,
                    self.settings.generator.history,
                )
                if request is not None:
                    requests.append(request)
                if after is not profile:
                    partition.profiles[user_id] = after
                    changed.setdefault(user_id, [])
            await asyncio.gather(*(self._ask(number, request) for request in requests))
            for user_id, offsets in changed.items():
                if not self.owns(number, partition):
                    return  # a rebalance came first: the states are for the next owner to write
                await self._write(number, partition, user_id, offsets)

    def _apply_due(self, partition: Partition) -> dict[str, list[int]]:
        """Apply clicks in order; the changed users, each with the offsets that its new state covers."""
        changed: dict[str, list[int]] = {}
        watermark = partition.watermark.value()
        # One more of just the time of the watermark may come.
        while partition.waiting and partition.waiting[0].ts < watermark:
            click = heapq.heappop(partition.waiting)
            user_id = click.feedback.user_id
            profile = partition.profiles.get(user_id) or Profile(user_id)
            positive = Positive(click.ts, click.event_id, click.feedback.item_id)
            after = apply_positive(profile, positive, self.settings.profiles.max_positives)
            if after is None:
                metrics.LATE_POSITIVES.inc()
            else:
                partition.profiles[user_id] = after
            changed.setdefault(user_id, []).append(click.offset)
        return changed

    async def _ask(self, number: int, request: AnchorRequest) -> None:
        metrics.ANCHOR_REQUESTS.labels(request.reason).inc()
        await self.publisher.deliver("anchor-requests", request.user_id.encode(), encode(request), number)

    async def _write(self, number: int, partition: Partition, user_id: str, offsets: list[int]) -> None:
        acks = partition.acks[SOURCE]

        def durable() -> None:
            for offset in offsets:
                acks.done(offset)

        state = msgspec.json.encode(partition.profiles[user_id])
        await self.publisher.send("profiles", user_id.encode(), state, then=durable, partition=number)
