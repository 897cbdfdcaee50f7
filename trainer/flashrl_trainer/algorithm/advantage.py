"""Advantages relative to the group. Knows nothing of tokens, of shaping, or of which groups were chosen."""

import torch
from torch import Tensor

EPSILON = 1e-6


def group_advantages(rewards: Tensor, group_ids: Tensor, counts_in_group: Tensor | None = None) -> Tensor:
    """`(R - mean_g R) / (std_g R + 1e-6)` with the unbiased standard deviation (GRPO, arXiv 2402.03300; algorithm.md).

    rewards [S] float, group_ids [S] int64 in any order and with groups of any size -> [S] of the rewards' dtype
    (float32 for whole-number rewards).
    Where `counts_in_group` [S] bool is False (an overlong-filtered sample that shall not shift the mean of the others)
    the sample leaves mean and deviation, and its own advantage is 0. A group of one, or of equal rewards, has
    advantage exactly 0.
    """
    counted = torch.ones_like(group_ids, dtype=torch.bool) if counts_in_group is None else counts_in_group
    # whole-number rewards would otherwise truncate their advantages to whole numbers
    advantages = torch.zeros_like(rewards, dtype=torch.result_type(rewards, 1.0))
    # float64, because the mean of equal fp32 rewards such as 0.1 can miss them by a bit
    advantages[counted] = _standardised(rewards[counted].double(), group_ids[counted]).to(advantages.dtype)
    return advantages


def _standardised(rewards: Tensor, group_ids: Tensor) -> Tensor:
    index: Tensor  # [S] int64, each sample's group
    sizes: Tensor  # [groups] int64
    _, index, sizes = torch.unique(group_ids, return_inverse=True, return_counts=True)
    zeros = rewards.new_zeros(len(sizes))
    lowest = zeros.scatter_reduce(0, index, rewards, "amin", include_self=False)
    above_lowest = rewards - lowest[index]  # exactly 0 throughout a group of equal rewards
    mean = zeros.index_add(0, index, above_lowest) / sizes
    deviation = above_lowest - mean[index]
    squares = zeros.index_add(0, index, deviation.square())
    std = (squares / (sizes - 1).clamp(min=1)).sqrt()  # a group of one has deviation 0, so any divisor will do
    return deviation / (std[index] + EPSILON)
