"""Elements at absolute addresses of a CUDA device, written and read by one kernel each.

A commit touches hundreds of tensors; a launch for each would take longer than the writing. Knows addresses; knows
nothing of what is there, so whoever calls has to keep it alive.
"""

from typing import Any

import torch
from torch import Tensor

try:
    import triton  # type: ignore[import-not-found,unused-ignore]
    import triton.language as tl  # type: ignore[import-not-found,unused-ignore]
except ImportError:  # comes with torch for CUDA, and nobody calls this elsewhere
    triton = None

_BLOCK = 1024

if triton is not None:
    # one program for any count: a commit would have to compile another for the first that 16 divides

    @triton.jit(do_not_specialize=["count"])  # type: ignore[untyped-decorator,unused-ignore]
    def _write(addresses, values, count, BLOCK: tl.constexpr):  # type: ignore  # noqa: N803
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = at < count
        pointers = tl.load(addresses + at, mask=inside, other=0).to(tl.pointer_type(values.dtype.element_ty))
        tl.store(pointers, tl.load(values + at, mask=inside), mask=inside)

    @triton.jit(do_not_specialize=["count"])  # type: ignore[untyped-decorator,unused-ignore]
    def _read(addresses, values, count, BLOCK: tl.constexpr):  # type: ignore  # noqa: N803
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = at < count
        pointers = tl.load(addresses + at, mask=inside, other=0).to(tl.pointer_type(values.dtype.element_ty))
        tl.store(values + at, tl.load(pointers, mask=inside), mask=inside)


def scatter(addresses: Tensor, values: Tensor) -> None:
    """Write values [n], of 1, 2 or 4 bytes each, to addresses [n] int64, no address twice."""
    _launch(_write, addresses, values)


def gather(addresses: Tensor, like: Tensor) -> Tensor:
    """Values [n] of the type of `like` from addresses [n] int64."""
    values = torch.empty_like(like)
    _launch(_read, addresses, values)
    return values


def warm_up(device: torch.device) -> None:
    """Compile for every size of value, so that no commit has to."""
    for dtype in (torch.uint8, torch.int16, torch.int32):
        values = torch.arange(3, device=device).to(dtype)
        addresses = values.data_ptr() + torch.arange(3, device=device) * values.element_size()
        scatter(addresses, values)
        if gather(addresses, values).tolist() != [0, 1, 2]:
            raise RuntimeError(f"{device} does not read back what was written to it")


def _launch(kernel: Any, addresses: Tensor, values: Tensor) -> None:
    count = values.numel()
    if count:
        kernel[(-(-count // _BLOCK),)](addresses, values, count, BLOCK=_BLOCK)
