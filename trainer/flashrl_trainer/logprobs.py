"""Token log-probs from hidden states, in chunks with fp32 logits: a [T, V] matrix in fp32 never exists whole.

Knows a hidden state, a head and a temperature; knows nothing of models or losses.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function


def token_logprobs(
    hidden: Tensor, head: Tensor, targets: Tensor, temperature: float, chunk_tokens: int
) -> tuple[Tensor, Tensor]:
    """ln p(target) and entropy after temperature: hidden [T, D], head [V, D], targets [T] int64 -> [T] fp32, twice.

    Only the log-probs are differentiated; each chunk's logits are computed again in the backward pass.
    """
    found: tuple[Tensor, Tensor] = _ChunkedLogprobs.apply(hidden, head, targets, temperature, chunk_tokens)  # type: ignore[no-untyped-call]
    return found


class _ChunkedLogprobs(Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor, temperature: float, chunk_tokens: int
    ) -> tuple[Tensor, Tensor]:
        logprobs = torch.empty(hidden.shape[0], dtype=torch.float32, device=hidden.device)
        entropy, normalizers = torch.empty_like(logprobs), torch.empty_like(logprobs)
        exact_head = _for_products(head)
        for part in _chunks(hidden.shape[0], chunk_tokens):
            logits = _mm_fp32(hidden[part], exact_head.t()).div_(temperature)
            normalizers[part] = logits.logsumexp(1)
            logprobs[part] = logits.gather(1, targets[part].unsqueeze(1)).squeeze(1) - normalizers[part]
            # in place: H = - sum of p ln p
            log_p = logits.sub_(normalizers[part].unsqueeze(1))
            entropy[part] = -(log_p.exp() * log_p).sum(1)
        ctx.save_for_backward(hidden, head, targets, normalizers)
        ctx.temperature, ctx.chunk_tokens = temperature, chunk_tokens
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        hidden, head, targets, normalizers = ctx.saved_tensors
        exact_head = _for_products(head)
        grad_hidden = torch.empty_like(hidden)
        grad_head = torch.zeros(head.shape, dtype=torch.float32, device=head.device)
        for part in _chunks(hidden.shape[0], ctx.chunk_tokens):
            # d ln p(target) / d logits = (onehot(target) - p) / temperature
            logits = _mm_fp32(hidden[part], exact_head.t()).div_(ctx.temperature)
            grad_logits = logits.sub_(normalizers[part].unsqueeze(1)).exp_().neg_()
            rows = torch.arange(grad_logits.shape[0], device=head.device)
            grad_logits[rows, targets[part]] += 1
            grad_logits = grad_logits.mul_((grads[0][part] / ctx.temperature).unsqueeze(1)).to(head.dtype)
            grad_hidden[part] = grad_logits @ head
            grad_head += _mm_fp32(grad_logits.t(), hidden[part])
        return grad_hidden, grad_head.to(head.dtype), None, None, None


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
