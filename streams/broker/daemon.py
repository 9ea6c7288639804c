"""A local broker in the background: started by one command, found and stopped by a later one through a state file."""

from __future__ import annotations

import signal
from pathlib import Path

import msgspec

from streams.broker.process import BrokerError, is_running, serves_metadata, signal_group, wait_until
from streams.broker.select import Choice, local_broker
from streams.settings import KafkaSettings

DEFAULT_DIRECTORY = Path("runs/broker")
_STOP_SECONDS = 30.0


class State(msgspec.Struct, frozen=True):
    """What ``broker.json`` holds."""

    kind: str
    description: str
    pid: int
    bootstrap: str
    log: str


def _state_file(directory: Path) -> Path:
    return directory / "broker.json"


def running(directory: Path = DEFAULT_DIRECTORY) -> State | None:
    """The broker of that directory if it runs. A state file whose process is gone is taken away."""
    path = _state_file(directory)
    try:
        state = msgspec.json.decode(path.read_bytes(), type=State)
    except FileNotFoundError:
        return None
    except msgspec.DecodeError:
        state = None
    # The broker's command line names its directory, so another program under a reused pid is not mistaken for it.
    if state is not None and is_running(state.pid, str(directory.absolute())):
        return state
    path.unlink(missing_ok=True)
    return None


def serving(state: State) -> bool:
    """Whether the broker answers clients."""
    return serves_metadata({"bootstrap_servers": [state.bootstrap]})


def start(
    choice: Choice, kafka: KafkaSettings, directory: Path = DEFAULT_DIRECTORY, port: int = 9092
) -> tuple[State, bool]:
    """The broker of that directory, serving, and whether this call started it.

    Raises BrokerError when it cannot be started, or when one of another kind or on another port runs there.
    """
    present = running(directory)
    if present is not None:
        if present.kind != choice.kind:
            raise BrokerError(f"a broker of kind {present.kind} runs in {directory}; `gpl broker stop` ends it")
        if port not in (0, int(present.bootstrap.rsplit(":", 1)[1])):
            raise BrokerError(f"the broker in {directory} runs at {present.bootstrap}; `gpl broker stop` ends it")
        if not wait_until(lambda: serving(present), 30.0):
            raise BrokerError(
                f"the broker in {directory} (pid {present.pid}) runs but does not answer; see {present.log}"
            )
        return present, False
    broker = local_broker(choice, kafka, directory, port=port)
    bootstrap = broker.start(detached=True)
    state = State(choice.kind, choice.description, broker.pid, bootstrap, str(broker.log))
    aside = _state_file(directory).with_suffix(".new")
    aside.write_bytes(msgspec.json.format(msgspec.json.encode(state)))
    aside.replace(_state_file(directory))
    return state, True


def stop(directory: Path = DEFAULT_DIRECTORY, grace: float = _STOP_SECONDS) -> State | None:
    """End the broker of that directory, by force after ``grace`` seconds; None when none ran.

    Raises BrokerError when it survives even that.
    """
    state = running(directory)
    if state is None:
        return None
    for number, patience in ((signal.SIGTERM, grace), (signal.SIGKILL, 10.0)):
        signal_group(state.pid, number)
        if wait_until(lambda: running(directory) is None, patience):
            return state
    raise BrokerError(f"the broker in {directory} (pid {state.pid}) does not end")
