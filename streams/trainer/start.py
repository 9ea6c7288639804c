"""Where a trainer starts: ``gpl train --start-from``.

    latest            the newest valid checkpoint; without one, the beginning of the log
    step-1234         the checkpoint of that step
    before=TIME       the newest valid checkpoint written by then: back to before an incident
    earliest          new weights, from the beginning of the log
    TIME              new weights, from the first label record published then or later

TIME is ISO 8601 (UTC where it names no zone) or ``ts=`` milliseconds since the epoch. All but ``latest`` discard the
checkpoints that are newer than the place where they start, so that a restart goes on from there.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal

from streams.trainer.checkpoint import Checkpoint, CheckpointError, CheckpointStore

_STEP = re.compile(r"step-(\d+)")


@dataclass(frozen=True)
class StartFrom:
    """``value``: a step, or milliseconds since the epoch."""

    kind: Literal["latest", "step", "before", "earliest", "time"]
    value: int = 0
    text: str = "latest"

    @classmethod
    def parse(cls, text: str) -> StartFrom:
        """Raises ValueError naming the forms that there are."""
        if text == "latest":
            return cls("latest", 0, text)
        if text == "earliest":
            return cls("earliest", 0, text)
        if found := _STEP.fullmatch(text):
            return cls("step", int(found[1]), text)
        try:
            if text.startswith("before="):
                return cls("before", _millis(text.removeprefix("before=")), text)
            return cls("time", _millis(text), text)
        except ValueError as error:
            raise ValueError(
                f"start-from: {text!r}; latest, earliest, step-N, before=TIME or TIME expected, "
                "TIME as 2026-01-31T12:00 (UTC) or ts=MILLISECONDS"
            ) from error

    def checkpoint(self, store: CheckpointStore) -> Checkpoint | None:
        """The checkpoint to go on from, None to begin anew. Raises CheckpointError when the one that is named is
        missing or damaged; the store is then unchanged."""
        if self.kind == "latest":
            return store.load_newest()
        found: Checkpoint | None = None
        if self.kind == "step":
            found = store.load(self.value)
        elif self.kind == "before":
            found = store.load_at_most(None, lambda manifest: manifest.written_at <= self.value)
            if found is None:
                raise CheckpointError(f"no valid checkpoint was written by {self.text.removeprefix('before=')}")
        store.discard_after(-1 if found is None else found.step)
        return found


def _millis(text: str) -> int:
    if text.startswith("ts="):
        return int(text.removeprefix("ts="))
    moment = datetime.fromisoformat(text)
    return int((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp() * 1000)
