"""The band of a mask from a measured mismatch: ratios of trainer and sampler while both have the same weights.

Knows log-probs, quantiles and what the masks bound; knows nothing of services or training.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flashrl_trainer.batch import pack, split_for_ranks, training_samples
from flashrl_trainer.distributed import Ranks
from flashrl_trainer.model import Policy
from flashrl_trainer.samples import Group

QUANTILES = (0.001, 0.01, 0.5, 0.99, 0.999)
DEVIATIONS = 3.0  # of the samples' means, which are close to normal: three in a thousand lie outside


@dataclass(frozen=True)
class LogRatios:
    """`proximal - rollout`: of every response token [N], and their mean over each sample [S]; float64."""

    tokens: Tensor
    samples: Tensor


@torch.no_grad()
def measure(policy: Policy, ranks: Ranks, groups: Sequence[Group], max_tokens: int) -> LogRatios | None:
    """Of all samples in `groups`, on rank 0; None elsewhere. A collective."""
    count = sum(len(group.samples) for group in groups)
    samples = training_samples(groups, torch.zeros(count))
    found: list[Tensor] = []
    for micro_batch in split_for_ranks(samples, ranks.world_size, max_tokens)[ranks.rank]:
        batch = pack(micro_batch).to(ranks.device)
        log_ratio = (policy(batch)[0] - batch.rollout_logprobs).double().cpu()
        mask, ids = batch.loss_mask.cpu(), batch.sample_ids.cpu()
        found += [log_ratio[mask & ids.eq(sample)] for sample in range(len(micro_batch))]
    parts = [values for piece in ranks.gather(found) for values in piece if len(values)]
    return LogRatios(torch.cat(parts), torch.stack([values.mean() for values in parts])) if ranks.is_main else None


def token_band(ratios: LogRatios) -> tuple[float, float]:
    """`(mask_low, mask_high)` of `icepop`: all but two in a thousand tokens are within; 1 always is."""
    low, high = (
        torch.quantile(ratios.tokens, torch.tensor([QUANTILES[0], QUANTILES[-1]], dtype=torch.float64)).exp().tolist()
    )
    return min(low, 1.0), max(high, 1.0)


def sample_band(ratios: LogRatios) -> tuple[float, float]:
    """`(mask_low, mask_high)` of `geometric`: three deviations of the samples' mean log-ratios around their mean."""
    center, spread = ratios.samples.mean(), DEVIATIONS * ratios.samples.std(correction=0)
    return min(float((center - spread).exp()), 1.0), max(float((center + spread).exp()), 1.0)


def describe(ratios: LogRatios) -> str:
    """What was measured, and the settings that follow, as lines for a person."""
    return "\n".join(
        [
            f"ratios of {len(ratios.tokens)} tokens: {_quantiles(ratios.tokens)}",
            f"geometric means of {len(ratios.samples)} samples: {_quantiles(ratios.samples)}",
            f'suggested for algorithm.correction = "icepop": {_settings(token_band(ratios))}',
            f'suggested for algorithm.correction = "geometric": {_settings(sample_band(ratios))}',
        ]
    )


def _quantiles(log_ratios: Tensor) -> str:
    values = torch.quantile(log_ratios, torch.tensor(QUANTILES, dtype=torch.float64)).exp().tolist()
    return ", ".join(f"{share:.1%} below {value:.4f}" for share, value in zip(QUANTILES, values, strict=True))


def _settings(band: tuple[float, float]) -> str:
    return f"mask_low = {band[0]:.4f}, mask_high = {band[1]:.4f}"
