"""Resident memory of this process and of those it has started: the engine's.

Knows Linux' /proc; knows nothing of what the processes do.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_PROC = Path("/proc")


@dataclass(frozen=True)
class ProcessMemory:
    """Bytes; pages that processes share count in each of them."""

    service_bytes: int
    engine_bytes: int


def process_memory() -> ProcessMemory:
    """As of now."""
    me = os.getpid()
    return ProcessMemory(_resident(me), sum(_resident(pid) for pid in _descendants(me)))


def _resident(pid: int) -> int:
    words = _read(_PROC / str(pid) / "statm").split()
    return int(words[1]) * _PAGE_BYTES if words else 0


def _descendants(pid: int) -> Iterator[int]:
    for task in _PROC.glob(f"{pid}/task/*/children"):  # a child belongs to the thread that started it
        for child in map(int, _read(task).split()):
            yield child
            yield from _descendants(child)


def _read(file: Path) -> str:
    """Empty for a process that has ended meanwhile."""
    try:
        return file.read_text()
    except OSError:
        return ""
