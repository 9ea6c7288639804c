"""The format of dead letters, the caps after which a consumer halts, and what a redrive would send."""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType, SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.table import Table
from typer.testing import CliRunner

from streams import dead_letters
from streams.dead_letters import Guard, Halted, Original, Refused
from streams.dlq import command, render
from streams.dlq.letters import Filter, Letter, letter_of
from streams.dlq.redrive import headers_of, plan
from streams.replay import command as replay_command
from streams.settings import DeadLetterSettings
from streams.trainer import command as trainer_command

maybe_bytes = st.none() | st.binary(max_size=20)
header_lists = st.lists(st.tuples(st.text(max_size=10) | st.just("gpl-topic"), maybe_bytes), max_size=5)


def record(original: Original, error: Exception, offset: int = 7) -> SimpleNamespace:
    """The dead letter of ``original`` as a consumer would get it."""
    headers = dead_letters.headers(original, error)
    return SimpleNamespace(
        partition=0,
        offset=offset,
        timestamp=99,
        key=original.key,
        value=dead_letters.value_of(original),
        headers=headers,
    )


@given(maybe_bytes, maybe_bytes, header_lists, st.integers(0, 2**62))
def test_the_original_comes_out_as_it_went_in(key, value, headers, offset):
    original = Original("gpl.recalls", 3, offset, 1234, key, value, tuple(headers))
    written = record(original, Refused("future", "ts: 9 is ahead \udcff"))
    assert written.key is not None or written.value is not None, "no client writes a record of neither"
    letter = letter_of(written)
    assert letter.original == original
    assert (letter.reason, letter.error) == ("future", "Refused")
    assert letter.size == (None if value is None else len(value))


@given(header_lists, st.integers(0, 5))
def test_a_redriven_record_carries_its_headers_and_the_count(headers, rounds):
    mine = [(name, value) for name, value in headers if name not in (dead_letters.REDRIVES, "gpl-redriven-from")]
    now = tuple(mine)
    for n in range(rounds):
        letter = letter_of(record(Original("t", 0, n, 0, b"k", b"v", now), ValueError("x"), offset=n))
        assert letter.redrives == n
        now = tuple(headers_of(letter))
        assert list(now[: len(mine)]) == [(name, value or b"") for name, value in mine]
        assert dict(now)["gpl-redriven-from"] == str(n).encode()
        assert len(now) == len(mine) + 2


@pytest.mark.parametrize("said", [b"", b"-1", b"x", b"9" * 5000, None])
def test_a_count_of_redrives_that_is_none_of_ours_is_zero(said):
    assert dead_letters.redrives([(dead_letters.REDRIVES, said)]) == 0


def test_what_was_sent_back_or_loops_is_left_out():
    def letter(redrives: int, **changes):
        headers = ((dead_letters.REDRIVES, str(redrives).encode()),) if redrives else ()
        found = letter_of(record(Original("t", 0, 1, 0, None, b"", headers), ValueError("x")))
        return replace(found, **changes)

    fresh, back, looping, empty = letter(2), letter(0, redriven=True), letter(3), letter(1, size=None)
    planned = plan([fresh, back, looping, empty], max_redrives=3)
    assert (planned.send, planned.already, planned.looping) == ([fresh], [back], [looping])
    assert planned.empty == [empty]


def test_filters_meet_every_condition():
    letter = letter_of(record(Original("gpl.items", 0, 1, 0, None, b"{"), Refused("item", "no vector")))
    assert Filter().takes(letter)
    assert Filter(topic="gpl.items", reason="item", since_ms=99, until_ms=100, ids=frozenset({"7"})).takes(letter)
    for other in (
        Filter(topic="gpl.recalls"),
        Filter(reason="key"),
        Filter(since_ms=100),
        Filter(until_ms=99),
        Filter(ids=frozenset({"8"})),
    ):
        assert not other.takes(letter)


def test_a_record_of_somebody_else_is_no_letter():
    assert letter_of(SimpleNamespace(partition=0, offset=1, timestamp=0, key=None, value=b"", headers=[])) is None


def judge(guard: Guard, verdicts: list[tuple[int, bool]]) -> int | None:
    """Feed (partition, good) in order; the index of the record that halts, None when none does."""
    for n, (partition, good) in enumerate(verdicts):
        try:
            if good:
                guard.accepted("t", partition)
            else:
                guard.refused("t", partition, n, ValueError("bad"))
        except Halted:
            return n
    return None


def expected(verdicts: list[tuple[int, bool]], settings: DeadLetterSettings) -> int | None:
    """The same from the definition: every prefix looked at anew."""
    for n, (partition, good) in enumerate(verdicts):
        if good:
            continue
        own = [ok for p, ok in verdicts[: n + 1] if p == partition]
        run = next((k for k, ok in enumerate(reversed(own)) if ok), len(own))
        if run > settings.max_consecutive:
            return n
        window = [ok for _, ok in verdicts[: n + 1]][-settings.window_records :]
        if len(window) == settings.window_records and window.count(False) > settings.max_ratio * len(window):
            return n
    return None


