"""Chunked log-probs against float64, and that no [T, V] matrix in fp32 ever exists whole.

Every tensor that an operation makes is looked at as it is made, forward and backward.
"""

import math
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flashrl_trainer.logprobs import token_logprobs

TOKENS, VOCABULARY, HIDDEN, CHUNK = 96, 501, 8, 16


class Largest(TorchDispatchMode):
    """Keeps the most elements that the result of an operation had, by dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: dict[torch.dtype, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.elements[tensor.dtype] = max(self.elements.get(tensor.dtype, 0), tensor.numel())
        return result


def inputs(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(5)
    hidden = torch.randn(TOKENS, HIDDEN).to(dtype).requires_grad_()
    head = torch.randn(VOCABULARY, HIDDEN).to(dtype).requires_grad_()
    return hidden, head, torch.randint(0, VOCABULARY, (TOKENS,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tensor_holds_more_logits_than_a_chunk(dtype: torch.dtype) -> None:
    hidden, head, targets = inputs(dtype)
    with Largest() as largest:
        logprobs, _ = token_logprobs(hidden, head, targets, 1.0, CHUNK)
        logprobs.sum().backward()
    assert max(largest.elements.values()) == CHUNK * VOCABULARY
    assert hidden.grad is not None


def test_the_watch_would_see_a_whole_matrix() -> None:
    hidden, head, targets = inputs(torch.float32)
    with Largest() as largest:
        token_logprobs(hidden, head, targets, 1.0, TOKENS)
    assert largest.elements[torch.float32] == TOKENS * VOCABULARY


def test_bf16_inputs_have_fp32_logits() -> None:
    hidden, head, targets = inputs(torch.bfloat16)
    logprobs, entropy = token_logprobs(hidden, head, targets, 1.0, CHUNK)
    exact = torch.log_softmax(hidden.double() @ head.double().t(), dim=1)
    torch.testing.assert_close(logprobs.double(), exact.gather(1, targets[:, None])[:, 0], rtol=0, atol=2e-6)
    torch.testing.assert_close(entropy.double(), -(exact.exp() * exact).sum(1), rtol=0, atol=5e-6)


def test_a_certain_token_has_entropy_zero_and_a_finite_gradient() -> None:
    hidden = torch.tensor([[200.0, 0.0]], requires_grad=True)
    head = torch.eye(2)
    logprobs, entropy = token_logprobs(hidden, head, torch.tensor([1]), 1.0, 4)
    assert logprobs.item() == -200
    assert entropy.item() == pytest.approx(200 * math.exp(-200), abs=1e-30)
    logprobs.sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.tolist() == [[-1.0, 1.0]]
