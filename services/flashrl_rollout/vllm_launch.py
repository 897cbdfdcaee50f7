"""Settings -> a running AsyncLLM, or one line about why there can be none.

Knows vLLM's arguments and what is known to fail with them; knows nothing of what the engine is used for.
"""

import logging
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from pydantic import ValidationError
from vllm import AsyncEngineArgs
from vllm.platforms import current_platform
from vllm.usage.usage_lib import UsageContext
from vllm.v1.engine.async_llm import AsyncLLM

from flashrl_rollout.checkpoint_reader import Checkpoint
from flashrl_rollout.engine_settings import EngineSettings
from flashrl_rollout.memory_check import check_memory
from flashrl_rollout.model_check import check_folder
from flashrl_rollout.model_limits import check_supported
from flashrl_rollout.packed_layers import check_patterns
from flashrl_rollout.schedulers import INTERVAL_KEY

_WORKER = "flashrl_rollout.worker.WorkerExtension"
_SCHEDULERS = {
    "cpu": "flashrl_rollout.schedulers.HoldingScheduler",
    "cuda": "flashrl_rollout.schedulers.HoldingAsyncScheduler",
}
_METHODS = {"int8": "flashrl_int8", "fp8": "flashrl_fp8"}


def find_folder(model: str) -> Path:
    """The checkpoint's folder, fetched from the model hub where `model` is no folder."""
    folder = Path(model)
    if not folder.is_dir():
        patterns = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
        folder = Path(snapshot_download(model, allow_patterns=patterns))
    check_folder(folder)
    Checkpoint(folder)  # names a damaged file, at which vLLM fails with whatever it meets there
    return folder


def launch(settings: EngineSettings, folder: Path, loggers: list[Any]) -> AsyncLLM:
    """Load the model from `folder`; ValueError for settings or models that cannot work."""
    logging.getLogger("vllm").setLevel(settings.environment()["VLLM_LOGGING_LEVEL"])
    is_cpu = current_platform.is_cpu()
    if settings.device not in ("auto", "cpu" if is_cpu else "cuda"):
        raise ValueError(f"device: {settings.device} asked for, but vLLM here runs on {current_platform.device_type}")
    if is_cpu and settings.kv_cache_dtype == "fp8" and not torch.cpu.get_capabilities().get("avx512_f"):
        raise ValueError("kv_cache_dtype: on a CPU fp8 needs AVX-512, which this one has not")
    if not is_cpu:
        check_memory(folder, settings, current_platform.get_device_total_memory())
    arguments = AsyncEngineArgs(
        model=str(folder),
        served_model_name=settings.model,
        quantization=_METHODS.get(settings.quantization, "flashrl_bf16" if is_cpu else None),
        load_format="safetensors",
        dtype="bfloat16",
        tensor_parallel_size=settings.tensor_parallel_size,
        max_model_len=settings.max_model_len or None,
        max_num_seqs=settings.max_num_seqs,
        gpu_memory_utilization=settings.gpu_memory_utilization,
        kv_cache_memory_bytes=settings.kv_cache_bytes(is_cpu),
        kv_cache_dtype=settings.kv_cache_dtype,
        enforce_eager=settings.enforce_eager,
        enable_prefix_caching=True,
        # on the CPU vLLM 0.32 dies of a prefill cut in two when the request has a seed: it rewinds the generator
        enable_chunked_prefill=False if is_cpu else None,
        logprobs_mode="processed_logprobs",
        seed=settings.seed,
        use_tqdm_on_load=settings.log_format == "text",
        worker_extension_cls=_WORKER,
        async_scheduling=None if is_cpu else True,
        scheduler_cls=_SCHEDULERS["cpu" if is_cpu else "cuda"] if settings.output_interval > 1 else None,
        additional_config={**settings.layer_selection().additional_config(), INTERVAL_KEY: settings.output_interval},
    )
    try:
        config = arguments.create_model_config()
        check_supported(config)
        if settings.keep_bf16:
            check_patterns(settings.layer_selection(), config, folder)
        # the limits of vLLM's own server; without a context a step has 2048 tokens at most, also on the largest GPU
        return AsyncLLM.from_engine_args(arguments, usage_context=UsageContext.OPENAI_API_SERVER, stat_loggers=loggers)
    except ValidationError as error:  # its text has several lines, one of them an address
        raise ValueError(error.errors()[0]["msg"].removeprefix("Value error, ")) from error
