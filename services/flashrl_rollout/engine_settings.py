"""What a vLLM engine is started with, and the environment its processes inherit.

Knows values and names of variables; imports no vLLM.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from flashrl_rollout.layer_selection import LayerSelection, QuantizeLayers
from flashrl_rollout.logs import ENGINE_CONFIG, LogFormat
from flashrl_rollout.parent_watch import WATCH_PARENT
from flashrl_wire.messages import Quantization

_CPU_CACHE_GIB = 1.0  # vLLM's own default there is a share of the machine's memory


@dataclass(frozen=True)
class EngineSettings:
    """`EngineSettings("Qwen/Qwen2.5-0.5B-Instruct", quantization="int8", max_model_len=1536)`; 0 means vLLM's default.

    `model` is a folder or a name on the model hub. `threads` (CPU) is the number of OpenMP threads of each worker,
    unbound, so that a trainer can share the cores; 0 lets vLLM bind one to each core but one.
    """

    model: str
    quantization: Quantization = "none"
    quantize_layers: QuantizeLayers = "auto"
    keep_bf16: tuple[str, ...] = ()
    device: Literal["auto", "cpu", "cuda"] = "auto"
    engines: int = 1
    tensor_parallel_size: int = 1
    max_model_len: int = 0
    max_num_seqs: int = 256
    gpu_memory_utilization: float = 0.6
    kv_cache_gib: float = 0.0
    update_scratch_gib: float = 0.0
    kv_cache_dtype: Literal["auto", "fp8"] = "auto"
    enforce_eager: bool = False
    output_interval: int = 32
    seed: int = 0
    threads: int = 0
    start_timeout_s: float = 1800.0
    request_timeout_s: float = 600.0
    log_format: LogFormat = "text"

    def layer_selection(self) -> LayerSelection:
        """Which layers are quantized."""
        return LayerSelection(keep_bf16=self.keep_bf16, quantize_layers=self.quantize_layers)

    def kv_cache_bytes(self, is_cpu: bool) -> int | None:
        """Bytes for keys and values; None (CUDA): what vLLM finds to be left of `gpu_memory_utilization`."""
        gib = self.kv_cache_gib or (_CPU_CACHE_GIB / self.engines if is_cpu else 0.0)
        return int(gib * (1 << 30)) or None

    def environment(self) -> dict[str, str]:
        """Variables for the engine's processes; logging and usage statistics can be set from outside."""
        variables = {
            "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # a forked worker inherits locks that the parent's threads hold
            "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "WARNING"),
            "VLLM_NO_USAGE_STATS": os.environ.get("VLLM_NO_USAGE_STATS", "1"),
            "VLLM_ENGINE_READY_TIMEOUT_S": str(int(self.start_timeout_s)),
            WATCH_PARENT: "1",
            # it would be compiled by the first request with top_p or top_k that wants no log-probs
            "VLLM_USE_FLASHINFER_SAMPLER": os.environ.get("VLLM_USE_FLASHINFER_SAMPLER", "0"),
        }
        if self.log_format == "json" and "VLLM_LOGGING_CONFIG_PATH" not in os.environ:
            variables["VLLM_LOGGING_CONFIG_PATH"] = str(ENGINE_CONFIG)
        if "VLLM_PLUGINS" in os.environ:
            variables["VLLM_PLUGINS"] = os.environ["VLLM_PLUGINS"] + ",flashrl"
        if self.threads:
            variables |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(self.threads)}
        return variables


@contextmanager
def environment(variables: Mapping[str, str]) -> Iterator[None]:
    """The process's environment with `variables`, for what is spawned inside the block."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
