"""What the bench commands ask of their options before anything is measured, and how they fail."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import typer

if TYPE_CHECKING:
    from streams.broker.select import Choice

Number = TypeVar("Number", int, float)


@contextmanager
def clear_errors() -> Iterator[None]:
    """What whoever measures can put right is one message and exit code 1; anything else keeps its traceback."""
    from kafka.errors import KafkaError

    from gpl.evaluation.dataset import DataError
    from gpl.evaluation.sources.movielens import DatasetMissingError as NoRatings
    from streams.broker.process import BrokerError
    from streams.demo.movielens import DatasetMissingError
    from streams.demo.processes import ProcessEndedError

    of_data = DatasetMissingError, NoRatings, DataError
    try:
        yield
    except (BrokerError, ProcessEndedError, *of_data, KafkaError, ConnectionError, TimeoutError) as error:
        typer.echo(f"error: {error or type(error).__name__}", err=True)
        raise typer.Exit(1) from error


def broker_of(option: str) -> Choice:
    """The broker that ``--broker`` means; one that somebody else runs has answered.

    Raises BrokerError when it means nothing, cannot run here or does not answer.
    """
    from streams.broker import select
    from streams.settings import KafkaSettings

    choice = select.choose(option)
    if choice.kind == "external":
        select.open_broker(choice, KafkaSettings(), Path()).start(5.0)
    return choice


def numbers(text: str, kind: Callable[[str], Number], least: Number, option: str) -> list[Number]:
    """Numbers with commas between them. Raises BadParameter for what is none, and for one below ``least``."""
    try:
        found = [kind(part) for part in text.split(",") if part.strip()]
    except ValueError as error:
        raise typer.BadParameter(f"{text!r}: numbers with commas between them", param_hint=option) from error
    if not all(number >= least for number in found):  # nan is not either
        raise typer.BadParameter(f"{text!r}: none may be below {least}", param_hint=option)
    return found


def one_of(given: Sequence[str], known: Sequence[str], option: str) -> None:
    """Raises BadParameter for a name that is not known."""
    for name in given:
        if name not in known:
            raise typer.BadParameter(f"{name!r}: expected {', '.join(known)}", param_hint=option)
