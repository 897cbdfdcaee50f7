"""Statistics as sums, so that they add up over micro-batches and ranks. Knows nothing of how they are communicated."""

from dataclasses import dataclass, fields
from typing import ClassVar, Self

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Sums:
    """Named 0-d float64 tensors that add; those of `LARGEST` are maxima instead.

    Over ranks: `as_tensor()`, summed, and `as_tensor()`, largest, put together by `merged`.
    """

    LARGEST: ClassVar[tuple[str, ...]] = ()

    def as_tensor(self) -> Tensor:
        """[fields] float64, in field order."""
        return torch.stack([getattr(self, field.name) for field in fields(self)])

    @classmethod
    def from_tensor(cls, values: Tensor) -> Self:
        return cls(*values.unbind())

    @classmethod
    def zero(cls, device: torch.device | str = "cpu") -> Self:
        return cls.from_tensor(torch.zeros(len(fields(cls)), dtype=torch.float64, device=device))

    @classmethod
    def merged(cls, total: Tensor, largest: Tensor) -> Self:
        """From the element-wise sum and the element-wise largest of several `as_tensor()`."""
        # summing the largest ratios would report a mismatch that no token has
        is_largest = torch.tensor([field.name in cls.LARGEST for field in fields(cls)], device=total.device)
        return cls.from_tensor(torch.where(is_largest, largest, total))

    def __add__(self, other: Self) -> Self:
        mine, theirs = self.as_tensor(), other.as_tensor()
        return self.merged(mine + theirs, torch.maximum(mine, theirs))


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
class WeightSums(Sums):
    """What a correction made of the mismatch: the importance weights that multiply the loss."""

    LARGEST: ClassVar[tuple[str, ...]] = ("max_weight",)

    tokens: Tensor
    weight: Tensor
    squared_weight: Tensor
    capped_tokens: Tensor
    masked_tokens: Tensor
    max_weight: Tensor

    def metrics(self) -> dict[str, float]:
        """Means over the loss tokens; 0 where there were none.

        `tis/ess` is the effective sample size `(sum w)^2 / sum w^2` as a share of the tokens (A. Kong 1992): 1 where
        all weights are equal, 1/n where one token has it all.
        """
        tokens = max(self.tokens.item(), 1.0)
        squared = self.squared_weight.item()
        return {
            "tis/weight_mean": self.weight.item() / tokens,
            "tis/weight_max": self.max_weight.item(),
            "tis/ess": self.weight.item() ** 2 / squared / tokens if squared else 0.0,
            "tis/capped_fraction": self.capped_tokens.item() / tokens,
            "tis/masked_fraction": self.masked_tokens.item() / tokens,
        }


@dataclass(frozen=True, slots=True)
class MismatchSums(Sums):
    """How far the sampler's log-probs are from the trainer's, over all tokens or those of one cause."""

    LARGEST: ClassVar[tuple[str, ...]] = ("max_ratio",)

    tokens: Tensor
    k3_kl: Tensor
    abs_logprob: Tensor
    max_ratio: Tensor

    def metrics(self, cause: str = "") -> dict[str, float]:
        """Means over the tokens, 0 where there were none; `cause` begins the names, as in `mismatch/stale_k3_kl`."""
        tokens = max(self.tokens.item(), 1.0)
        return {
            f"mismatch/{cause}k3_kl": self.k3_kl.item() / tokens,
            f"mismatch/{cause}mean_abs_logprob": self.abs_logprob.item() / tokens,
            f"mismatch/{cause}max_ratio": self.max_ratio.item(),
        }
