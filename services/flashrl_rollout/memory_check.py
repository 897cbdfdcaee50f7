"""Whether a model can fit the memory it is given, judged by its files before a minute is spent on loading it.

Knows sizes; knows nothing of vLLM, which finds out about caches and graphs later.
"""

import math
from pathlib import Path

from flashrl_rollout.checkpoint_reader import Checkpoint
from flashrl_rollout.engine_settings import EngineSettings

_GIB = 1 << 30
_LEAST_ITEM_BYTES = {"int8": 1, "fp8": 1, "none": 2}


def least_weight_bytes(folder: Path, settings: EngineSettings) -> int:
    """What the weights of one engine take on each device at the very least: as if every matrix were quantized."""
    elements = sum(math.prod(shape) for shape in Checkpoint(folder).shapes.values())
    return elements * _LEAST_ITEM_BYTES[settings.quantization] // settings.tensor_parallel_size


def check_memory(folder: Path, settings: EngineSettings, device_bytes: int) -> None:
    """ValueError where the weights alone are more than an engine's share; `settings` are those of one engine."""
    needed, share = least_weight_bytes(folder, settings), int(settings.gpu_memory_utilization * device_bytes)
    setting = "gpu_memory_utilization"
    if settings.kv_cache_gib:  # vLLM then looks at no share: weights and cache may take the whole device
        setting, share = "kv_cache_gib", device_bytes // settings.engines - int(settings.kv_cache_gib * _GIB)
    if needed >= share:
        engines = f" ({settings.engines} engines share the device)" if settings.engines > 1 else ""
        raise ValueError(
            f"{setting}: the weights need at least {needed / _GIB:.1f} GiB, of {device_bytes / _GIB:.1f} "
            f"GiB an engine may use {share / _GIB:.1f}{engines}"
        )
