"""Groups -> an optimizer step: advantages, corrected and clipped loss over the global token count, backward, AdamW.

The same numbers for any split into micro-batches and ranks. Knows nothing of sampling, rewards or the service.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW

from flashrl_trainer.algorithm.advantage import group_advantages
from flashrl_trainer.algorithm.importance import correction_weights, mismatch_sums
from flashrl_trainer.algorithm.objective import dapo_loss_sum, loss_for_backward
from flashrl_trainer.algorithm.shaping import overlong_filter
from flashrl_trainer.algorithm.sums import ClipSums, MismatchSums
from flashrl_trainer.batch import (
    PackedBatch,
    TrainingSample,
    num_loss_tokens,
    pack,
    reward_tensors,
    split_for_ranks,
    training_samples,
    truncated_mask,
)
from flashrl_trainer.distributed import Ranks
from flashrl_trainer.model import Policy
from flashrl_trainer.samples import Group
from flashrl_trainer.settings import AlgorithmSettings, OptimSettings


class NonFiniteGradientError(RuntimeError):
    """The gradient norm is NaN or infinite; the optimizer step was not taken."""


@dataclass
class UpdateTotals:
    """Sums over the loss tokens that this rank has seen, mismatch and entropy in the first epoch only.

    `grad_norms` and `losses` are global, one an optimizer step; `tokens` counts those of every forward with gradients.
    """

    mismatch: MismatchSums
    clips: ClipSums
    entropy: Tensor  # 0-d float64
    tokens: int
    grad_norms: list[float]
    losses: list[float]

    def metrics(self, ranks: Ranks) -> dict[str, float]:
        """Means over all ranks under the names of `metrics.jsonl`."""
        mismatch = _over_ranks(self.mismatch, ranks)
        clips = ClipSums.from_tensor(ranks.sum(self.clips.as_tensor()))
        entropy = float(ranks.sum(self.entropy)) / max(float(mismatch.tokens), 1.0)
        steps = len(self.losses)
        return {
            **mismatch.metrics(),
            **clips.metrics(),
            "entropy": entropy,
            "loss": sum(self.losses) / steps,
            "grad_norm": sum(self.grad_norms) / steps,
        }


def _over_ranks(local: MismatchSums, ranks: Ranks) -> MismatchSums:
    largest = ranks.max(local.max_ratio)
    total = ranks.sum(local.as_tensor())
    return MismatchSums.from_tensor(torch.cat([total[:-1], largest.unsqueeze(0)]))


class Updater:
    """Optimizer and objective of a policy."""

    def __init__(self, policy: Policy, ranks: Ranks, algorithm: AlgorithmSettings, optim: OptimSettings) -> None:
        self._policy, self._ranks, self._algorithm, self._optim = policy, ranks, algorithm, optim
        self.optimizer = AdamW(
            policy.parameters(),
            lr=optim.lr,
            betas=(optim.beta1, optim.beta2),
            weight_decay=optim.weight_decay,
            fused=ranks.device.type == "cuda",
        )

    def learning_rate(self, step: int) -> float:
        """Constant after a linear warm-up; `step` counts from 1."""
        return self._optim.lr * min(1.0, step / max(1, self._optim.warmup_steps))

    def step(self, groups: Sequence[Group], step: int) -> UpdateTotals:
        """Learn from `groups`, `mini_batch_prompts` at a time, `update_epochs` times over."""
        for param_group in self.optimizer.param_groups:
            param_group["lr"] = self.learning_rate(step)
        mini_batches = [self._mini_batch(part) for part in self._parts(groups)]
        mini_batches = [mini_batch for mini_batch in mini_batches if mini_batch.num_loss_tokens]
        if not mini_batches:
            raise ValueError("algorithm.overlong: every sample of the step was filtered; raise sampling.max_tokens")
        # with a single update the policy before it is the policy in it, and one forward serves as both
        many = len(mini_batches) * self._algorithm.update_epochs > 1
        proximal = [self._proximal(mini_batch) if many else None for mini_batch in mini_batches]
        totals = self._zero_totals()
        for epoch in range(self._algorithm.update_epochs):
            for mini_batch, logprobs in zip(mini_batches, proximal, strict=True):
                self._update(mini_batch, logprobs, totals, count_mismatch=epoch == 0)
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
    def _proximal(self, mini_batch: "MiniBatch") -> list[Tensor]:
        return [self._policy(batch)[0] for batch in mini_batch.batches(self._ranks.device)]

    def _update(
        self, mini_batch: "MiniBatch", proximal: list[Tensor] | None, totals: UpdateTotals, *, count_mismatch: bool
    ) -> None:
        loss = torch.zeros((), dtype=torch.float64, device=self._ranks.device)
        for index, batch in enumerate(mini_batch.batches(self._ranks.device)):
            # gradients are summed over ranks once, with the last micro-batch
            self._policy.set_requires_gradient_sync(index == len(mini_batch.shares) - 1)  # type: ignore[operator]
            logprobs, entropy = self._policy(batch)
            before = logprobs.detach() if proximal is None else proximal[index]
            loss_sum = self._loss_sum(batch, logprobs, before, totals, count_mismatch)
            # without a token in the loss the sum has no gradient, and the other ranks wait for one
            anchored = loss_sum + 0.0 * logprobs.sum()
            loss_for_backward(anchored, mini_batch.num_loss_tokens, self._ranks.world_size).backward()  # type: ignore[no-untyped-call]
            loss += loss_sum.detach().double()
            if count_mismatch:
                totals.entropy += entropy.double().sum()
            totals.tokens += int(batch.token_ids.numel())
        totals.losses.append(float(self._ranks.sum(loss)) / mini_batch.num_loss_tokens)
        totals.grad_norms.append(self._optimizer_step())

    def _loss_sum(
        self, batch: PackedBatch, logprobs: Tensor, proximal: Tensor, totals: UpdateTotals, count_mismatch: bool
    ) -> Tensor:
        settings = self._algorithm
        weights = correction_weights(
            settings.correction,
            proximal,
            batch.rollout_logprobs,
            batch.sample_ids,
            batch.loss_mask,
            cap=settings.tis_cap,
            band=(settings.mask_low, settings.mask_high),
        )
        loss_sum, clips = dapo_loss_sum(
            logprobs,
            proximal,
            batch.advantages,
            weights,
            batch.loss_mask,
            settings.clip_low,
            settings.clip_high,
            settings.dual_clip,
        )
        totals.clips += clips
        if count_mismatch:
            totals.mismatch += mismatch_sums(
                proximal, batch.rollout_logprobs, weights, batch.loss_mask, settings.tis_cap
            )
        return loss_sum

    def _optimizer_step(self) -> float:
        norm = clip_grad_norm_(self._policy.parameters(), self._optim.max_grad_norm)
        value = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
        if not torch.isfinite(torch.tensor(value)):
            self.optimizer.zero_grad()
            raise NonFiniteGradientError(f"gradient norm is {value}; lower optim.lr or look at the last samples")
        self.optimizer.step()
        self.optimizer.zero_grad()
        return value

    def _zero_totals(self) -> UpdateTotals:
        device = self._ranks.device
        entropy = torch.zeros((), dtype=torch.float64, device=device)
        return UpdateTotals(MismatchSums.zero(device), ClipSums.zero(device), entropy, 0, [], [])


@dataclass(frozen=True)
class MiniBatch:
    """This rank's share of one optimizer step; `num_loss_tokens` counts over all ranks."""

    shares: list[list[TrainingSample]]
    num_loss_tokens: int

    def batches(self, device: torch.device) -> Iterator[PackedBatch]:
        """Its packed micro-batches on `device`."""
        return (pack(samples).to(device) for samples in self.shares)
