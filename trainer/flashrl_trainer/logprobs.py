"""Token log-probs from hidden states, in chunks with fp32 logits: a [T, V] matrix in fp32 never exists whole.

Knows a hidden state, a head and a temperature; knows nothing of models or losses.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function


def token_logprobs(
    hidden: Tensor, head: Tensor, targets: Tensor, temperature: float, chunk_tokens: int, *, compiled: bool = False
) -> tuple[Tensor, Tensor]:
    """ln p(target) and entropy after temperature: hidden [T, D], head [V, D], targets [T] int64 -> [T] fp32, twice.

    Only the log-probs are differentiated; each chunk's logits are computed again in the backward pass. `compiled`:
    what follows the product reads a chunk's logits three times forward and once backward, instead of some ten times.
    """
    found: tuple[Tensor, Tensor] = _ChunkedLogprobs.apply(hidden, head, targets, temperature, chunk_tokens, compiled)  # type: ignore[no-untyped-call]
    return found


class _ChunkedLogprobs(Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor, temperature: float, chunk_tokens: int, compiled: bool
    ) -> tuple[Tensor, Tensor]:
        scores = _compiled(_scores) if compiled else _scores
        logprobs = torch.empty(hidden.shape[0], dtype=torch.float32, device=hidden.device)
        entropy, normalizers = torch.empty_like(logprobs), torch.empty_like(logprobs)
        exact_head = _for_products(head)
        for part in _chunks(hidden.shape[0], chunk_tokens):
            logits = _mm_fp32(hidden[part], exact_head.t())
            logprobs[part], entropy[part], normalizers[part] = scores(logits, targets[part], temperature)
        ctx.save_for_backward(hidden, head, targets, normalizers)
        ctx.temperature, ctx.chunk_tokens, ctx.compiled = temperature, chunk_tokens, compiled
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None, None]:
        hidden, head, targets, normalizers = ctx.saved_tensors
        exact_head = _for_products(head)
        gradient = _compiled(_gradient) if ctx.compiled else _gradient
        grad_hidden = torch.empty_like(hidden)
        grad_head = torch.zeros(head.shape, dtype=torch.float32, device=head.device)
        for part in _chunks(hidden.shape[0], ctx.chunk_tokens):
            logits = _mm_fp32(hidden[part], exact_head.t())
            grad_logits = gradient(
                logits, targets[part], normalizers[part], grads[0][part], ctx.temperature, head.dtype
            )
            grad_hidden[part] = grad_logits @ head
            grad_head += _mm_fp32(grad_logits.t(), hidden[part])
        return grad_hidden, grad_head.to(head.dtype), None, None, None, None


def _scores(logits: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs, entropies and normalizers [T], fp32; consumes `logits` [T, V]."""
    logits = logits.div_(temperature)
    normalizers = logits.logsumexp(1)
    logprobs = logits.gather(1, targets.unsqueeze(1)).squeeze(1) - normalizers
    log_p = logits.sub_(normalizers.unsqueeze(1))
    return logprobs, -(log_p.exp() * log_p).sum(1), normalizers  # H = - sum of p ln p


def _gradient(
    logits: Tensor, targets: Tensor, normalizers: Tensor, grads: Tensor, temperature: float, dtype: torch.dtype
) -> Tensor:
    """d (sum of grads ln p(target)) / d logits = grads (onehot(target) - p) / temperature; consumes `logits`."""
    p = logits.div_(temperature).sub_(normalizers.unsqueeze(1)).exp_()
    scale = (grads / temperature).unsqueeze(1)
    return p.neg_().scatter_add_(1, targets.unsqueeze(1), torch.ones_like(scale)).mul_(scale).to(dtype)


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """One graph for chunks of any length; of a copy that is never made, or else the changed logits would be kept."""
    return torch.compile(lambda logits, *rest: function(logits.clone(), *rest), dynamic=True)


def _chunks(total: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, total)) for start in range(0, total, size)]


def _for_products(head: Tensor) -> Tensor:
    """The head as `_mm_fp32` wants it, cast once and not once a chunk."""
    return head if head.is_cuda else head.float()


def _mm_fp32(left: Tensor, right: Tensor) -> Tensor:
    """A product with fp32 results: tensor cores keep them anyway, and rounding them to bf16 would cost 3 digits."""
    if left.is_cuda and left.dtype != torch.float32:
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()
