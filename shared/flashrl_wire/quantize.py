"""THE definition of the stored form: bf16 rows -> codes and scales, used by the trainer and by the service.

Knows nothing of models, layouts of files or devices; the same bits come out on every device.
"""

from typing import Literal

import torch
from torch import Tensor

RowStorage = Literal["int8_rows", "fp8_rows"]

LARGEST_CODE: dict[RowStorage, float] = {"int8_rows": 127.0, "fp8_rows": 448.0}
CODE_DTYPE: dict[RowStorage, torch.dtype] = {"int8_rows": torch.int8, "fp8_rows": torch.float8_e4m3fn}
_BLOCK_ELEMENTS = 1 << 24  # bounds the fp32 copy of a large matrix to 64 MiB


def row_max(weight: Tensor) -> Tensor:
    """Largest magnitude of each row: bf16 [N, K] -> fp32 [N, 1].

    Under tensor parallelism a shard of a row gives the shard's maximum; reduce it over the group before quantizing.
    """
    return weight.abs().amax(dim=1, keepdim=True).float()


def quantize_rows(weight: Tensor, storage: RowStorage, maximum: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Quantize the rows of a bf16 matrix: [N, K] -> codes [N, K] and fp32 scales [N, 1].

    int8: s = max|row| / 127, q = clamp(round_half_even(w / s), -127, 127); fp8: s = max|row| / 448,
    q = e4m3fn(saturate(w / s)). An all-zero row has s = 1 and q = 0. `maximum` replaces the row maxima where a row
    is spread over several devices. Raises ValueError for a dtype other than bf16 and for NaN or Inf.
    """
    if weight.dtype != torch.bfloat16 or weight.dim() != 2:
        raise ValueError(f"expected a bf16 matrix, got {weight.dtype} {list(weight.shape)}")
    largest = row_max(weight) if maximum is None else maximum
    if not bool(torch.isfinite(largest).all()):
        raise ValueError("a weight is NaN or Inf")
    # a 0-d tensor, not a Python number: CUDA would multiply by the reciprocal and give other bits
    limit = torch.tensor(LARGEST_CODE[storage], dtype=torch.float32, device=weight.device)
    scales = torch.where(largest == 0, torch.ones_like(largest), largest / limit)
    codes = torch.empty(weight.shape, dtype=CODE_DTYPE[storage], device=weight.device)
    rows = max(1, _BLOCK_ELEMENTS // max(1, weight.shape[1]))
    for start in range(0, weight.shape[0], rows):
        block = slice(start, start + rows)
        codes[block] = _codes(weight[block].float() / scales[block], storage)
    return codes, scales


def _codes(scaled: Tensor, storage: RowStorage) -> Tensor:
    if storage == "int8_rows":
        return scaled.round_().clamp_(-127, 127).to(torch.int8)
    return scaled.clamp_(-448, 448).to(torch.float8_e4m3fn)


def dequantize_rows(codes: Tensor, scales: Tensor) -> Tensor:
    """The fp32 values that codes [N, K] and scales [N, 1] stand for."""
    return codes.float() * scales
