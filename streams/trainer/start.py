"""Where a trainer starts: ``gpl train --start-from``.

    latest            the newest valid checkpoint; without one, the beginning of the log
    step-1234         the checkpoint of that step
    before=TIME       the newest valid checkpoint written by then: back to before an incident
    earliest          new weights, from the beginning of the log
    TIME              new weights, from the first label record published then or later

``--skip-to TIME`` leaves out the label records published before TIME, so that a model goes on past a stretch of bad
ones with the weights from before it.

TIME is ISO 8601 (UTC where it names no zone) or ``ts=`` milliseconds since the epoch. All but ``latest`` discard the
checkpoints that are newer than the place where they start, so that a restart goes on from there: once all else that a
start needs is there, and the place itself is saved.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Literal

from streams.trainer.checkpoint import Checkpoint, CheckpointError, CheckpointStore, OtherSoftwareError

_STEP = re.compile(r"step-(\d+)")


@dataclass(frozen=True)
class StartFrom:
    """``value``: a step, or milliseconds since the epoch. ``skip_to``: the same, None leaves nothing out."""

    kind: Literal["latest", "step", "before", "earliest", "time"]
    value: int = 0
    text: str = "latest"
    skip_to: int | None = None

    @classmethod
    def parse(cls, text: str, skip_to: str | None = None) -> StartFrom:
        """Raises ValueError naming the forms that there are."""
        if skip_to is not None:
            return replace(cls.parse(text), skip_to=_time("skip-to", skip_to), text=f"{text}, skip to {skip_to}")
        if text == "latest":
            return cls("latest", 0, text)
        if text == "earliest":
            return cls("earliest", 0, text)
        if found := _STEP.fullmatch(text):
            return cls("step", int(found[1]), text)
        before = text.startswith("before=")
        return cls("before" if before else "time", _time("start-from", text.removeprefix("before=")), text)

    def checkpoint(self, store: CheckpointStore) -> Checkpoint | None:
        """The checkpoint to go on from, None to begin anew; the store stays as it is. Raises CheckpointError when the
        one that is named is missing or damaged, or one that is looked at cannot be read."""
        try:
            return self._checkpoint(store)
        except OSError as error:
            way = (
                "" if self.kind == "step" else ", or --start-from step-N goes back to another and discards all after it"
            )
            raise CheckpointError(f"{error}; it may pass{way}") from error

    def _checkpoint(self, store: CheckpointStore) -> Checkpoint | None:
        if self.kind == "latest":
            return store.load_newest()
        if self.kind == "step":
            try:
                return store.load(self.value)
            except OtherSoftwareError:
                raise
            except CheckpointError as error:
                why = f"start-from: step-{self.value}: {error}; `gpl models checkpoints` lists what there is"
                raise CheckpointError(why) from error
        if self.kind != "before":
            return None
        found = store.load_at_most(None, lambda manifest: manifest.written_at <= self.value)
        if found is None:
            raise CheckpointError(f"start-from: {self.text}: no valid checkpoint was written by then")
        return found


def _time(option: str, text: str) -> int:
    try:
        if text.startswith("ts="):
            return int(text.removeprefix("ts="))
        moment = datetime.fromisoformat(text)
    except ValueError as error:
        raise ValueError(
            f"{option}: {text!r}; a TIME such as 2026-01-31T12:00 (UTC) or ts=MILLISECONDS expected"
            + ("; or latest, earliest, step-N, before=TIME" if option == "start-from" else "")
        ) from error
    return int((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp() * 1000)
