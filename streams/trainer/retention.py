"""Which checkpoints and models stay: the newest ones, and beside them the first of each of some hours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

Name = TypeVar("Name")

_HOUR_MS = 3_600_000


def retained(written: Mapping[Name, int | None], keep: int, keep_hourly: int, now: int) -> set[Name]:
    """The newest ``keep``, and the first of each of the newest ``keep_hourly`` hours that there is anything of.

    ``written``: of what is sound, in the order of writing, wall milliseconds; None where other software does not say.
    Hours that something was written in, not hours of the clock: one that ran ahead for a moment would end them all.
    Those after ``now``, of such a moment, count for nothing and stay.
    """
    first: dict[int, Name] = {}
    for name, at in written.items():
        if at is not None:
            first.setdefault(at // _HOUR_MS, name)
    hours = sorted(first) if keep_hourly else []
    past = [hour for hour in hours if hour <= now // _HOUR_MS]
    return {*[*written][-keep:], *(first[hour] for hour in past[-keep_hourly:] + hours[len(past) :])}
