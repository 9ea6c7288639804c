"""Sending dead letters back to where they came from.

The original goes to its topic, its partition and its key, byte for byte, with the headers that it had. Two are set
anew: ``gpl-redrives``, one more than before, and ``gpl-redriven-from``, the letter's id. Only when the broker has it
is the letter marked; a crash in between sends it twice, which the identities of records make harmless. What
kafka-python cannot write: a header without a value goes back empty, a record with neither key nor value not at all.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from streams import dead_letters
from streams.dlq.letters import REDRIVEN, Letter, whole
from streams.kafka import consumer, producer
from streams.settings import KafkaSettings
from streams.topics import full_name

SEND_SECONDS = 60.0
CHUNK = 100
"""Letters between two waits for the broker: at most so many are sent again after a crash."""


class NowhereError(ValueError):
    """A letter's origin is not there any more."""


@dataclass(frozen=True)
class Plan:
    """What a redrive would do with the letters that were chosen."""

    send: list[Letter]
    already: list[Letter]
    looping: list[Letter]
    empty: list[Letter]


def plan(chosen: Iterable[Letter], max_redrives: int) -> Plan:
    """Leave out what was sent back already, and what has come back ``max_redrives`` times, which is a loop."""
    result = Plan([], [], [], [])
    for letter in chosen:
        if letter.redriven:
            result.already.append(letter)
        elif letter.redrives >= max_redrives:
            result.looping.append(letter)
        elif letter.original.key is None and letter.size is None:
            result.empty.append(letter)
        else:
            result.send.append(letter)
    return result


def headers_of(letter: Letter) -> list[tuple[str, bytes]]:
    """The original's headers and the two that tell of the redrive."""
    ours = (dead_letters.REDRIVES, dead_letters.REDRIVEN_FROM)
    kept = [(name, value or b"") for name, value in letter.original.headers if name not in ours]
    return [
        *kept,
        (dead_letters.REDRIVES, str(letter.redrives + 1).encode()),
        (dead_letters.REDRIVEN_FROM, letter.id.encode()),
    ]


def execute(kafka: KafkaSettings, letters: list[Letter]) -> Iterator[Letter]:
    """Send these letters back, mark them, and yield each once both are durable.

    Raises NowhereError before anything is sent when an origin is missing, kafka errors when the broker refuses.
    """
    _check_origins(kafka, letters)
    chosen = whole(kafka, frozenset(letter.id for letter in letters))
    # Its retries make no doubles: the producer is idempotent.
    with producer(kafka) as out:
        while chunk := list(islice(chosen, CHUNK)):
            _await([_send(out, letter) for letter in chunk])
            topic = full_name(kafka, dead_letters.TOPIC)
            _await([out.send(topic, key=c.original.key, value=b"", headers=[(REDRIVEN, c.id.encode())]) for c in chunk])
            yield from chunk


def _send(out: Any, letter: Letter) -> Any:
    original = letter.original
    return out.send(
        original.topic, key=original.key, value=original.value, headers=headers_of(letter), partition=original.partition
    )


def _check_origins(kafka: KafkaSettings, letters: list[Letter]) -> None:
    reader = consumer(kafka)
    try:
        for topic, partition in sorted({(letter.original.topic, letter.original.partition) for letter in letters}):
            if partition not in (reader.partitions_for_topic(topic) or ()):
                raise NowhereError(f"{topic}, partition {partition}: not there any more, its letters cannot go back")
    finally:
        reader.close()


def _await(sent: list[Any]) -> None:
    for future in sent:
        future.get(timeout=SEND_SECONDS)
