"""The batch journal leads from a step back to the beginning, says where it breaks off, and does not grow for ever."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from streams.storage import Storage, open_storage
from streams.trainer import batch_journal
from streams.trainer.batch_journal import Batch, BatchJournal, JournalError, Run, ranges, software
from streams.trainer.checkpoint import Checkpoint, CheckpointStore
from streams.trainer.rebuild import RebuildError, _ahead, _base


@pytest.fixture(params=["local", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    return open_storage(tmp_path if request.param == "local" else request.getfixturevalue("bucket"))


@pytest.fixture(autouse=True)
def small_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_journal, "SEGMENT_BATCHES", 4)


def batch(step: int) -> Batch:
    return Batch([(0, 10 * step, 10 * step + 7), (2, step, step + 1)], [(1, step)] if step % 3 == 0 else [], step / 7)


def begin(journal: BatchJournal, parent: int | None = None, step: int = 0) -> Run:
    return journal.begin(
        lambda number: Run(
            number, parent, step, "latest", {0: 0}, {1: 2}, {"dim": 8}, {"encoder": "e"}, 1, software(), 5
        )
    )


def write(journal: BatchJournal, first: int, last: int, sync_every: int = 3) -> None:
    for step in range(first, last + 1):
        journal.append(batch(step))
        if step % sync_every == 0:
            journal.sync()
    journal.sync()


def steps(journal: BatchJournal, run: int, after: int, to: int) -> list[tuple[int, Batch]]:
    return list(journal.batches(run, after, to))


def test_batches_come_back_in_order_whatever_was_synced_when(storage: Storage) -> None:
    journal = BatchJournal(storage)
    assert begin(journal).run == 1
    write(journal, 1, 22)
    again = BatchJournal(storage)
    assert steps(again, 1, 0, 22) == [(n, batch(n)) for n in range(1, 23)]
    assert steps(again, 1, 5, 9) == [(n, batch(n)) for n in range(6, 10)]
    assert steps(again, 1, 9, 9) == []
    assert len(storage.names("journal")) == 1 + 6  # the header, and full segments but for the last
    with pytest.raises(JournalError, match="run 1: the journal holds no batch of step 23"):
        steps(again, 1, 0, 23)


def test_what_was_not_synced_is_not_there(storage: Storage) -> None:
    journal = BatchJournal(storage)
    begin(journal)
    write(journal, 1, 6)
    journal.append(batch(7))
    with pytest.raises(JournalError, match="step 7"):
        steps(BatchJournal(storage), 1, 0, 7)


def test_each_start_goes_on_from_the_step_that_it_took_up(storage: Storage) -> None:
    journal = BatchJournal(storage)
    begin(journal)
    write(journal, 1, 10)
    second = BatchJournal(storage)
    begin(second, 1, 6)  # steps 7 to 10 were lost
    write(second, 7, 9)
    third = BatchJournal(storage)
    assert begin(third, 2, 8).run == 3
    write(third, 9, 12)
    assert [(run.run, last) for run, last in third.lineage(3, 11)] == [(1, 6), (2, 8), (3, 11)]
    assert [(run.run, last) for run, last in third.lineage(1, 10)] == [(1, 10)]
    with pytest.raises(JournalError, match="run 3 begins at step 8, step 7 of it"):
        third.lineage(3, 7)
    with pytest.raises(JournalError, match="run 9: no header"):
        third.lineage(9, 1)


@pytest.mark.parametrize("damage", [b"", b"\x1f\x8b half", b"{}"])
def test_a_damaged_segment_is_named(storage: Storage, damage: bytes) -> None:
    journal = BatchJournal(storage)
    begin(journal)
    write(journal, 1, 6)
    storage.put("journal/000001-0000000005.json.gz", damage)
    assert len(steps(journal, 1, 0, 4)) == 4
    with pytest.raises(JournalError, match="0000000005"):
        steps(journal, 1, 0, 6)


def test_old_segments_go_and_what_is_left_still_leads_somewhere(storage: Storage) -> None:
    now = [1_000_000.0]
    first = BatchJournal(storage, clock=lambda: now[0])
    begin(first)
    write(first, 1, 8)
    now[0] += 3 * 86400
    second = BatchJournal(storage, clock=lambda: now[0])
    begin(second, 1, 8)
    write(second, 9, 14)
    second.prune(days=5)
    assert len(steps(second, 1, 0, 8)) == 8
    now[0] += 3 * 86400
    name = min(name for name in storage.names("journal") if name.startswith("000001-"))
    whole = storage.read(f"journal/{name}")
    storage.put(f"journal/{name}", whole[:-9])
    second.prune(days=5)
    assert second.runs() == [1, 2], "damaged: it may not be old"
    storage.put(f"journal/{name}", whole)
    now[0] += 40 * 86400
    second.prune(days=5)
    assert second.runs() == [1, 2], "of a moment's clock, that may have run ahead, nothing follows"
    write(second, 15, 22)
    now[0] -= 39.5 * 86400
    second.prune(days=5)
    assert second.runs() == [2]
    assert [(run.run, last) for run, last in second.lineage(2, 14)] == [(2, 14)]
    assert len(steps(second, 2, 8, 14)) == 6
    with pytest.raises(JournalError, match="run 1"):
        steps(second, 1, 0, 8)


def test_a_rebuild_does_not_begin_with_what_the_journal_has_let_go_of(storage: Storage) -> None:
    journal = BatchJournal(storage)
    begin(journal)
    write(journal, 1, 8)
    store, lineage = CheckpointStore(storage, keep=1), journal.lineage(1, 8)
    assert _base(store, journal, lineage, None, True, {}) is None
    storage.remove("journal/000001-0000000001.json.gz")
    with pytest.raises(RebuildError, match="beginning of run 1"):
        _base(store, journal, lineage, None, True, {})
    with pytest.raises(RebuildError, match="no checkpoint"):
        _base(store, journal, lineage, None, False, {})


def saved(store: CheckpointStore, step: int, run: int) -> None:
    store.save(Checkpoint(step, run, {}, {}, {"model": {"w": torch.zeros(1)}}, b"{}", {}, {}, 0))


@pytest.mark.parametrize("parent", [0, 1])
def test_a_history_begins_from_the_checkpoint_that_its_first_run_took_up(storage: Storage, parent: int) -> None:
    """Of a backfill (run 0, without a journal), or of a run whose header was let go of."""
    store, journal = CheckpointStore(storage, keep=9), BatchJournal(storage)
    if parent:
        begin(journal)
    run = begin(journal, parent, 8).run
    write(journal, 9, 12)
    storage.remove("journal/000001.json") if parent else None
    for step, of in ((7, parent), (8, parent), (9, parent), (12, run)):
        saved(store, step, of)
    lineage = journal.lineage(run, 12)
    for wanted in (None, 8):
        found = _base(store, journal, lineage, wanted, False, {0: 0})
        assert found is not None and (found.step, found.run) == (8, parent)
    for step in (7, 9):
        with pytest.raises(RebuildError, match=f"step-{step}: is of run {parent}, which is not in"):
            _base(store, journal, lineage, step, False, {})
    # A partition that came later counts from where a run first read it.
    third = journal.begin(
        lambda number: Run(
            number, run, 12, "latest", {0: 9, 1: 0}, {1: 2}, {"dim": 8}, {"encoder": "e"}, 1, software(), 5
        )
    )
    for wanted in (8, 12):
        with pytest.raises(RebuildError, match=rf"step-{wanted}: goes on from records that partitions \[1\]"):
            _base(store, journal, [*lineage, (third, 14)], wanted, False, {1: 1})
    # Where a run took a checkpoint up when labels had expired, it goes on from what was left.
    found = _base(store, journal, [*lineage, (third, 14)], 12, False, {0: 9})
    assert found is not None and [run.run for run, _ in _ahead([*lineage, (third, 14)], found)] == [third.run]
    # The backfill knows no positions; those of the run's start count.
    with pytest.raises(RebuildError, match=r"step-8: goes on from records that partitions \[0\]"):
        _base(store, journal, lineage, 8, False, {0: 1})
    with pytest.raises(RebuildError, match=f"run {run} of the journal goes on from step 8"):
        _base(store, journal, lineage, None, True, {})


def test_at_step_0_a_history_begins_whatever_run_began_there_before(storage: Storage) -> None:
    journal = BatchJournal(storage)
    begin(journal)
    second = BatchJournal(storage)
    begin(second, 1, 0)  # the first was killed before its first batch
    write(second, 1, 3)
    second.prune(days=5)
    lineage = second.lineage(2, 3)
    assert [run.run for run, _ in lineage] == [2]
    assert _base(CheckpointStore(storage, keep=1), second, lineage, None, True, {}) is None


@given(st.dictionaries(st.integers(0, 5), st.tuples(st.integers(0, 50), st.integers(0, 9)), min_size=1))
def test_ranges_cover_what_was_read_and_leave_out_quiet_partitions(moves: dict[int, tuple[int, int]]) -> None:
    before = {p: at for p, (at, _) in moves.items()}
    after = {p: at + more for p, (at, more) in moves.items()}
    found = ranges(before, after)
    assert {p: (first, end) for p, first, end in found} == {p: (before[p], after[p]) for p in moves if moves[p][1]}
