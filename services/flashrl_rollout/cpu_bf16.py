"""Products in bf16 on a CPU without instructions for it, where torch's own are several times slower than those in fp32.

Knows tensors; knows nothing of layers or of vLLM.
"""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

_BLOCK_ELEMENTS = 1 << 20  # of the weight, in fp32 at a time: they stay in the processor's cache
_FEW_ROWS = 4  # up to which reading the weight is the cost, and widening it more than what it saves

Linear = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def has_bf16() -> bool:
    """Whether torch has a bf16 product for this CPU that is faster than one in fp32."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def wide_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., K], weight [N, K], bias [N], all bf16 -> [..., N] bf16, rounded once from sums in fp32."""
    rows = x.reshape(-1, x.shape[-1])
    if rows.shape[0] <= _FEW_ROWS:
        return functional.linear(x, weight, bias)
    wide, wide_bias = rows.float(), None if bias is None else bias.float()
    out = x.new_empty(rows.shape[0], weight.shape[0])
    step = max(1, _BLOCK_ELEMENTS // weight.shape[1])
    for start in range(0, weight.shape[0], step):
        block = slice(start, start + step)
        out[:, block] = functional.linear(wide, weight[block].float(), None if wide_bias is None else wide_bias[block])
    return out.view(*x.shape[:-1], weight.shape[0])


@cache
def wide_linear_operator() -> Linear:
    """`wide_linear` as one operator, whose branch and loop torch.compile does not follow."""
    operator = torch.library.custom_op("flashrl::wide_linear", wide_linear, mutates_args=())
    operator.register_fake(lambda x, weight, bias=None: x.new_empty(*x.shape[:-1], weight.shape[0]))
    return operator
