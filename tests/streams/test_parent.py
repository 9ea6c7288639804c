"""kill -9 of a parent: none of its children outlives it."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from gpl.catalogue import Catalogue, ItemContent
from gpl.fit import Event, FitOptions, fit
from streams.history.partition import save_catalogue


@contextmanager
def parent(script: str, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """A Python process, to be killed inside: at the end all that it has started must be gone, too."""
    command = [sys.executable, "-c", script, *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    try:
        yield process
        process.kill()
        process.communicate(timeout=240)  # whose end the last of those that write to it makes
    finally:
        process.kill()
        process.stdout.close() if process.stdout else None


# Killed before the rank has imported anything; it would wait for the other one for half an hour.
RANK = """\
import multiprocessing, os, sys
from streams.settings import Settings
from streams.trainer import ranks

multiprocessing.get_context("spawn").Process(
    target=ranks._rank, args=(0, 2, sys.argv[1], Settings(), "latest", None)
).start()
print("started", flush=True)
os.kill(os.getpid(), 9)
"""


def test_a_rank_ends_though_its_parent_was_gone_before_it_began(tmp_path: Path) -> None:
    with parent(RANK, (tmp_path / "meet").as_uri()) as process:
        assert process.stdout is not None and process.stdout.readline() == b"started\n"


# As torchrun starts its ranks: programs of their own. Nobody but they themselves could end them with it.
AGENT = """\
import os, subprocess, sys
rank = '''
import threading
import torch.distributed
from streams.trainer.group import Processes

def waits_for_the_others(*_, **__):
    print("rank", flush=True)
    threading.Event().wait()

torch.distributed.init_process_group = waits_for_the_others
Processes.from_environment()
'''
subprocess.run([sys.executable, "-c", rank], env={**os.environ, "WORLD_SIZE": "2", "RANK": "0"})
"""


def test_a_rank_ends_with_the_torchrun_that_started_it() -> None:
    with parent(AGENT) as process:
        assert process.stdout is not None and process.stdout.readline() == b"rank\n"


BACKFILL = """\
import sys
from pathlib import Path
from streams.history import backfill
from streams.history.partition import Task
from streams.settings import Settings

data, settings = Path(sys.argv[1]), Settings(artefacts=Path(sys.argv[2]))
backfill._on_this_machine([Task(data, data / "catalogue.npz", data, n, 10**13, settings) for n in range(8)], 2)
"""


def test_workers_of_a_killed_backfill_end(tmp_path: Path) -> None:
    vectors = np.random.default_rng(3).standard_normal((12, 4))
    items = [ItemContent(f"i{n}", "", row.tolist()) for n, row in enumerate(vectors)]
    past = [Event(f"u{n % 5}", f"i{n % 12}", n, True) for n in range(60)]
    artefacts = tmp_path / "artefacts"
    fit(items, past, None, FitOptions(generator="history", levels=1, codebook_size=4), seed=0).save(artefacts)
    save_catalogue(Catalogue(4, 1), tmp_path / "catalogue.npz")
    os.mkfifo(tmp_path / "recalls.jsonl")
    opened: list[int] = []
    # Opened when a worker reads it, and then never at its end.
    feed = threading.Thread(target=lambda: opened.append(os.open(tmp_path / "recalls.jsonl", os.O_WRONLY)), daemon=True)
    feed.start()
    try:
        with parent(BACKFILL, str(tmp_path), str(artefacts)):
            feed.join(timeout=240)
            assert opened, "no worker has begun"
    finally:
        for descriptor in opened:
            os.close(descriptor)
