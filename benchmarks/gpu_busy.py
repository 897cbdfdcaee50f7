"""The share of time in which a GPU had a kernel to run, as the driver counts it.

Knows NVML; knows nothing of what runs.
"""

import statistics
import threading
from types import TracebackType
from typing import Any

_EVERY_S = 0.1


class GpuBusy:
    """`with GpuBusy() as gpu: ...`, then `gpu.share`, from 0 to 1; None where there is no GPU to ask."""

    def __init__(self) -> None:
        self._nvml, self._handle = _first_gpu()
        self._shares: list[float] = []
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "GpuBusy":
        if self._nvml is not None:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()
        if self._nvml is not None:
            self._thread.join()

    @property
    def share(self) -> float | None:
        """The mean over the block."""
        return statistics.fmean(self._shares) if self._shares else None

    def _watch(self) -> None:
        while not self._end.wait(_EVERY_S):
            self._shares.append(self._nvml.nvmlDeviceGetUtilizationRates(self._handle).gpu / 100)


def _first_gpu() -> tuple[Any, Any]:
    try:
        from vllm.third_party import pynvml
    except ImportError:
        return None, None
    try:
        pynvml.nvmlInit()
        return pynvml, pynvml.nvmlDeviceGetHandleByIndex(0)
    except pynvml.NVMLError:
        return None, None
