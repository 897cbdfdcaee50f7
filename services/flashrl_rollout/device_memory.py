"""Memory of the GPUs that an engine uses, as the driver counts it: no CUDA context in the process that asks.

Knows NVML; knows nothing of what the memory is used for.
"""

from typing import Any

from vllm.platforms import current_platform
from vllm.utils.import_utils import import_pynvml


class DeviceMemory:
    """Of this process's first `devices` GPUs; of none on a CPU, or where the driver does not tell."""

    def __init__(self, devices: int) -> None:
        self._handles: list[Any] = []
        if not current_platform.is_cuda():
            return
        self._nvml = import_pynvml()
        try:
            self._nvml.nvmlInit()
            numbers = [current_platform.device_id_to_physical_device_id(device) for device in range(devices)]
            self._handles = [self._nvml.nvmlDeviceGetHandleByIndex(number) for number in numbers]
        except self._nvml.NVMLError:
            self._handles = []

    def gauges(self) -> dict[str, float]:
        """Used and total bytes of all devices together, whoever uses them."""
        if not self._handles:
            return {}
        try:
            found = [self._nvml.nvmlDeviceGetMemoryInfo(handle) for handle in self._handles]
        except self._nvml.NVMLError:
            return {}
        used, total = sum(memory.used for memory in found), sum(memory.total for memory in found)
        return {"device_memory_used_bytes": float(used), "device_memory_total_bytes": float(total)}
