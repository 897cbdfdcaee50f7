"""Rewards of an evaluation -> accuracy, pass@k, their 95 % intervals. Knows nothing of how texts were sampled."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np

Z_95 = 1.959964  # standard normal quantile at 97.5 %
RESAMPLES = 2000
SOLVED = 1.0  # the least reward of a text that counts as solving its problem

Interval = tuple[float, float]


@dataclass(frozen=True)
class Estimate:
    """A mean over problems, and its 95 % interval."""

    value: float
    interval: Interval

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.value:.1%} ({low:.1%} to {high:.1%})"


@dataclass(frozen=True)
class EvalScores:
    """`EvalScores([[1.0, 0.0], [0.0, 0.0]], [1.0, 0.0])`: two samples a problem, and its greedy answer."""

    sampled: list[list[float]]
    best: list[float] | None  # None: not asked for

    @property
    def num_samples(self) -> int:
        return sum(map(len, self.sampled))

    @property
    def accuracy(self) -> float:
        """Mean reward of all samples."""
        return self.mean().value

    @property
    def greedy(self) -> float | None:
        """Mean reward of the greedy answers."""
        return None if self.best is None else fmean(self.best)

    def mean(self) -> Estimate:
        """Of the sampled answers."""
        return estimate([fmean(rewards) for rewards in self.sampled])

    def greedy_mean(self) -> Estimate | None:
        """Of the greedy ones."""
        return None if self.best is None else estimate(self.best)

    def pass_at(self, k: int) -> Estimate:
        """Share of problems that at least one of `k` samples solves; k at most the samples of a problem."""
        solved = [sum(reward >= SOLVED for reward in rewards) for rewards in self.sampled]
        return estimate([pass_at_k(len(r), c, k) for r, c in zip(self.sampled, solved, strict=True)])

    def metrics(self) -> dict[str, float | None]:
        """Under the names of `metrics.jsonl`."""
        mean = self.mean()
        return {
            "eval/accuracy": mean.value,
            "eval/accuracy_low": mean.interval[0],
            "eval/accuracy_high": mean.interval[1],
            "eval/greedy": self.greedy,
            "eval/samples": self.num_samples,
        }


def pass_at_k(n: int, c: int, k: int) -> float:
    """Chance that `k` of `n` samples drawn without replacement hold one of the `c` right ones: 1 - C(n-c,k) / C(n,k).

    Unbiased for the chance of `k` new samples (Chen et al., arXiv 2107.03374, eq. 1).
    """
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def estimate(values: Sequence[float]) -> Estimate:
    """Mean of one value a problem. Problems are what was drawn at random, so samples of one are not counted as many.

    Where every value is 0 or 1 the interval is Wilson's; else the bootstrap's over problems (percentiles, fixed seed).
    """
    mean = fmean(values)
    if set(values) <= {0.0, 1.0}:
        return Estimate(mean, wilson_interval(mean, len(values)))
    draws = np.random.default_rng(0).integers(len(values), size=(RESAMPLES, len(values)))
    low, high = np.quantile(np.asarray(values)[draws].mean(axis=1), (0.025, 0.975))
    return Estimate(mean, (float(low), float(high)))


def wilson_interval(fraction: float, count: int) -> Interval:
    """95 % interval of a binomial fraction out of `count` (E. B. Wilson, JASA 22, 1927); fits at 0 and 1 too."""
    z2 = Z_95**2 / count
    center = (fraction + z2 / 2) / (1 + z2)
    half = Z_95 / (1 + z2) * math.sqrt(fraction * (1 - fraction) / count + z2 / (4 * count))
    return max(0.0, center - half), min(1.0, center + half)
