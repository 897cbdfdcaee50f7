"""What verl computes from `tests/helpers/shared_batch.py`, in float64, as JSON on standard output.

    python benchmarks/verl_values.py > tests/trainer/verl_values.json

Run it with the Python of an environment that has verl (`pip install verl==0.9.1`); FlashRL is not needed there. Knows
verl's functions and their arguments; knows nothing of FlashRL's.
"""

import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "helpers"))

import shared_batch as batch
from verl.trainer.ppo.core_algos import compute_grpo_outcome_advantage, compute_policy_loss_vanilla
from verl.trainer.ppo.rollout_corr_helper import (
    compute_offpolicy_metrics,
    compute_rollout_correction_weights,
    compute_rollout_rejection_mask,
)
from verl.workers.config import ActorConfig


def padded(rows: list[list[float]]) -> Tensor:
    """[S, longest] float64, zeros at the end."""
    longest = max(map(len, rows))
    return torch.tensor([row + [0.0] * (longest - len(row)) for row in rows], dtype=torch.float64)


def weights_and_mask(name: str, log_ratio: Tensor, mask: Tensor) -> tuple[Tensor | None, Tensor, dict[str, Any]]:
    """verl's weights, its mask, and its metrics for one of our corrections."""
    low, high = batch.TOKEN_BAND
    match name:
        case "token" | "sequence":
            weights, metrics = compute_rollout_correction_weights(log_ratio, mask, name, batch.CAP)
            return weights, mask, metrics
        case "icepop":
            weights, metrics = compute_rollout_correction_weights(log_ratio, mask, "token", f"{low}_{high}")
            return weights, mask, metrics
        case "geometric":
            low, high = batch.SAMPLE_BAND  # verl bounds rollout / proximal, the inverse
            kept, metrics = compute_rollout_rejection_mask(log_ratio, mask, "seq_mean_k1", f"{1 / high}_{1 / low}")
            return None, kept, metrics
    return None, mask, {}


def values(name: str) -> dict[str, Any]:
    """Loss, gradient and metrics with one correction."""
    rows = batch.responses()
    mask = padded([[1.0] * len(row.rollout) for row in rows])
    rollout, proximal = padded([row.rollout for row in rows]), padded([row.proximal for row in rows])
    trainer = padded([row.trainer for row in rows]).requires_grad_()
    rewards = torch.zeros_like(mask)
    rewards[:, 0] = torch.tensor(batch.REWARDS, dtype=torch.float64)
    advantages, _ = compute_grpo_outcome_advantage(rewards, mask, np.array(batch.GROUPS))
    weights, kept, metrics = weights_and_mask(name, proximal - rollout, mask)
    actor = ActorConfig(
        strategy="fsdp",
        rollout_n=4,
        ppo_micro_batch_size_per_gpu=1,
        clip_ratio_low=batch.CLIP_LOW,
        clip_ratio_high=batch.CLIP_HIGH,
        clip_ratio_c=batch.DUAL_CLIP,
    )
    actor.global_batch_info.update(dp_size=1, batch_num_tokens=int(mask.sum()))
    loss, clip = compute_policy_loss_vanilla(proximal, trainer, advantages, kept, "token-mean", actor, weights)
    (gradient,) = torch.autograd.grad(loss, trainer)
    mismatch = compute_offpolicy_metrics(proximal, rollout, mask)
    return {
        "loss": loss.item(),
        "gradient": gradient[mask.bool()].tolist(),
        "k3_kl": mismatch["k3_kl"],
        **{key: value for key, value in metrics.items() if key in WANTED},
        **(clip if name != "geometric" else {}),  # verl takes these over the tokens that its mask kept
    }


WANTED = ("rollout_is_mean", "rollout_is_max", "rollout_is_eff_sample_size", "rollout_is_oob_ratio")
WANTED += ("rollout_rs_masked_fraction", "rollout_is_ratio_fraction_high")


def main() -> None:
    """Print all of it as JSON."""
    source = (
        f"verl {version('verl')}, torch {torch.__version__}, float64: rollout_corr_helper, compute_policy_loss_vanilla"
    )
    found = {name: values(name) for name in ("token", "sequence", "geometric", "icepop", "none")}
    print(json.dumps({"source": source, "corrections": found}, indent=1))


if __name__ == "__main__":
    main()
