"""Processes that shall not outlive the one that started them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time


def end_with_parent(number: int = signal.SIGKILL) -> None:
    """Send this process a signal when its parent is gone without a word, or is gone already. In a process that
    ``multiprocessing`` has not started, do nothing."""
    parent = multiprocessing.parent_process()
    if parent is not None:

        def watch() -> None:
            parent.join()
            os.kill(os.getpid(), number)

        threading.Thread(target=watch, name="parent", daemon=True).start()


def end_when_orphaned() -> None:
    """Kill this process when its parent, another program, is gone; looks once a second."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="parent", daemon=True).start()
