"""Statistics as sums, so that they add up over micro-batches and ranks. Knows nothing of how they are communicated."""

from dataclasses import dataclass, fields
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Sums:
    """Named 0-d float64 tensors that add; to add over ranks, gather `as_tensor()` and add up `from_tensor` of each."""

    def as_tensor(self) -> Tensor:
        """[fields] float64, in field order."""
        return torch.stack([getattr(self, field.name) for field in fields(self)])

    @classmethod
    def from_tensor(cls, values: Tensor) -> Self:
        return cls(*values.unbind())

    @classmethod
    def zero(cls, device: torch.device | str = "cpu") -> Self:
        return cls.from_tensor(torch.zeros(len(fields(cls)), dtype=torch.float64, device=device))

    def __add__(self, other: Self) -> Self:
        return self.from_tensor(self.as_tensor() + other.as_tensor())


@dataclass(frozen=True, slots=True)
class ClipSums(Sums):
    """How often the surrogate of `objective.dapo_loss_sum` was clipped."""

    tokens: Tensor
    clipped_low: Tensor
    clipped_high: Tensor
    dual_clipped: Tensor

    def metrics(self) -> dict[str, float]:
        """Fractions of the loss tokens; 0 where there were none."""
        tokens = max(self.tokens.item(), 1.0)
        return {
            "clip/low_fraction": self.clipped_low.item() / tokens,
            "clip/high_fraction": self.clipped_high.item() / tokens,
            "clip/dual_fraction": self.dual_clipped.item() / tokens,
        }


@dataclass(frozen=True, slots=True)
class MismatchSums(Sums):
    """How far the sampler's log-probs are from the trainer's, and what the correction made of it."""

    tokens: Tensor
    weight: Tensor
    capped_tokens: Tensor
    masked_tokens: Tensor
    k3_kl: Tensor
    abs_logprob: Tensor
    max_ratio: Tensor

    def __add__(self, other: Self) -> Self:
        # summing the largest ratios would report a mismatch that no token has
        largest = torch.maximum(self.max_ratio, other.max_ratio)
        total = self.as_tensor() + other.as_tensor()
        return self.from_tensor(torch.cat([total[:-1], largest.unsqueeze(0)]))

    def metrics(self) -> dict[str, float]:
        """Means over the loss tokens; 0 where there were none."""
        tokens = max(self.tokens.item(), 1.0)
        return {
            "tis/weight_mean": self.weight.item() / tokens,
            "tis/capped_fraction": self.capped_tokens.item() / tokens,
            "tis/masked_fraction": self.masked_tokens.item() / tokens,
            "mismatch/k3_kl": self.k3_kl.item() / tokens,
            "mismatch/mean_abs_logprob": self.abs_logprob.item() / tokens,
            "mismatch/max_ratio": self.max_ratio.item(),
        }
