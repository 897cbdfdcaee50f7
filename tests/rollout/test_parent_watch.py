"""A spawned process ends with its parent, even when the parent is killed."""

import os
import signal
import subprocess
import sys
from pathlib import Path

PROGRAM = """
import multiprocessing, os, sys, time
from flashrl_rollout.parent_watch import watch_parent

def child(watch):
    if watch:
        watch_parent()
        watch_parent()
    print(os.getpid(), flush=True)
    time.sleep(60)

if __name__ == "__main__":
    process = multiprocessing.get_context("spawn").Process(target=child, args=(sys.argv[1] == "watch",))
    process.start()
    process.join()
"""


def _orphan(tmp_path: Path, mode: str) -> tuple[subprocess.Popen[str], int]:
    """A program that was killed, its output still held by the child that it left behind, and the child's id."""
    script = tmp_path / "parent.py"
    script.write_text(PROGRAM)
    parent = subprocess.Popen([sys.executable, str(script), mode], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    parent.send_signal(signal.SIGKILL)
    parent.wait(10)
    return parent, child


def test_a_watched_parent_takes_its_child_with_it(tmp_path: Path) -> None:
    parent, _ = _orphan(tmp_path, "watch")
    parent.communicate(timeout=20)  # returns once no process holds the pipe


def test_an_unwatched_one_leaves_it_behind(tmp_path: Path) -> None:
    _, child = _orphan(tmp_path, "ignore")
    os.kill(child, signal.SIGKILL)  # ProcessLookupError, were it not running
