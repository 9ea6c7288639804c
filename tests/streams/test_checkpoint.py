"""Checkpoints come back exactly, damaged ones are skipped, and a kill while writing loses at most the newest.

On a local directory and on an object store: s3fs against an S3 server in a process of its own.
"""

import contextlib
import json
import multiprocessing
import os
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from streams.durable import sha256_hex
from streams.storage import Storage, open_storage
from streams.trainer.checkpoint import Checkpoint, CheckpointError, CheckpointStore, OtherSoftwareError
from streams.trainer.start import StartFrom


def checkpoint(step: int) -> Checkpoint:
    generator = torch.Generator().manual_seed(step)
    return Checkpoint(
        step=step,
        run=2,
        positions={0: 10 * step, 3: 7},
        vectors={1: step},
        tensors={
            "model": {"w": torch.randn(5, 3, generator=generator), "moments": torch.tensor([1.0, 2.0]).double()},
            "shadow": {"w": torch.randn(5, 3, generator=generator)},
        },
        state=json.dumps({"step": step}).encode(),
        versions={"encoder": "e1", "quantiser": "q1"},
        metrics={"auc": 0.1 + step},
        newest_event_ts=1_700_000_000_000 + step,
        figures=b'{"auc": 0.5}',
    )


def assert_same(found: Checkpoint | None, expected: Checkpoint) -> None:
    assert found is not None
    assert {name: sorted(part) for name, part in found.tensors.items()} == {
        name: sorted(part) for name, part in expected.tensors.items()
    }
    for name, part in expected.tensors.items():
        for key, tensor in part.items():
            assert found.tensors[name][key].dtype == tensor.dtype
            assert torch.equal(found.tensors[name][key], tensor)
    for field in ("step", "run", "positions", "vectors", "figures", "state", "versions", "metrics", "newest_event_ts"):
        assert getattr(found, field) == getattr(expected, field), field


