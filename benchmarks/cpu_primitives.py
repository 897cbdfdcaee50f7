"""What does oneDNN keep for every batch size that an INT8 layer on the CPU has seen?

    OMP_NUM_THREADS=1 python -m benchmarks.cpu_primitives
    OMP_NUM_THREADS=1 ONEDNN_PRIMITIVE_CACHE_CAPACITY=64 python -m benchmarks.cpu_primitives

Two layers of the tiny model see batches of 1, 2, 3 ... rows. Knows the service's kernel; knows nothing of engines.
"""

import os
import re
import time
from pathlib import Path

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import torch
from vllm.v1.worker import cpu_worker

from flashrl_rollout import heap
from flashrl_rollout.kernels import CpuInt8
from flashrl_wire.quantize import quantize_rows

assert cpu_worker  # importing it readies PyTorch for a machine without an accelerator
SHAPES = ((512, 256), (256, 256))
LARGEST, STEP = 1200, 100


class Layer:
    """One layer with random weights."""

    def __init__(self, rows: int, columns: int) -> None:
        self._columns = columns
        self._codes, self._scales = quantize_rows(torch.randn(rows, columns).bfloat16(), "int8_rows")
        self._kernel = CpuInt8()
        self._kernel.refresh(self._codes, self._scales)

    def run(self, batch: int) -> None:
        """One product."""
        self._kernel(torch.zeros(batch, self._columns, dtype=torch.bfloat16), self._codes, self._scales, None)


def anonymous_mib() -> float:
    """Memory that no file backs, once freed pages have been given back."""
    heap.trim()
    found = re.search(r"^Anonymous: +(\d+) kB$", Path("/proc/self/smaps_rollup").read_text(), re.MULTILINE)
    assert found is not None
    return int(found.group(1)) / 1024


def main() -> None:
    """A line for every hundred batch sizes."""
    layers = [Layer(*shape) for shape in SHAPES]
    start = anonymous_mib()
    print(f"{'sizes seen':>10}{'MiB more':>10}{'CPU ms a new size':>20}{'the same again':>16}", flush=True)
    for first in range(1, LARGEST, STEP):
        taken = []
        for _ in range(2):
            began = time.process_time()
            for batch in range(first, first + STEP):
                for layer in layers:
                    layer.run(batch)
            taken.append((time.process_time() - began) * 1e3 / STEP)
        print(f"{first + STEP - 1:>10}{anonymous_mib() - start:>10.1f}{taken[0]:>20.2f}{taken[1]:>16.2f}", flush=True)


if __name__ == "__main__":
    main()
