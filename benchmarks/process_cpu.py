"""CPU time of a service's processes and threads between two moments, from /proc.

Knows process trees; knows nothing of what the processes do.
"""

import os
from dataclasses import dataclass
from pathlib import Path

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_ENGINE = "EngineCore"
_BUSIEST = 8


@dataclass(frozen=True)
class Usage:
    """Cores in use, on average."""

    pids: dict[str, int]  # the service and its engines, by what they are
    front_cores: float
    engine_cores: list[float]
    busiest_threads: dict[str, float]


@dataclass(frozen=True)
class CpuTimes:
    """Seconds of CPU of every thread by (pid, thread id), at one moment."""

    root: int
    names: dict[int, str]
    threads: dict[tuple[int, int], float]

    def since(self, before: "CpuTimes", seconds: float) -> Usage:
        """What was used in between, `seconds` of wall time."""
        used = {thread: (now - before.threads.get(thread, 0.0)) / seconds for thread, now in self.threads.items()}
        engines = sorted(pid for pid, name in self.names.items() if _ENGINE in name and pid != self.root)
        labels = {self.root: "service"} | {pid: f"engine {index}" for index, pid in enumerate(engines)}
        busiest = sorted(used.items(), key=lambda item: -item[1])[:_BUSIEST]
        return Usage(
            pids={label: pid for pid, label in labels.items()},
            front_cores=_of(used, self.root),
            engine_cores=[_of(used, pid) for pid in engines],
            busiest_threads={
                f"{labels.get(pid, self.names[pid])} {'main' if pid == thread else thread}": round(share, 3)
                for (pid, thread), share in busiest
            },
        )


def _of(used: dict[tuple[int, int], float], pid: int) -> float:
    return sum(share for (owner, _), share in used.items() if owner == pid)


def cpu_by_process(root: int) -> CpuTimes:
    """Of a process and everything that it has started."""
    pids = [root, *_descendants(root)]
    names = {pid: _read(pid, "cmdline").replace("\0", " ").strip() for pid in pids}
    threads = {(pid, int(task.name)): _seconds(task) for pid in pids for task in Path(f"/proc/{pid}/task").iterdir()}
    return CpuTimes(root, names, threads)


def _descendants(pid: int) -> list[int]:
    children = [int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in _children(task)]
    return [found for child in children for found in (child, *_descendants(child))]


def _children(task: Path) -> list[str]:
    return (task / "children").read_text().split()


def _read(pid: int, name: str) -> str:
    return (Path(f"/proc/{pid}") / name).read_text()


def _seconds(task: Path) -> float:
    fields = (task / "stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS_PER_S
