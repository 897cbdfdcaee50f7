"""The matrix products of linear layers over the stored form, per device.

A kernel computes straight from the layer's stored tensors, or from a packed copy of them that `refresh` renews. Knows
nothing of loading, names or updates.
"""

import logging
from functools import cache
from typing import Literal, Protocol

import torch
from torch import Tensor
from torch.nn import functional
from vllm import _custom_ops as ops
from vllm.platforms import current_platform

from flashrl_wire.quantize import RowStorage

logger = logging.getLogger(__name__)

_SMALLEST_FP8_SCALE = 1.0 / (448.0 * 512.0)  # the floor that vLLM's CUDA kernel puts under an activation's scale
_PRIMITIVES = 32  # oneDNN primitives kept per layer, one for each batch size seen


class Kernel(Protocol):
    """x [..., K] bf16, weight [N, K] in storage dtype, scale [N, 1] fp32, bias [N] or None -> [..., N] bf16."""

    def refresh(self, weight: Tensor, scale: Tensor) -> None:
        """Compute from now on with what `weight` and `scale` hold."""

    def __call__(self, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        """The product of x and the weight that codes and scales stand for."""


class CudaInt8:
    """Cutlass on the stored codes themselves; `weight.t()` is a view, so nothing goes stale under CUDA graphs."""

    def refresh(self, weight: Tensor, scale: Tensor) -> None:
        """Nothing to renew: the kernel reads the stored tensors."""

    def __call__(self, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        """Quantize x per token, symmetric, and multiply."""
        codes, x_scale, _ = ops.scaled_int8_quant(x.contiguous(), None, None, symmetric=True)
        out: Tensor = ops.cutlass_scaled_mm(codes, weight.t(), x_scale, scale, x.dtype, bias)
        return out


class CudaFp8:
    """Cutlass on the stored e4m3 codes themselves."""

    def refresh(self, weight: Tensor, scale: Tensor) -> None:
        """Nothing to renew: the kernel reads the stored tensors."""

    def __call__(self, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        """Quantize x per token and multiply."""
        rows = x.contiguous().view(-1, x.shape[-1])
        codes, x_scale = ops.scaled_fp8_quant(rows, use_per_token_if_dynamic=True)
        out: Tensor = ops.cutlass_scaled_mm(codes, weight.t(), x_scale, scale, x.dtype, bias)
        return out.view(*x.shape[:-1], weight.shape[0])


class CpuInt8:
    """oneDNN, which keeps a packed copy of the codes."""

    def __init__(self) -> None:
        self._packed: ops.CPUDNNLGEMMHandler | None = None

    def refresh(self, weight: Tensor, scale: Tensor) -> None:
        """Pack the codes anew."""
        packed = ops.create_onednn_scaled_mm(weight.t(), scale, torch.bfloat16, True, False, _PRIMITIVES)
        self._packed = _renewed(self._packed, packed)

    def __call__(self, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        """Quantize x per token, symmetric, and multiply."""
        rows = x.reshape(-1, x.shape[-1])
        codes, x_scale, _ = ops.onednn_scaled_int8_quant(rows)
        out = torch.empty((rows.shape[0], weight.shape[0]), dtype=x.dtype)
        ops.onednn_scaled_mm(self._packed, codes, out, x_scale, None, None, bias)
        return out.view(*x.shape[:-1], weight.shape[0])


class _WideCodes:
    """A copy of the codes in fp32, where their products are exact and sums are to 24 bits; slow, four bytes each."""

    def __init__(self) -> None:
        self._codes = torch.empty(0)

    def refresh(self, weight: Tensor, scale: Tensor) -> None:
        """Widen the codes anew, in the same memory so that compiled code sees them."""
        if self._codes.shape != weight.shape:
            self._codes = torch.empty(weight.shape, dtype=torch.float32)
        self._codes.copy_(weight)

    def _product(self, x: Tensor, codes: Tensor, x_scale: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        """Of x [..., K] as codes [M, K] fp32 times x_scale [M, 1]: [..., N] in x's dtype."""
        out = functional.linear(codes, self._codes).mul_(x_scale).mul_(scale.t())
        out = out if bias is None else out.add_(bias)
        return out.to(x.dtype).view(*x.shape[:-1], out.shape[1])


class CpuInt8Wide(_WideCodes):
    """INT8 for a CPU whose oneDNN saturates: the same codes as `CpuInt8`, summed in fp32."""

    def __call__(self, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        """Quantize x per token, symmetric, and multiply."""
        rows = x.reshape(-1, x.shape[-1])
        codes, x_scale, _ = ops.onednn_scaled_int8_quant(rows)
        return self._product(x, codes.float(), x_scale, scale, bias)


class CpuFp8(_WideCodes):
    """Emulation: exact e4m3 products summed in fp32, as on a GPU."""

    def __call__(self, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        """Quantize x per token to e4m3 and multiply."""
        rows = x.reshape(-1, x.shape[-1]).float()
        x_scale = (rows.abs().amax(dim=1, keepdim=True) / 448.0).clamp_min(_SMALLEST_FP8_SCALE)
        codes = (rows / x_scale).clamp(-448.0, 448.0).to(torch.float8_e4m3fn).float()
        return self._product(x, codes, x_scale, scale, bias)


@cache
def onednn_is_exact() -> bool:
    """Whether oneDNN sums int8 products without loss; on a CPU without VNNI it adds pairs in 16 bits, saturating.

    Asked with the largest codes of either sign, where every such pair saturates, for one token and for many.
    """
    k, n, code = 256, 64, 127
    weight = torch.full((n, k), code, dtype=torch.int8)
    weight[::2] = -code
    ones = torch.ones((n, 1), dtype=torch.float32)
    kernel = CpuInt8()
    kernel.refresh(weight, ones)
    for num_tokens in (1, 64):
        found = kernel(torch.ones((num_tokens, k), dtype=torch.bfloat16), weight, ones, None)
        exact = weight.float().sum(dim=1).to(torch.bfloat16).expand(num_tokens, n)
        if not torch.allclose(found.float(), exact.float(), rtol=2**-7, atol=0.0):
            logger.warning("oneDNN's int8 sums saturate on this CPU (no VNNI): int8 is computed in fp32 instead")
            return False
    return True


def device() -> Literal["cpu", "cuda"]:
    """Where the kernels of this installation of vLLM run."""
    return "cpu" if current_platform.is_cpu() else "cuda"


def make_kernel(storage: RowStorage) -> Kernel:
    """A layer's kernel on this device; ValueError where there is none."""
    if current_platform.is_cpu():
        return _make_cpu_kernel(storage)
    if storage == "int8_rows" and current_platform.has_device_capability(100):
        raise ValueError("quantization: int8 has no kernel on this GPU (compute capability 10 or newer); use fp8")
    if storage == "fp8_rows" and not current_platform.has_device_capability(89):
        raise ValueError("quantization: fp8 has no kernel on this GPU (compute capability below 8.9); use int8")
    return CudaInt8() if storage == "int8_rows" else CudaFp8()


def _make_cpu_kernel(storage: RowStorage) -> Kernel:
    if storage == "fp8_rows":
        return CpuFp8()
    return CpuInt8() if onednn_is_exact() else CpuInt8Wide()


def _renewed(held: ops.CPUDNNLGEMMHandler | None, packed: ops.CPUDNNLGEMMHandler) -> ops.CPUDNNLGEMMHandler:
    """`held` with the address of the new packed weight; compiled code may hold its tensor, so that one must stay."""
    if held is None:
        return packed
    address = held.handler_tensor.clone()
    held.handler_tensor.copy_(packed.handler_tensor)
    packed.handler_tensor.copy_(address)  # `packed` now owns the old weight and frees it
    return held
