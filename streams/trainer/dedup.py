"""Each label once: what of a label record is still to be trained on.

A label record is identified by (request_id, revision). Of a request,

- a revision that is not above the newest one seen is a redelivery: skipped;
- a correction (a higher revision) trains the exposed items that no earlier revision trained. An item that was trained
  as shown is not trained again, also when the correction turned it into a click: no label enters the weights twice;
- the pseudo-labels are trained once, from the first revision that has any.

The window holds the newest ``capacity`` requests; the one seen first leaves first. Within the log a trainer reads
each offset once (its positions are in the checkpoint), so the window needs to span only how far apart a producer may
repeat or correct a label. A correction of a request that the window does not know, once it has let go of any, comes
too late: whether something of it was trained is forgotten, so nothing is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto

import msgspec

from streams.trainer.columns import Columns


class Trained(msgspec.Struct, array_like=True, gc=False):
    """What was trained of one request: newest revision, exposed items, whether pseudo-labels were.

    Tens of thousands stay for long: there is nothing in them that the collector would have to walk through.
    """

    revision: int
    exposed: tuple[str, ...]
    pseudo: bool


@dataclass(frozen=True)
class Fresh:
    """What of a record is new. ``exposed``: indices into its exposed columns; ``first``: the request is new."""

    first: bool
    exposed: Sequence[int]
    pseudo: bool


class Known(Enum):
    """Why nothing of a record is trained: it was before, or what was before is forgotten."""

    REPEATED = auto()
    FORGOTTEN = auto()


class DedupWindow:
    """The newest ``capacity`` requests and what was trained of each. Raises ValueError for a capacity below 1."""

    def __init__(self, capacity: int) -> None:
        if capacity < 1:
            raise ValueError(f"capacity: {capacity}, at least 1 expected")
        self._capacity = capacity
        self._requests: dict[str, Trained] = {}
        self.forgot = False
        """Whether it has let go of a request."""

    def __len__(self) -> int:
        return len(self._requests)

    def admit(self, label: Columns) -> Fresh | Known:
        """What to train of this record, now counted as trained; or why it is not."""
        known = self._requests.get(label.request_id)
        exposed, has_pseudo = tuple(label.items[: label.shown]), len(label.items) > label.shown
        if known is None:
            if label.revision > 0 and self.forgot:
                return Known.FORGOTTEN
            self._requests[label.request_id] = Trained(label.revision, exposed, has_pseudo)
            if len(self._requests) > self._capacity:
                del self._requests[next(iter(self._requests))]
                self.forgot = True
            return Fresh(True, range(label.shown), has_pseudo)
        if label.revision <= known.revision:
            return Known.REPEATED
        done = set(known.exposed)
        fresh = [i for i, item in enumerate(exposed) if item not in done]
        pseudo = has_pseudo and not known.pseudo
        known.revision = label.revision
        known.exposed += tuple(exposed[i] for i in fresh)
        known.pseudo = known.pseudo or pseudo
        return Fresh(False, fresh, pseudo)

    def state(self) -> list[tuple[str, Trained]]:
        """For the checkpoint, oldest first."""
        return list(self._requests.items())

    def restore(self, state: list[tuple[str, Trained]], forgot: bool) -> None:
        """Take over a saved window; of one larger than ``capacity`` the newest stay."""
        self._requests = dict(state[-self._capacity :])
        self.forgot = forgot or len(state) > self._capacity