@pytest.fixture(params=["local", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    return open_storage(
        tmp_path / "deep" if request.param == "local" else f"{request.getfixturevalue('bucket')}/checkpoints"
    )


def test_round_trip_is_exact(storage: Storage) -> None:
    store = CheckpointStore(storage, keep=3)
    assert store.load_newest() is None
    uri = store.save(checkpoint(12))
    assert uri.endswith("/step-00000012")
    assert_same(CheckpointStore(storage, keep=3).load_newest(), checkpoint(12))
    assert_same(store.load(12), checkpoint(12))
    with pytest.raises(CheckpointError, match=r"manifest\.json is missing"):
        store.load(13)
    assert_same(CheckpointStore(uri.rpartition("/")[0], keep=3).load_newest(), checkpoint(12))


def test_retention_keeps_the_newest(storage: Storage) -> None:
    store = CheckpointStore(storage, keep=2)
    for step in (1, 2, 30, 4_000):
        store.save(checkpoint(step))
    assert storage.names() == ["step-00000030", "step-00004000"]


def test_retention_keeps_the_first_of_each_hour_for_as_many_hours_as_asked(storage: Storage) -> None:
    now = 1_700_000_000.0 // 3600 * 3600
    for minute in range(0, 300, 20):
        # A new store each time, as after a restart.
        CheckpointStore(storage, keep=2, keep_hourly=3, clock=lambda at=now + 60 * minute: at).save(checkpoint(minute))
    # The newest two, and the first of hours 2, 3 and 4.
    assert CheckpointStore(storage, keep=2).steps() == [120, 180, 240, 260, 280]


def test_a_clock_that_ran_ahead_for_a_moment_ends_no_hours(storage: Storage) -> None:
    for step in range(9):
        ahead = 40 * 86400 if step == 6 else 0
        now = 1_700_000_000.0 + 3600 * step + ahead
        CheckpointStore(storage, keep=1, keep_hourly=3, clock=lambda at=now: at).save(checkpoint(step))
        if step == 6:
            assert CheckpointStore(storage, keep=1).steps() == [4, 5, 6]
    assert CheckpointStore(storage, keep=1).steps() == [5, 6, 7, 8]


def test_what_failed_saves_left_crowds_out_no_good_one(storage: Storage) -> None:
    store = CheckpointStore(storage, keep=3)
    for step in (1, 2, 3):
        store.save(checkpoint(step))
    for step in (4, 5, 6):
        storage.put(f"step-{step:08d}/model.safetensors", b"half")
    store.save(checkpoint(7))
    assert store.steps() == [2, 3, 7]


def test_one_written_by_a_time_can_be_asked_for(storage: Storage) -> None:
    for step, at in ((1, 100.0), (2, 200.0), (3, 300.0)):
        CheckpointStore(storage, keep=9, clock=lambda at=at: at).save(checkpoint(step))
    store = CheckpointStore(storage, keep=9)
    assert_same(store.load_at_most(None, lambda manifest: manifest.written_at <= 250_000), checkpoint(2))
    assert_same(store.load_at_most(1), checkpoint(1))
    assert store.load_at_most(None, lambda manifest: manifest.written_at < 100_000) is None
    store.discard_after(1)
    assert store.steps() == [1]


STEP = "step-00000002"


def rewrite(storage: Storage, file: str, change: Callable[[bytes], bytes]) -> None:
    name = f"{STEP}/{file}"
    storage.put(name, change(storage.read(name)))


def manifest_with(storage: Storage, change: Callable[[dict[str, Any]], None]) -> None:
    document = json.loads(storage.read(f"{STEP}/manifest.json"))
    change(document)
    document["checksum"] = ""
    document["checksum"] = sha256_hex(msgspec.json.encode(document))
    storage.put(f"{STEP}/manifest.json", msgspec.json.encode(document))


def flip(data: bytes) -> bytes:
    at = len(data) // 2
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (lambda s: rewrite(s, "model.safetensors", lambda data: data[:-1]), "model.safetensors does not match"),
        (lambda s: rewrite(s, "model.safetensors", flip), "model.safetensors does not match"),
        (lambda s: rewrite(s, "state.json", flip), "state.json does not match"),
        (lambda s: s.remove(f"{STEP}/manifest.json"), "manifest.json is missing"),
        (lambda s: s.remove(f"{STEP}/shadow.safetensors"), "shadow.safetensors is missing"),
        (lambda s: s.put(f"{STEP}/manifest.json", b'{"step": '), "manifest.json: "),
        (lambda s: s.put(f"{STEP}/manifest.json", b'{"step": "x"}'), "manifest.json: "),
        (lambda s: s.put(f"{STEP}/manifest.json", b""), "manifest.json: "),
        (lambda s: manifest_with(s, lambda m: m.update(step=3)), "own checksum"),
        # One flipped bit makes another format, or a field of another name: no other software's manifest.
        (lambda s: rewrite(s, "manifest.json", lambda data: data.replace(b'"format": 2', b'"format": 3')), "checksum"),
        (lambda s: rewrite(s, "manifest.json", lambda data: data.replace(b'"run"', b'"rul"')), "manifest.json: "),
        (lambda s: rewrite(s, "manifest.json", lambda data: data.replace(b": 20", b": 21")), "own checksum"),
        (lambda s: manifest_with(s, lambda m: m["files"].pop("state.json")), "names no state.json"),
        (lambda s: s.remove(STEP) or s.put(f"{STEP}/model.safetensors", b"half"), "manifest.json is missing"),
    ],
)
def test_a_damaged_checkpoint_is_skipped_with_its_reason(
    storage: Storage, damage: Callable[[Storage], None], why: str
) -> None:
    store = CheckpointStore(storage, keep=3)
    store.save(checkpoint(1))
    store.save(checkpoint(2))
    damage(storage)
    with capture_logs() as logs:
        assert_same(store.load_newest(), checkpoint(1))
    (warning,) = logs
    assert warning["log_level"] == "warning" and warning["step"] == 2
    assert why in warning["why"]


def test_a_start_from_a_step_that_there_is_not_says_which_and_where_to_look(storage: Storage) -> None:
    with pytest.raises(CheckpointError, match=r"start-from: step-999: manifest.json is missing; `gpl models checkpoi"):
        StartFrom.parse("step-999").checkpoint(CheckpointStore(storage, keep=3))


@pytest.mark.parametrize("change", [{"format": 99}, {"a_new_field": [1]}])
def test_a_checkpoint_of_other_software_is_not_passed_over(storage: Storage, change: dict[str, Any]) -> None:
    store = CheckpointStore(storage, keep=3)
    store.save(checkpoint(1))
    store.save(checkpoint(2))
    manifest_with(storage, lambda m: m.update(change))
    for asked in (store.load_newest, lambda: store.load(2)):
        with pytest.raises(OtherSoftwareError, match=r"step-00000002: made by other software: .*--start-from step-N"):
            asked()
    assert_same(store.load(1), checkpoint(1))
    # Behind a newer one it is in nobody's way.
    store.save(checkpoint(3))
    assert_same(store.load_newest(), checkpoint(3))


