"""Ends a spawned process when the process that spawned it is gone, however that one died.

Without it an engine outlives a service that was killed, and keeps its device memory. Knows nothing of engines.
"""

import multiprocessing
import os
import threading

WATCH_PARENT = "FLASHRL_WATCH_PARENT"
"""Environment variable that asks the processes spawned from here on to watch their parent."""

_THREAD = "flashrl-parent-watch"


def watch_parent() -> None:
    """Start one thread that waits for the parent's end; nothing in a process that was not spawned."""
    is_watching = any(thread.name == _THREAD for thread in threading.enumerate())
    if multiprocessing.parent_process() is not None and not is_watching:
        threading.Thread(target=_wait, name=_THREAD, daemon=True).start()


def _wait() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()  # a pipe that the parent holds: closed by the kernel even after SIGKILL
    os._exit(1)  # no clean-up may hang on peers that died with the parent
