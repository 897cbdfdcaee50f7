"""The quantization methods that vLLM knows after `plugin.register`: flashrl_int8, flashrl_fp8 and flashrl_bf16.

Knows which layers are quantized and what runs them; knows nothing of engines or updates.
"""

import logging
from abc import abstractmethod
from typing import Any

import torch
from torch import nn
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, QKVParallelLinear, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.platforms import current_platform

from flashrl_rollout.kernels import make_kernel
from flashrl_rollout.layer_selection import LayerSelection
from flashrl_rollout.linear_method import Bf16CpuEmbeddingMethod, Bf16CpuLinearMethod, RowsLinearMethod
from flashrl_wire.quantize import CODE_DTYPE


class _RowsConfig(QuantizationConfig):  # type: ignore[misc]
    """The selected linear layers by rows; the others, embeddings, lm_head, norms and attention stay bf16."""

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16]

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> QuantizationConfig:
        return cls()

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        if isinstance(layer, RoutedExperts):
            raise ValueError(
                f"quantization: {prefix} is a mixture of experts, which {self.get_name()} does not support"
            )
        if isinstance(layer, VocabParallelEmbedding) and current_platform.is_cpu():
            return Bf16CpuEmbeddingMethod()
        if not isinstance(layer, LinearBase):
            return None
        return self._linear_method() if self._quantizes(layer, prefix) else _bf16_method()

    def _quantizes(self, layer: LinearBase, prefix: str) -> bool:
        selection = LayerSelection.of(get_current_vllm_config().additional_config)
        device = current_platform.device_type
        return selection.quantizes(prefix, self.packed_modules_mapping, _whole_shape(layer), device)

    @abstractmethod
    def _linear_method(self) -> QuantizeMethodBase:
        """What holds and runs a layer that is quantized."""


class Int8Config(_RowsConfig):
    """int8 codes and fp32 scales by rows; activations int8 per token."""

    @classmethod
    def get_name(cls) -> str:
        return "flashrl_int8"

    @classmethod
    def get_min_capability(cls) -> int:
        return 75

    def _linear_method(self) -> QuantizeMethodBase:
        return RowsLinearMethod("int8_rows", make_kernel("int8_rows"))


class Fp8Config(_RowsConfig):
    """e4m3 codes and fp32 scales by rows; activations e4m3 per token."""

    @classmethod
    def get_name(cls) -> str:
        return "flashrl_fp8"

    @classmethod
    def get_min_capability(cls) -> int:
        return 89

    def _linear_method(self) -> QuantizeMethodBase:
        return RowsLinearMethod("fp8_rows", make_kernel("fp8_rows"))


class Bf16CpuConfig(_RowsConfig):
    """No quantization, for the CPU, where vLLM alone would keep no readable weight."""

    @classmethod
    def get_name(cls) -> str:
        return "flashrl_bf16"

    @classmethod
    def get_min_capability(cls) -> int:
        return 0

    def _linear_method(self) -> QuantizeMethodBase:
        return Bf16CpuLinearMethod()


def _whole_shape(layer: LinearBase) -> tuple[int, int]:
    """[N, K] of the whole layer, in which key and value heads that several ranks hold count once."""
    rows = layer.output_size
    if isinstance(layer, QKVParallelLinear):
        queries, *others = layer.output_sizes
        rows = queries + sum(others) // layer.num_kv_head_replicas
    return int(rows), int(layer.input_size)


def _bf16_method() -> QuantizeMethodBase:
    return Bf16CpuLinearMethod() if current_platform.is_cpu() else UnquantizedLinearMethod()


def register_all() -> None:
    """Make the three methods known to vLLM; may be called again."""
    for config in (Int8Config, Fp8Config, Bf16CpuConfig):
        register_quantization_config(config.get_name())(config)
    logging.getLogger("vllm.model_executor.models.utils").addFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    """False for the loader's warning, one a layer, that a bf16 weight meets a parameter of codes."""
    return not (isinstance(record.args, tuple) and any(code in record.args for code in CODE_DTYPE.values()))
