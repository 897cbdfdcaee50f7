"""Seconds and peak memory of a piece of work on this rank's device. Knows nothing of the work."""

import resource
import time

import torch


class DeviceMeter:
    """Starts when it is made."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        self._start = time.monotonic()

    def seconds(self) -> float:
        """Since the start, the device's queue worked off."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.monotonic() - self._start

    def peak_memory_bytes(self) -> int:
        """CUDA: the most that tensors held since the start. CPU: the most that the process has ever held."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10  # KiB on Linux
