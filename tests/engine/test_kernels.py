"""The products of 8-bit layers on this machine's CPU, with the codes that are hardest to sum."""

from typing import Any

import pytest
import torch
from torch import Tensor

pytestmark = [pytest.mark.engine, pytest.mark.timeout(120)]

SHAPES = [(96, 192), (64, 1024), (257, 300)]  # N, K; 300 is no multiple of a vector


def codes_of(n: int, k: int, kind: str) -> Tensor:
    """[n, k] int8: all of the largest magnitude with one sign a row, or anything."""
    if kind == "anything":
        return torch.randint(-127, 128, (n, k), dtype=torch.int8)
    return (torch.arange(n) % 2 * 254 - 127).to(torch.int8)[:, None].repeat(1, k)


def largest_error(kernel: Any, n: int, k: int, num_tokens: int, kind: str) -> float:
    """Of x W, relative to the largest of its token, against integers summed in 64 bits."""
    torch.manual_seed(n + k + num_tokens)
    weight, scale = codes_of(n, k, kind), torch.rand(n, 1) + 0.5
    x_codes = codes_of(num_tokens, k, kind)
    x_codes[:, 0] = 127  # so that a token's scale is exactly what follows
    x_scale = torch.ldexp(torch.ones(num_tokens, 1), torch.randint(-6, 6, (num_tokens, 1)))
    x = (x_codes * x_scale).to(torch.bfloat16)  # codes up to 127 and powers of two lose nothing in bf16
    kernel.refresh(weight, scale)
    found = kernel(x, weight, scale, None).double()
    exact = (x_codes.long() @ weight.long().t()).double() * x_scale.double() * scale.double().t()
    return float(((found - exact).abs() / exact.abs().amax(dim=1, keepdim=True)).max())


@pytest.mark.parametrize("kind", ["largest", "anything"])
@pytest.mark.parametrize("num_tokens", [1, 5, 64, 300])
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_int8_sums_are_exact(n: int, k: int, num_tokens: int, kind: str) -> None:
    from flashrl_rollout import kernels

    with torch.inference_mode():
        for kernel in (kernels.make_kernel("int8_rows"), kernels.CpuInt8Wide()):
            assert largest_error(kernel, n, k, num_tokens, kind) < 2**-8  # bf16's rounding


def test_a_saturating_cpu_is_recognized() -> None:
    from flashrl_rollout import kernels

    with torch.inference_mode():
        errors = [largest_error(kernels.CpuInt8(), n, k, 64, "largest") for n, k in SHAPES]
    assert kernels.onednn_is_exact() == (max(errors) < 2**-8)
    assert isinstance(kernels.make_kernel("int8_rows"), kernels.CpuInt8) == kernels.onednn_is_exact()
