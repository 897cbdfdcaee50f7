"""Weights that correct for sampling from another policy than the trainer's. Knows nothing of why the two differ.

Every correction works on `proximal - rollout`, is detached, and leaves the loss's denominator alone: a token that a
mask drops (weight 0) adds nothing to the sum but is still counted, so that the count is known before any forward pass.
"""

import torch
from torch import Tensor

from flashrl_trainer.algorithm.sums import MismatchSums, WeightSums

CORRECTIONS = ("token", "sequence", "geometric", "icepop", "none")
CAPPED = ("token", "sequence")
MAX_LOG_RATIO = 20.0  # exp(20) = 4.9e8: far over any cap, far under an overflow


def tis_weights(proximal: Tensor, rollout: Tensor, cap: float) -> Tensor:
    """Truncated importance weights `min(exp(clamp(proximal - rollout, -20, 20)), cap)`, [T] -> [T], detached.

    Raises ValueError where a rollout log-prob is missing (NaN) or infinite: to skip the correction would bias the step.
    Source: algorithm.md; F. Yao et al., "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training".
    """
    require_rollout_logprobs(rollout)
    return _ratio((proximal - rollout).detach()).clamp(max=cap)


def correction_weights(
    correction: str,
    proximal: Tensor,
    rollout: Tensor,
    sample_ids: Tensor,
    loss_mask: Tensor,
    *,
    cap: float,
    band: tuple[float, float],
) -> Tensor:
    """Weights [T], detached, of the named correction; 1 where `loss_mask` is False.

    proximal, rollout [T] float; sample_ids [T] int64 in [0, S); loss_mask [T] bool. With r = exp(proximal - rollout):

    token      min(r, cap) for each token (truncated importance sampling); `band` is not used
    sequence   min(product of r over the sample, cap), the same for all its tokens; `band` is not used
    geometric  1 where the geometric mean of r over the sample lies within `band`, else 0; `cap` is not used
    icepop     r where it lies within `band`, else 0, for each token (IcePop, arXiv 2510.18855); `cap` is not used
    none       1

    Raises ValueError for an unknown name, and where a rollout log-prob within `loss_mask` is missing or infinite.
    """
    require_rollout_logprobs(rollout[loss_mask])
    log_ratio = torch.where(loss_mask, proximal - rollout, 0.0).detach()
    match correction:
        case "token":
            weights = _ratio(log_ratio).clamp(max=cap)
        case "sequence":
            weights = _ratio(_sample_sum(log_ratio, sample_ids)).clamp(max=cap)[sample_ids]
        case "geometric":
            mean = _sample_sum(log_ratio, sample_ids) / _sample_sum(loss_mask.float(), sample_ids).clamp(min=1)
            weights = _within(_ratio(mean), band)[sample_ids].to(log_ratio.dtype)
        case "icepop":
            weights = _ratio(log_ratio) * _within(_ratio(log_ratio), band)
        case "none":
            weights = torch.ones_like(log_ratio)
        case _:
            raise ValueError(f"correction: {correction!r} is not one of {', '.join(CORRECTIONS)}")
    return torch.where(loss_mask, weights, 1.0)


def weight_sums(weights: Tensor, loss_mask: Tensor, cap: float) -> WeightSums:
    """Sums of the weights [T] over the tokens of `loss_mask` [T] bool.

    Capped are tokens whose weight is at `cap` (infinity for a correction without one), masked those whose weight is 0.
    """
    kept = weights[loss_mask].detach()
    exact = kept.double()
    return WeightSums(
        tokens=loss_mask.sum().double(),
        weight=exact.sum(),
        squared_weight=exact.square().sum(),
        capped_tokens=(kept >= cap).sum().double(),
        masked_tokens=(kept == 0).sum().double(),
        max_weight=_largest(exact),
    )


def mismatch_sums(proximal: Tensor, rollout: Tensor, loss_mask: Tensor) -> MismatchSums:
    """Sums over the tokens of `loss_mask` [T] bool; give a narrower mask to split by cause, such as staleness.

    With d = proximal - rollout: k3 is `exp(d) - 1 - d`, an unbiased estimate of KL(rollout || proximal) for tokens
    drawn from rollout (J. Schulman, "Approximating KL divergence").
    """
    # float64, because fp32 loses a k3 of 1e-7 to cancellation
    log_ratio = (proximal[loss_mask].double() - rollout[loss_mask].double()).detach()
    ratio = _ratio(log_ratio)
    return MismatchSums(
        tokens=loss_mask.sum().double(),
        k3_kl=(ratio - 1 - log_ratio).sum(),
        abs_logprob=log_ratio.abs().sum(),
        max_ratio=_largest(ratio),
    )


def _largest(values: Tensor) -> Tensor:
    return torch.cat([values, values.new_zeros(1)]).max()


def require_rollout_logprobs(rollout: Tensor) -> None:
    """Raises ValueError unless every rollout log-prob is there and finite."""
    num_bad = int((~torch.isfinite(rollout)).sum())
    if num_bad:
        raise ValueError(f"rollout_logprobs: {num_bad} of {rollout.numel()} are missing (NaN) or infinite")


def _ratio(log_ratio: Tensor) -> Tensor:
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def _within(ratio: Tensor, band: tuple[float, float]) -> Tensor:
    low, high = band
    return (ratio >= low) & (ratio <= high)


def _sample_sum(values: Tensor, sample_ids: Tensor) -> Tensor:
    # there are no more samples than tokens, so [T] slots do and the device need not be asked for S
    return torch.zeros_like(values).index_add(0, sample_ids, values)
