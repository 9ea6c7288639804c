"""Checkpoints come back exactly, damaged ones are skipped, and a kill while writing loses at most the newest."""

import json
import multiprocessing
import shutil
from pathlib import Path

import pytest
import torch
from structlog.testing import capture_logs

from streams.trainer.checkpoint import Checkpoint, CheckpointStore


def checkpoint(step: int) -> Checkpoint:
    generator = torch.Generator().manual_seed(step)
    return Checkpoint(
        step=step,
        positions={0: 10 * step, 3: 7},
        tensors={
            "model": {"w": torch.randn(5, 3, generator=generator), "moments": torch.tensor([1.0, 2.0]).double()},
            "shadow": {"w": torch.randn(5, 3, generator=generator)},
        },
        state=json.dumps({"step": step}).encode(),
        versions={"encoder": "e1", "quantiser": "q1"},
        metrics={"auc": 0.1 + step},
        newest_event_ts=1_700_000_000_000 + step,
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
    for field in ("step", "positions", "state", "versions", "metrics", "newest_event_ts"):
        assert getattr(found, field) == getattr(expected, field), field


def test_round_trip_is_exact(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "deep" / "checkpoints", keep=3)
    assert store.load_newest() is None
    path = store.save(checkpoint(12))
    assert path.name == "step-00000012"
    assert_same(CheckpointStore(path.parent, keep=3).load_newest(), checkpoint(12))


def test_retention_keeps_the_newest(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    for step in (1, 2, 30, 4_000):
        store.save(checkpoint(step))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000030", "step-00004000"]


def truncate(path: Path) -> None:
    weights = path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])


def flip(path: Path) -> None:
    state = bytearray((path / "state.json").read_bytes())
    state[3] ^= 1
    (path / "state.json").write_bytes(state)


def other_format(path: Path) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**manifest, "format": 99}))


def no_state(path: Path) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["files"]["state.json"]
    (path / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (truncate, "model.safetensors does not match"),
        (flip, "state.json does not match"),
        (lambda path: (path / "manifest.json").unlink(), "manifest.json is missing"),
        (lambda path: (path / "shadow.safetensors").unlink(), "shadow.safetensors is missing"),
        (lambda path: (path / "manifest.json").write_text('{"step": '), "manifest.json: "),
        (lambda path: (path / "manifest.json").write_text('{"step": "x"}'), "manifest.json: "),
        (other_format, "format: 99"),
        (no_state, "names no state.json"),
        (lambda path: shutil.rmtree(path) or path.mkdir(), "manifest.json is missing"),
    ],
)
def test_a_damaged_checkpoint_is_skipped_with_its_reason(tmp_path: Path, damage, why: str) -> None:
    store = CheckpointStore(tmp_path, keep=3)
    store.save(checkpoint(1))
    damage(store.save(checkpoint(2)))
    with capture_logs() as logs:
        assert_same(store.load_newest(), checkpoint(1))
    (warning,) = logs
    assert warning["log_level"] == "warning" and warning["step"] == 2
    assert why in warning["why"]


def test_damaged_checkpoints_do_not_crowd_out_the_good_ones_written_after_them(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=1)
    store.save(checkpoint(5))
    truncate(tmp_path / "step-00000005")
    store.save(checkpoint(4))
    assert_same(store.load_newest(), checkpoint(4))
    store.save(checkpoint(5))  # the same step again, over the damaged one's name
    assert_same(store.load_newest(), checkpoint(5))


def test_foreign_names_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "step-latest").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    store = CheckpointStore(tmp_path, keep=1)
    store.save(checkpoint(1))
    store.save(checkpoint(2))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt", "step-00000002", "step-latest"]


WRITE_FOR_EVER = """
import torch
from pathlib import Path
from streams.trainer.checkpoint import Checkpoint, CheckpointStore
store = CheckpointStore(Path(directory), keep=2)
while True:
    tensors = {"model": {"w": torch.full((200, 200), float(step))}}
    store.save(Checkpoint(step, {0: step}, tensors, b'{"step": %d}' % step, {}, {}, step))
    step += 1
"""


def newest(directory: Path) -> int:
    return max((int(path.name[5:]) for path in directory.glob("step-*")), default=0)


def test_kill_while_writing_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    # A fork server, for a plain fork of this process would inherit its threads' locks.
    context = multiprocessing.get_context("forkserver")
    start = 1
    for more in (1, 2, 3, 5, 8):
        writer = context.Process(target=exec, args=(WRITE_FOR_EVER, {"directory": str(tmp_path), "step": start}))
        writer.start()
        while newest(tmp_path) < start + more:
            assert writer.is_alive()
        writer.kill()
        writer.join()
        found = CheckpointStore(tmp_path, keep=2).load_newest()
        assert found is not None and found.step == newest(tmp_path) >= start + more
        assert found.positions == {0: found.step} and found.state == b'{"step": %d}' % found.step
        assert torch.equal(found.tensors["model"]["w"], torch.full((200, 200), float(found.step)))
        assert not list(tmp_path.glob(".aside-*"))
        start = found.step + 1
