"""The DAPO surrogate, summed over tokens. Knows nothing of batches, ranks or where log-probs come from."""

import torch
from torch import Tensor

from flashrl_trainer.algorithm.importance import MAX_LOG_RATIO
from flashrl_trainer.algorithm.sums import ClipSums


def dapo_loss_sum(
    trainer_logprobs: Tensor,
    proximal_logprobs: Tensor,
    advantages: Tensor,
    weights: Tensor,
    loss_mask: Tensor,
    clip_low: float,
    clip_high: float,
    dual_clip: float,
) -> tuple[Tensor, ClipSums]:
    """Sum of `weight * loss` over the tokens of `loss_mask` (DAPO, arXiv 2503.14476; dual clip, arXiv 1912.09729).

    All tensors [T]; only `trainer_logprobs` is differentiated. With r = exp(clamp(trainer - proximal, -20, 20)):
    `L = -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A)`, and where A < 0 also `L = min(L, -dual_clip A)`.
    The sum is 0-d, to be divided by the *global* number of loss tokens (`loss_for_backward`). What masked positions
    hold, NaN included, reaches neither the sum nor the gradient.

    A token counts as clipped where clipping takes its gradient away: low where A < 0 and r < 1 - clip_low, high where
    A > 0 and r > 1 + clip_high, dual where A < 0 and r > dual_clip.
    """
    log_ratio = trainer_logprobs[loss_mask] - proximal_logprobs[loss_mask].detach()
    advantage = advantages[loss_mask]
    ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    loss = -torch.minimum(ratio * advantage, ratio.clamp(1 - clip_low, 1 + clip_high) * advantage)
    loss = torch.where(advantage < 0, torch.minimum(loss, -dual_clip * advantage), loss)
    return (weights[loss_mask] * loss).sum(), ClipSums(
        tokens=loss_mask.sum().double(),
        clipped_low=((advantage < 0) & (ratio < 1 - clip_low)).sum().double(),
        clipped_high=((advantage > 0) & (ratio > 1 + clip_high)).sum().double(),
        dual_clipped=((advantage < 0) & (ratio > dual_clip)).sum().double(),
    )


def loss_for_backward(loss_sum: Tensor, num_loss_tokens: int, world_size: int) -> Tensor:
    """One rank's share of the loss, scaled so that FSDP's *average* of gradients over ranks is the global gradient.

    `num_loss_tokens` is that of the global mini-batch, over all ranks and micro-batches. To report the loss, add
    `loss_sum / num_loss_tokens` over ranks and micro-batches: this value is `world_size` times too large for that.
    Raises ValueError where no token is left, since 0 / 0 would turn the weights into NaN.
    """
    if num_loss_tokens <= 0:
        raise ValueError(f"num_loss_tokens: must be at least 1, not {num_loss_tokens}: every sample has left the loss")
    return loss_sum * (world_size / num_loss_tokens)
