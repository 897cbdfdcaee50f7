"""How vLLM's linear layers hold and load the stored form.

Quantizes bf16 weights as they are loaded and takes codes and scales as they are. Knows nothing of updates.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter, functional
from vllm.model_executor.layers.linear import (
    LinearMethodBase,
    UnquantizedLinearMethod,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
from vllm.model_executor.parameter import ChannelQuantScaleParameter, ModelWeightParameter
from vllm.model_executor.utils import set_weight_attrs

from flashrl_rollout.cpu_bf16 import has_bf16, wide_linear_operator
from flashrl_rollout.kernels import Kernel
from flashrl_wire.quantize import CODE_DTYPE, RowStorage, quantize_rows

Loader = Callable[..., None]


@register_weight_loader_v2_supported_method
class RowsLinearMethod(LinearMethodBase):  # type: ignore[misc]
    """A layer with `weight` as codes [N, K] and `weight_scale` fp32 [N, 1], both written in place for ever after."""

    def __init__(self, storage: RowStorage, kernel: Kernel) -> None:
        self._storage: RowStorage = storage
        self._kernel = kernel

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **attributes: object,
    ) -> None:
        """Register codes and scales with the layer's own loader, which slices and fuses by name."""
        load: Loader = attributes.pop("weight_loader")  # type: ignore[assignment]
        rows = sum(output_partition_sizes)

        def load_weight(parameter: Parameter, loaded: Tensor, *where: object) -> None:
            if loaded.is_meta or loaded.dtype == parameter.dtype:
                load(parameter, loaded, *where)
                return
            codes, scales = self._quantize(layer, loaded.to(parameter.device))
            load(layer.weight, codes, *where)
            load(layer.weight_scale, scales, *where)

        codes = torch.empty(rows, input_size_per_partition, dtype=CODE_DTYPE[self._storage])
        scales = torch.ones(rows, 1, dtype=torch.float32)
        weight = ModelWeightParameter(data=codes, input_dim=1, output_dim=0, weight_loader=load_weight)
        scale = ChannelQuantScaleParameter(data=scales, output_dim=0, weight_loader=load)
        layer.register_parameter("weight", weight)
        layer.register_parameter("weight_scale", scale)
        set_weight_attrs(weight, attributes)

    def _quantize(self, layer: Any, loaded: Tensor) -> tuple[Tensor, Tensor]:
        """Quantize whole rows, before tensor parallelism slices them, so that the stored form has no degree."""
        if loaded.dim() != 2 or loaded.shape[1] != layer.input_size:
            raise ValueError(f"quantization: {layer.prefix} is loaded from {list(loaded.shape)}, not from whole rows")
        try:
            return quantize_rows(loaded.to(torch.bfloat16), self._storage)
        except ValueError as error:
            raise ValueError(f"quantization: {layer.prefix}: {error}") from error

    def process_weights_after_loading(self, layer: Any) -> None:
        """Bring the kernel up to date with the stored tensors; called after loading and after every update."""
        self._kernel.refresh(layer.weight, layer.weight_scale)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., K] -> [..., N]."""
        return self._kernel(x, layer.weight, layer.weight_scale, bias)


@register_weight_loader_v2_supported_method
class Bf16CpuLinearMethod(UnquantizedLinearMethod):  # type: ignore[misc]
    """A bf16 layer on the CPU, where vLLM's own method packs the weight and drops what could be read and written."""

    def process_weights_after_loading(self, layer: Any) -> None:
        """Let the product read the weight itself."""
        layer.cpu_linear = functional.linear if has_bf16() else wide_linear_operator()


class Bf16CpuEmbeddingMethod(UnquantizedEmbeddingMethod):  # type: ignore[misc]
    """An embedding or head on the CPU, whose product is widened where the CPU has no bf16; vLLM's own where it has."""

    def process_weights_after_loading(self, layer: Any) -> None:
        """Choose the product."""
        if has_bf16():
            super().process_weights_after_loading(layer)
        else:
            layer.cpu_linear = wide_linear_operator()
