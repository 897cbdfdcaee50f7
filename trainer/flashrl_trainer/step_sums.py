"""What a training step adds up over tokens, micro-batches and ranks, and the metrics that become of it.

Knows names and denominators; knows nothing of models, optimizers or where the numbers come from.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import ClassVar, Self

import torch
from torch import Tensor

from flashrl_trainer.algorithm.sums import ClipSums, MismatchSums, Sums, WeightSums
from flashrl_trainer.distributed import Ranks

STALE, FRESH = "stale_", "fresh_"
_GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class EntropySums(Sums):
    """Entropy of the trainer's distributions, in nats."""

    tokens: Tensor
    entropy: Tensor

    def metrics(self) -> dict[str, float]:
        """The mean; 0 where there were no tokens."""
        return {"entropy": self.entropy.item() / max(self.tokens.item(), 1.0)}


@dataclass(frozen=True, slots=True)
class WorkSums(Sums):
    """What a rank's update cost: tokens of forwards with gradients, model FLOPs, seconds, and memory at its most."""

    LARGEST: ClassVar[tuple[str, ...]] = ("seconds", "peak_memory_bytes")

    tokens: Tensor
    flops: Tensor
    seconds: Tensor
    peak_memory_bytes: Tensor

    @classmethod
    def of(
        cls, tokens: int, flops: float, seconds: float, peak_memory_bytes: int, device: torch.device | str = "cpu"
    ) -> Self:
        values = [tokens, flops, seconds, peak_memory_bytes]
        return cls.from_tensor(torch.tensor(values, dtype=torch.float64, device=device))

    def metrics(self, peak_flops: float | None) -> dict[str, float | None]:
        """`peak_flops` of all devices together, per second; without one there is no MFU."""
        seconds = max(self.seconds.item(), 1e-9)
        return {
            "perf/train_tokens_per_s": self.tokens.item() / seconds,
            "perf/mfu": None if peak_flops is None else self.flops.item() / seconds / peak_flops,
            "perf/peak_memory_gib": self.peak_memory_bytes.item() / _GIB,
        }


@dataclass(frozen=True, slots=True)
class LossStatistics:
    """All of them for some tokens of the loss; mismatch is given whole and by cause."""

    entropy: EntropySums
    clips: ClipSums
    weights: WeightSums
    mismatch: MismatchSums
    stale: MismatchSums  # tokens of older weights than the trainer's: staleness and quantization
    fresh: MismatchSums  # tokens of the trainer's weights: quantization and kernels alone

    @classmethod
    def zero(cls, device: torch.device | str = "cpu") -> Self:
        return cls.of([kind.zero(device) for kind in _KINDS])

    def __add__(self, other: Self) -> Self:
        return self.of([mine + theirs for mine, theirs in zip(self.parts(), other.parts(), strict=True)])

    @classmethod
    def of(cls, parts: Sequence[Sums]) -> Self:
        """The inverse of `parts`."""
        return cls(*parts)  # type: ignore[arg-type]

    def parts(self) -> list[Sums]:
        """In field order."""
        return [getattr(self, field.name) for field in fields(self)]

    def metrics(self) -> dict[str, float]:
        """Under the names of `metrics.jsonl`."""
        tokens = max(self.mismatch.tokens.item(), 1.0)
        return {
            **self.entropy.metrics(),
            **self.clips.metrics(),
            **self.weights.metrics(),
            **self.mismatch.metrics(),
            **self.fresh.metrics(FRESH),
            **self.stale.metrics(STALE),
            "mismatch/stale_fraction": self.stale.tokens.item() / tokens,
        }


_KINDS: tuple[type[Sums], ...] = (EntropySums, ClipSums, WeightSums, MismatchSums, MismatchSums, MismatchSums)


def over_ranks(parts: Sequence[Sums], ranks: Ranks) -> list[Sums]:
    """Each of `parts` over all ranks, in two collectives for all of them."""
    flat = [part.as_tensor() for part in parts]
    total, largest = ranks.sum(torch.cat(flat)), ranks.max(torch.cat(flat))
    bounds = torch.tensor([0, *(len(values) for values in flat)]).cumsum(0).tolist()
    return [
        type(part).merged(total[start:end], largest[start:end])
        for part, (start, end) in zip(parts, pairwise(bounds), strict=True)
    ]
