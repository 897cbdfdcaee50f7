"""Products in bf16 that are computed in fp32, against float64."""

import pytest
import torch
from torch import Tensor

from flashrl_rollout.cpu_bf16 import wide_linear, wide_linear_operator


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape).bfloat16()


@pytest.mark.parametrize("lead", [(1,), (4,), (5,), (33,), (2, 7), (0,)])
@pytest.mark.parametrize(("n", "k"), [(96, 64), (3001, 400)])  # within one block, and in several with a rest
@pytest.mark.parametrize("has_bias", [True, False])
def test_a_product_is_rounded_once(lead: tuple[int, ...], n: int, k: int, has_bias: bool) -> None:
    torch.manual_seed(n + sum(lead))
    x, weight, bias = draw(*lead, k), draw(n, k), draw(n) if has_bias else None
    found = wide_linear(x, weight, bias)
    exact = x.double() @ weight.double().t() + (0 if bias is None else bias.double())
    assert found.shape == exact.shape
    assert found.dtype == torch.bfloat16
    slack = 2**-8 * exact.abs() + 1e-4 * exact.abs().amax() if exact.numel() else exact  # half a bf16 step, fp32 sums
    assert bool(((found.double() - exact).abs() <= slack).all())


def test_compiled_code_calls_it_for_any_number_of_rows() -> None:
    weight, operator = draw(96, 64), wide_linear_operator()
    compiled = torch.compile(lambda x: operator(x * 2, weight, None) + 1, dynamic=True, fullgraph=True, backend="eager")
    for rows in (1, 3, 9, 40):
        x = draw(rows, 64)
        assert torch.equal(compiled(x), wide_linear(x * 2, weight) + 1)
