"""Which part of vLLM a process's time goes to, sampled from outside by py-spy.

Knows py-spy's collapsed stacks and which function of vLLM 0.32 belongs to which part; starts nothing else.
"""

import math
import shutil
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path

_RATE_HZ = 200

# The first part one of whose names is in a stack gets the sample; what waits is not sampled at all.
_PARTS = {
    "waiting for the GPU": ("get_output (vllm/v1/worker", "synchronize (torch"),
    "packing outputs": ("process_output_sockets",),
    "reading requests": ("process_input_sockets",),
    "taking tokens in": ("update_from_output (vllm/v1/core", "update_from_output (flashrl_rollout"),
    "scheduling": ("schedule (vllm/v1/core",),
    "preparing the batch": ("prepare_inputs (", "add_requests (", "update_requests (", "_update_states ("),
    "sampling": ("sample_tokens (", "sample (vllm/v1"),
    "running the model": ("execute_model (",),
    "unpacking outputs": ("decode (vllm/v1/serial_utils",),
    "statistics": ("record (vllm/v1/metrics", "update_from_output (vllm/v1/metrics"),
    "taking outputs in": ("process_outputs (",),
    "sending requests": ("add_request (",),
    "answers": ("flashrl_rollout/completions", "flashrl_rollout/generation", "serialize_response"),
    "HTTP": ("uvicorn/", "starlette/", "fastapi/"),
}
_OTHER = "other"


def profiled(
    pids: Mapping[str, int], expected_s: float, folder: Path, work: Callable[[], object]
) -> dict[str, dict[str, float]] | None:
    """Cores that each part of each process uses while `work` runs, largest first; None without py-spy."""
    program = shutil.which("py-spy")
    if program is None:
        return None
    files = {name: folder / f"{name.replace(' ', '-')}.stacks" for name in pids}
    seconds = max(1, math.floor(expected_s))
    command = [
        program,
        "record",
        "--duration",
        str(seconds),
        "--rate",
        str(_RATE_HZ),
        "--format",
        "raw",
        "--nonblocking",
    ]
    spies = [
        subprocess.Popen(
            [*command, "--pid", str(pid), "--output", str(files[name])],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for name, pid in pids.items()
    ]
    work()
    for spy in spies:
        spy.wait(60)
    return {name: parts_of(file.read_text(), seconds) for name, file in files.items() if file.exists()}


def parts_of(stacks: str, seconds: float) -> dict[str, float]:
    """Cores by part, of lines `outer (file:line);inner (file:line) count`."""
    counts: dict[str, int] = {}
    for line in stacks.splitlines():
        stack, _, count = line.rpartition(" ")
        part = next((part for part, names in _PARTS.items() if any(name in stack for name in names)), _OTHER)
        counts[part] = counts.get(part, 0) + int(count)
    total = seconds * _RATE_HZ
    return {part: count / total for part, count in sorted(counts.items(), key=lambda item: -item[1])}
