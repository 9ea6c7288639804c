"""Acknowledgement in order, and the defect of Faust that makes it necessary."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from streams.faust_app import OrderedAcks, make_app
from streams.settings import KafkaSettings


@given(st.integers(1, 30), st.integers(0, 2**32))
def test_only_what_is_done_up_to_there_may_be_committed_whatever_order_it_is_done_in(n, seed):
    acks = OrderedAcks()
    offsets = [10 + 2 * i for i in range(n)]
    for offset in offsets:
        assert acks.add(offset)
    order = list(offsets)
    random.Random(seed).shuffle(order)
    for i, offset in enumerate(order):
        acks.done(offset)
        done = set(order[: i + 1])
        prefix = [o for k, o in enumerate(offsets) if set(offsets[: k + 1]) <= done]
        assert acks.committable == (prefix[-1] + 1 if prefix else None)
    assert acks.committable == offsets[-1] + 1 and len(acks) == 0


def test_a_redelivered_offset_is_not_taken_twice():
    acks = OrderedAcks()
    assert acks.add(5)
    assert not acks.add(5)
    assert not acks.add(4)
    acks.done(5)
    assert acks.committable == 6
    assert not acks.add(5)


def test_nothing_is_taken_or_done_after_the_partition_is_gone():
    acks = OrderedAcks()
    acks.add(1)
    acks.revoke()
    acks.done(1)
    assert acks.committable is None
    assert not acks.add(2)


async def test_faust_itself_commits_past_a_message_in_flight():
    """Why OrderedAcks exists. When this fails, Faust was mended, and OrderedAcks may go."""
    from faust.types import TP

    app = make_app(KafkaSettings(), "defect")
    consumer = app.consumer
    tp = TP("t", 0)
    # Offset 0 is in flight, 1 is done. Nothing was committed yet.
    consumer._acked[tp] = [1]
    consumer._acked_index[tp] = {1}
    assert consumer._new_offset(tp) == 2
    # Committed: next to read is 5. Offset 5 is in flight, 6 is done.
    consumer._committed_offset[tp] = 5
    consumer._acked[tp] = [6]
    consumer._acked_index[tp] = {6}
    assert consumer._new_offset(tp) == 7