@pytest.mark.parametrize("file", ["manifest.json", "model.safetensors"])
def test_what_cannot_be_read_is_neither_passed_over_nor_let_go_of(tmp_path: Path, file: str) -> None:
    def store(minute: int) -> CheckpointStore:
        return CheckpointStore(tmp_path, keep=1, keep_hourly=2, clock=lambda: 1_700_000_000.0 + 60 * minute)

    store(0).save(checkpoint(2))
    path = tmp_path / STEP / file
    path.rename(path.with_suffix(".away"))
    path.symlink_to(path)  # whoever runs this: too many levels of symbolic links
    with pytest.raises(OSError, match="symbolic links"):
        store(1).load_newest()
    with pytest.raises(CheckpointError, match=r"symbolic links.*--start-from step-N"):
        StartFrom.parse("latest").checkpoint(store(1))
    with pytest.raises(CheckpointError, match=r"symbolic links.*it may pass$"):
        StartFrom.parse("step-2").checkpoint(store(1))
    store(1).save(checkpoint(3))
    store(2).save(checkpoint(4))
    path.unlink()
    path.with_suffix(".away").rename(path)
    assert_same(store(3).load(2), checkpoint(2))
    assert store(3).steps() == ([2, 3, 4] if file == "manifest.json" else [2, 4])


