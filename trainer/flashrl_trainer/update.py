"""Groups -> an optimizer step: advantages, corrected and clipped loss over the global token count, backward, AdamW.

The same numbers for any split into micro-batches and ranks. Knows nothing of sampling, rewards or the service.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.optim import AdamW

from flashrl_trainer.algorithm.advantage import group_advantages
from flashrl_trainer.algorithm.importance import CAPPED, correction_weights, mismatch_sums, weight_sums
from flashrl_trainer.algorithm.objective import dapo_loss_sum, loss_for_backward
from flashrl_trainer.algorithm.shaping import overlong_filter
from flashrl_trainer.algorithm.sums import ClipSums, MismatchSums, WeightSums
from flashrl_trainer.batch import (
    PackedBatch,
    TrainingSample,
    num_loss_tokens,
    num_packed_tokens,
    pack,
    reward_tensors,
    split_for_ranks,
    training_samples,
    truncated_mask,
)
from flashrl_trainer.device_meter import DeviceMeter
from flashrl_trainer.distributed import Ranks
from flashrl_trainer.flops import forward_flops, peak_flops, training_flops
from flashrl_trainer.model import Policy
from flashrl_trainer.optimizer import Optimizer
from flashrl_trainer.samples import Group
from flashrl_trainer.settings import AlgorithmSettings, OptimSettings
from flashrl_trainer.step_sums import EntropySums, LossStatistics, WorkSums, over_ranks


@dataclass
class UpdateTotals:
    """What this rank has seen in a step; updates that were skipped are in `skipped`, `tokens` and `flops` only.

    `grad_norms` and `losses` are global, one an update; `tokens` counts those of every sample in each epoch, prompts
    that samples share once a sample.
    """

    statistics: LossStatistics
    tokens: int = 0
    flops: int = 0
    skipped: int = 0
    grad_norms: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0
    peak_memory_bytes: int = 0
    peak_flops: float | None = None  # of all ranks' devices

    def metrics(self, ranks: Ranks) -> dict[str, float | None]:
        """Means over all ranks under the names of `metrics.jsonl`; loss and norm are null if no update was made."""
        work = WorkSums.of(self.tokens, self.flops, self.seconds, self.peak_memory_bytes, ranks.device)
        *parts, work_over_ranks = over_ranks([*self.statistics.parts(), work], ranks)
        assert isinstance(work_over_ranks, WorkSums)
        return {
            **LossStatistics.of(parts).metrics(),
            **work_over_ranks.metrics(self.peak_flops),
            "loss": _mean(self.losses),
            "grad_norm": _mean(self.grad_norms),
            "train/skipped_steps": self.skipped,
        }


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


class Updater:
    """Optimizer and objective of a policy."""

    def __init__(self, policy: Policy, ranks: Ranks, algorithm: AlgorithmSettings, optim: OptimSettings) -> None:
        self._policy, self._ranks, self._algorithm, self._optim = policy, ranks, algorithm, optim
        self._optimizer = Optimizer(policy.parameters(), ranks, optim)
        self._size = policy.size()
        device = torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else "cpu"
        self._peak_flops = peak_flops(device, policy.compute_dtype, ranks.world_size)

    @property
    def optimizer(self) -> AdamW:
        """For a checkpoint."""
        return self._optimizer.adamw

    def learning_rate(self, step: int) -> float:
        """Of a training step, counted from 1."""
        return self._optimizer.learning_rate(step)

    def check(self) -> None:
        """SkippedStepsError once too many updates in a row were left out; the step before it is whole."""
        self._optimizer.check()

    def step(self, groups: Sequence[Group], step: int, weight_version: int) -> UpdateTotals:
        """Learn from `groups`, `mini_batch_prompts` at a time, `update_epochs` times over.

        `weight_version` is that of the policy before the step: tokens of older ones are stale.
        """
        meter = DeviceMeter(self._ranks.device)
        self._optimizer.begin(step)
        totals = UpdateTotals(LossStatistics.zero(self._ranks.device), peak_flops=self._peak_flops)
        mini_batches = [self._mini_batch(part) for part in self._parts(groups)]
        mini_batches = [mini_batch for mini_batch in mini_batches if mini_batch.num_loss_tokens]
        if not mini_batches:
            raise ValueError("algorithm.overlong: every sample of the step was filtered; raise sampling.max_tokens")
        # with a single update the policy before it is the policy in it, and one forward serves as both
        many = len(mini_batches) * self._algorithm.update_epochs > 1
        proximal = [self._proximal(mini_batch, totals) if many else None for mini_batch in mini_batches]
        for epoch in range(self._algorithm.update_epochs):
            for mini_batch, logprobs in zip(mini_batches, proximal, strict=True):
                self._update(mini_batch, logprobs, totals, weight_version, is_first=epoch == 0)
        totals.seconds, totals.peak_memory_bytes = meter.seconds(), meter.peak_memory_bytes()
        return totals

    def _parts(self, groups: Sequence[Group]) -> Iterator[Sequence[Group]]:
        size = self._optim.mini_batch_prompts
        for start in range(0, len(groups), size):
            yield groups[start : start + size]

    def _mini_batch(self, groups: Sequence[Group]) -> "MiniBatch":
        rewards, group_ids = reward_tensors(groups)
        in_loss = counts = None
        if self._algorithm.overlong == "filter":
            in_loss, counts = overlong_filter(truncated_mask(groups), self._algorithm.filtered_in_group_mean)
        samples = training_samples(groups, group_advantages(rewards, group_ids, counts), in_loss)
        shares = split_for_ranks(samples, self._ranks.world_size, self._optim.max_tokens_per_micro_batch)
        return MiniBatch(shares[self._ranks.rank], num_loss_tokens(samples))

    @torch.no_grad()
    def _proximal(self, mini_batch: "MiniBatch", totals: UpdateTotals) -> list[Tensor]:
        totals.flops += sum(forward_flops(self._size, *shape) for shape in mini_batch.shapes())
        return [self._policy(batch)[0] for batch in mini_batch.batches(self._ranks.device)]

    def _update(
        self,
        mini_batch: "MiniBatch",
        proximal: list[Tensor] | None,
        totals: UpdateTotals,
        weight_version: int,
        *,
        is_first: bool,
    ) -> None:
        loss = torch.zeros((), dtype=torch.float64, device=self._ranks.device)
        statistics = LossStatistics.zero(self._ranks.device)
        for index, batch in enumerate(mini_batch.batches(self._ranks.device)):
            # gradients are summed over ranks once, with the last micro-batch
            self._policy.set_requires_gradient_sync(index == len(mini_batch.shares) - 1)  # type: ignore[operator]
            logprobs, entropy = self._policy(batch)
            before = logprobs.detach() if proximal is None else proximal[index]
            loss_sum, weights, clips = self._loss_sum(batch, logprobs, before)
            # without a token in the loss the sum has no gradient, and the other ranks wait for one
            anchored = loss_sum + 0.0 * logprobs.sum()
            loss_for_backward(anchored, mini_batch.num_loss_tokens, self._ranks.world_size).backward()  # type: ignore[no-untyped-call]
            loss += loss_sum.detach().double()
            statistics += self._statistics(batch, before, entropy, weights, clips, weight_version, is_first)
        totals.tokens += sum(sum(lengths) for lengths, _, _ in mini_batch.shapes())
        totals.flops += sum(training_flops(self._size, *shape) for shape in mini_batch.shapes())
        global_loss = float(self._ranks.sum(loss)) / mini_batch.num_loss_tokens
        norm = self._optimizer.update(global_loss)
        if norm is None:
            totals.skipped += 1
            return
        totals.losses.append(global_loss)
        totals.grad_norms.append(norm)
        totals.statistics += statistics

    def _loss_sum(self, batch: PackedBatch, logprobs: Tensor, before: Tensor) -> tuple[Tensor, Tensor, ClipSums]:
        """The loss's sum, the weights [T] in it, and what was clipped."""
        settings = self._algorithm
        weights = correction_weights(
            settings.correction,
            before,
            batch.rollout_logprobs,
            batch.sample_ids,
            batch.loss_mask,
            cap=settings.tis_cap,
            band=(settings.mask_low, settings.mask_high),
        )
        loss_sum, clips = dapo_loss_sum(
            logprobs,
            batch.rollout_logprobs if settings.proximal == "rollout" else before,
            batch.advantages,
            weights,
            batch.loss_mask,
            settings.clip_low,
            settings.clip_high,
            settings.dual_clip,
        )
        return loss_sum, weights, clips

    def _statistics(
        self,
        batch: PackedBatch,
        before: Tensor,
        entropy: Tensor,
        weights: Tensor,
        clips: ClipSums,
        weight_version: int,
        is_first: bool,
    ) -> LossStatistics:
        """Entropy, weights and mismatch of the first epoch, when the policy is still the one that they are about."""
        device, mask = self._ranks.device, batch.loss_mask
        if not is_first:
            none = MismatchSums.zero(device)
            return LossStatistics(EntropySums.zero(device), clips, WeightSums.zero(device), none, none, none)
        is_stale = batch.weight_versions < weight_version
        cap = self._algorithm.tis_cap if self._algorithm.correction in CAPPED else math.inf
        return LossStatistics(
            EntropySums(mask.sum().double(), entropy.double().sum()),
            clips,
            weight_sums(weights, mask, cap),
            *(
                mismatch_sums(before, batch.rollout_logprobs, tokens)
                for tokens in (mask, mask & is_stale, mask & ~is_stale)
            ),
        )


@dataclass(frozen=True)
class MiniBatch:
    """This rank's share of one optimizer step; `num_loss_tokens` counts over all ranks."""

    shares: list[list[TrainingSample]]
    num_loss_tokens: int

    def batches(self, device: torch.device) -> Iterator[PackedBatch]:
        """Its packed micro-batches on `device`."""
        return (pack(samples).to(device) for samples in self.shares)

    def shapes(self) -> Iterator[tuple[list[int], int, int]]:
        """Of each micro-batch the samples' lengths, and the number of its loss tokens and of its shared ones."""
        for samples in self.shares:
            lengths = [len(sample.token_ids) for sample in samples]
            yield lengths, num_loss_tokens(samples), sum(lengths) - num_packed_tokens(samples)