@given(
    st.lists(st.tuples(st.integers(0, 1), st.booleans()), max_size=60),
    st.integers(1, 8),
    st.sampled_from([0.0, 0.3, 0.5, 1.0]),
)
def test_caps_hold_as_defined(verdicts, consecutive, ratio):
    settings = DeadLetterSettings(max_consecutive=consecutive, max_ratio=ratio, window_records=10)
    assert judge(Guard(settings), verdicts) == expected(verdicts, settings)


def test_halting_says_which_cap_and_which_record():
    guard = Guard(DeadLetterSettings(max_consecutive=1))
    guard.refused("gpl.recalls", 4, 10, ValueError("x"))
    with pytest.raises(Halted, match=r"max_consecutive.*gpl\.recalls, partition 4, offset 11: ts: soon"):
        guard.refused("gpl.recalls", 4, 11, ValueError("ts: soon"))


# --- the commands ----------------------------------------------------------------------------------------------------


def dlq(monkeypatch: pytest.MonkeyPatch, value: bytes, *arguments: str, message: str = "bad") -> tuple[int, str]:
    """Exit status and output of ``gpl dlq`` where this is the only letter."""
    found = letter_of(record(Original("gpl.recalls", 0, 1, 0, b"k", value, ()), Refused("[/r]", message)))

    def letters(*_: object) -> list[Letter]:
        assert found is not None
        return [found]

    monkeypatch.setattr(command, "index", letters)
    monkeypatch.setattr(command, "whole", letters)
    done = CliRunner().invoke(command.app, list(arguments), env={"COLUMNS": "300"})
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.output


@pytest.mark.parametrize("message", ["key is '[/b]x'", "[red]x", "shop:key:12"])
def test_messages_are_listed_as_they_are(monkeypatch: pytest.MonkeyPatch, message: str):
    code, output = dlq(monkeypatch, b"{}", "list", message=message)
    assert code == 0 and message in output and output.count("[/r]") == 2


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (b'{"u": "shop:key:12"}', '"u": "shop:key:12"'),
        (b'{"u": "[red]x[/b]"}', '"u": "[red]x[/b]"'),
        (b'{"u": "\\ud800"}', '|{"u": "\\ud800"}|'),
        (b"[" * 1_500 + b"]" * 1_500, "|[[[[[[[[[[[[[[[[|"),
        (b"[" * 200_000, "|[[[[[[[[[[[[[[[[|"),
        ('{"u": "café"}'.encode(), '"u": "café"'),
    ],
    ids=["emoji", "markup", "surrogate", "nested", "nested deeper", "letters"],
)
def test_every_value_is_shown(monkeypatch: pytest.MonkeyPatch, value: bytes, shown: str):
    code, output = dlq(monkeypatch, value, "show", "7")
    assert code == 0 and shown in output


@pytest.mark.parametrize("ago", ["99999999999d", "999999d", "9" * 5_000 + "s"])
def test_a_time_before_the_first_year_is_refused(monkeypatch: pytest.MonkeyPatch, ago: str):
    code, output = dlq(monkeypatch, b"{}", "list", "--since", ago)
    assert code == 2 and "before the first year" in output and "--since" in output


@pytest.mark.parametrize("name", ["recalls", "gpl.recalls"])
def test_letters_of_a_topic_are_found_under_both_of_its_names(monkeypatch: pytest.MonkeyPatch, name: str):
    code, output = dlq(monkeypatch, b"{}", "list", "--topic", name)
    assert code == 0 and "gpl.recalls[0]@1" in output


@pytest.mark.parametrize("arguments", [["list"], ["redrive"]])
@pytest.mark.parametrize(
    ("option", "known"), [("--topic", "recalls, feedback"), ("--reason", "'malformed', 'invalid'")]
)
def test_what_no_letter_can_have_is_refused(
    monkeypatch: pytest.MonkeyPatch, arguments: list[str], option: str, known: str
):
    code, output = dlq(monkeypatch, b"{}", *arguments, option, "nope")
    assert code == 2 and option in output and "'nope'" in output and known in output


@pytest.mark.parametrize("module", [command, replay_command, trainer_command], ids=["dlq", "replay", "models"])
def test_consoles_show_words_of_the_data_as_they_are(module: ModuleType):
    table = Table()
    table.add_row("[/b] :key:")
    for console in (getattr(module, name) for name in ("_out", "_err") if hasattr(module, name)):
        with console.capture() as shown:
            console.print("[/a] :smile:")
            console.print(table)
        assert "[/a] :smile:" in shown.get() and "[/b] :key:" in shown.get()


@pytest.mark.parametrize(("millis", "text"), [(0, "1970-01-01T00:00:00+00:00"), (2**62, f"{2**62} ms"), (-1, "1969")])
def test_a_time_that_no_calendar_holds_is_its_number(millis: int, text: str) -> None:
    assert render.time(millis).startswith(text)