def test_a_kill_while_going_back_leaves_the_newest_or_none_after_it(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    remove = type(storage).remove
    for goes_back in (lambda store: store.discard_after(1), lambda store: store.save(checkpoint(1))):
        store = CheckpointStore(storage, keep=9)
        for step in (1, 2, 3, 4):
            store.save(checkpoint(step))
        for allowed in range(4):
            removed: list[str] = []

            def dying(self: Any, name: str, last: str, allowed: int = allowed, removed: list[str] = removed) -> None:
                if len(removed) == allowed:
                    raise Dies
                removed.append(name)
                remove(self, name, last)

            with monkeypatch.context() as patch, contextlib.suppress(Dies):
                patch.setattr(type(storage), "remove", dying)
                goes_back(store)
            newest = store.load_newest()
            assert newest is not None and newest.step == (1 if len(store.steps()) == 1 else 4)


@given(st.data())
@hypothesis_settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_flipped_bit_and_no_cut_goes_unnoticed(tmp_path: Path, data: st.DataObject) -> None:
    storage = open_storage(tmp_path)
    store = CheckpointStore(storage, keep=3)
    store.save(checkpoint(1))
    store.save(checkpoint(2))
    name = f"{STEP}/{data.draw(st.sampled_from(sorted(storage.names(STEP))))}"
    whole = storage.read(name)
    if data.draw(st.booleans()):
        bit = data.draw(st.integers(0, 8 * len(whole) - 1))
        harmed = bytearray(whole)
        harmed[bit // 8] ^= 1 << bit % 8
    else:
        harmed = whole[: data.draw(st.integers(0, len(whole) - 1))]
    storage.put(name, bytes(harmed))
    found = store.load_newest()
    assert found is not None
    # A manifest in which only white space changed still says the same.
    assert_same(found, checkpoint(found.step))
    assert found.step == 1 or name.endswith("manifest.json")


def test_damaged_checkpoints_do_not_crowd_out_the_good_ones_written_after_them(storage: Storage) -> None:
    store = CheckpointStore(storage, keep=1)
    store.save(checkpoint(5))
    storage.put("step-00000005/model.safetensors", b"half")
    store.save(checkpoint(4))
    assert_same(store.load_newest(), checkpoint(4))
    store.save(checkpoint(5))  # the same step again, over the damaged one's name
    assert_same(store.load_newest(), checkpoint(5))


def test_foreign_names_are_left_alone(storage: Storage) -> None:
    storage.put("step-latest/x", b"")
    storage.put("notes.txt", b"mine")
    store = CheckpointStore(storage, keep=1)
    store.save(checkpoint(1))
    store.save(checkpoint(2))
    assert storage.names() == ["notes.txt", "step-00000002", "step-latest"]


class Dies(Exception):
    pass


def test_a_writer_that_dies_between_objects_leaves_nothing_that_counts(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = open_storage(bucket)
    CheckpointStore(storage, keep=2).save(checkpoint(1))
    for allowed in range(len(storage.names("step-00000001"))):
        written, put = [], storage.put

        def dying(name: str, data: bytes, allowed: int = allowed, written: list[str] = written, put: Any = put) -> None:
            if len(written) == allowed:
                raise Dies
            written.append(name)
            put(name, data)

        with monkeypatch.context() as patch, pytest.raises(Dies):
            patch.setattr(storage, "put", dying)
            CheckpointStore(storage, keep=2).save(checkpoint(2))
        assert_same(CheckpointStore(storage, keep=2).load_newest(), checkpoint(1))
    CheckpointStore(storage, keep=2).save(checkpoint(2))
    assert_same(CheckpointStore(storage, keep=2).load_newest(), checkpoint(2))


WRITE_FOR_EVER = """
import os
import torch
from streams.trainer.checkpoint import Checkpoint, CheckpointStore
os.environ.update(environment)  # a fork server has that of its start
store = CheckpointStore(location, keep=2)
while True:
    tensors = {"model": {"w": torch.full((200, 200), float(step))}}
    store.save(Checkpoint(step, 1, {0: step}, {}, tensors, b'{"step": %d}' % step, {}, {}, step))
    step += 1
"""


def start_writer(location: str, step: int) -> BaseProcess:
    # A fork server, for a plain fork of this process would inherit its threads' locks.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["streams.trainer.checkpoint"])
    given = {"location": location, "step": step, "environment": dict(os.environ)}
    writer = context.Process(target=exec, args=(WRITE_FOR_EVER, given))
    writer.start()
    return writer


def assert_whole(found: Checkpoint) -> None:
    assert found.positions == {0: found.step} and found.state == b'{"step": %d}' % found.step
    assert torch.equal(found.tensors["model"]["w"], torch.full((200, 200), float(found.step)))


def newest(directory: Path) -> int:
    return max((int(path.name[5:]) for path in directory.glob("step-*")), default=0)


def test_kill_while_writing_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    start = 1
    for more in (1, 3, 8):
        writer = start_writer(str(tmp_path), start)
        while newest(tmp_path) < start + more:
            assert writer.is_alive()
            time.sleep(0.001)
        writer.kill()
        writer.join()
        open_storage(tmp_path).recover()
        found = CheckpointStore(tmp_path, keep=2).load_newest()
        assert found is not None and found.step == newest(tmp_path) >= start + more
        assert_whole(found)
        assert not list(tmp_path.glob(".aside-*"))
        start = found.step + 1


@pytest.mark.parametrize("renames", [0, 1, 2])
def test_a_kill_while_replacing_leaves_one_of_the_two(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, renames: int
) -> None:
    storage = open_storage(tmp_path)
    storage.write("step-1", {"a": b"old"}, last="a")
    rename, done = Path.rename, []

    def killed(self: Path, target: Path) -> Path:
        if len(done) == renames:
            raise KeyboardInterrupt
        done.append(target)
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed)
        with contextlib.nullcontext() if renames == 2 else pytest.raises(KeyboardInterrupt):
            storage.write("step-1", {"a": b"new", "b": b""}, last="a")
    storage.recover()
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]
    assert storage.read("step-1/a") == (b"new" if renames == 2 else b"old")


def test_kill_while_writing_objects_leaves_the_newest_that_has_its_manifest(bucket: str) -> None:
    storage, start = open_storage(bucket), 1
    for objects in (2, 9, 11):
        writer = start_writer(bucket, start)
        seen: set[str] = set()
        while len(seen) < objects:
            assert writer.is_alive()
            for name in storage.names():
                if int(name[5:]) >= start:
                    seen.update(f"{name}/{file}" for file in storage.names(name))
        writer.kill()
        writer.join()
        whole = [name for name in storage.names() if "manifest.json" in storage.names(name)]
        found = CheckpointStore(bucket, keep=2).load_newest()
        assert (found and f"step-{found.step:08d}") == (whole[-1] if whole else None)
        if found is not None:
            assert_whole(found)
            start = found.step + 1  # over the half of that name, as a trainer that goes on from there
