"""Loss, gradient and metrics of every correction against verl's own, computed from the same random log-probs.

The numbers are in `verl_values.json`, which says which version they are of; `benchmarks/verl_values.py` writes it.
"""

import json
import math
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.helpers import shared_batch as batch

from flashrl_trainer.algorithm.advantage import group_advantages
from flashrl_trainer.algorithm.importance import CAPPED, CORRECTIONS, correction_weights, mismatch_sums, weight_sums
from flashrl_trainer.algorithm.objective import dapo_loss_sum, loss_for_backward

VALUES = json.loads((Path(__file__).parent / "verl_values.json").read_text())
EXACT = 1e-6


def ours(correction: str) -> dict[str, Any]:
    """The same under the names of metrics.jsonl, from float64 tensors."""
    rows = batch.responses()
    lengths = torch.tensor(batch.LENGTHS)
    rollout, proximal, trainer = (
        torch.tensor(list(chain.from_iterable(getattr(row, name) for row in rows)), dtype=torch.float64)
        for name in ("rollout", "proximal", "trainer")
    )
    trainer.requires_grad_()
    rewards = torch.tensor(batch.REWARDS, dtype=torch.float64)
    advantages = group_advantages(rewards, torch.tensor(batch.GROUPS)).repeat_interleave(lengths)
    sample_ids = torch.arange(len(rows)).repeat_interleave(lengths)
    mask = torch.ones(len(trainer), dtype=torch.bool)
    band = batch.SAMPLE_BAND if correction == "geometric" else batch.TOKEN_BAND
    weights = correction_weights(correction, proximal, rollout, sample_ids, mask, cap=batch.CAP, band=band)
    loss_sum, clips = dapo_loss_sum(
        trainer, proximal, advantages, weights, mask, batch.CLIP_LOW, batch.CLIP_HIGH, batch.DUAL_CLIP
    )
    loss = loss_for_backward(loss_sum, len(trainer), 1)
    (gradient,) = torch.autograd.grad(loss, trainer)
    cap = batch.CAP if correction in CAPPED else math.inf
    numbers = {"loss": loss.item(), "gradient": gradient.tolist()}
    return (
        numbers
        | mismatch_sums(proximal, rollout, mask).metrics()
        | weight_sums(weights, mask, cap).metrics()
        | clips.metrics()
    )


@pytest.mark.parametrize("correction", CORRECTIONS)
def test_loss_gradient_and_mismatch_are_verls(correction: str) -> None:
    found, verl = ours(correction), VALUES["corrections"][correction]
    assert VALUES["source"].startswith("verl 0.9.1")
    assert found["loss"] == pytest.approx(verl["loss"], rel=EXACT)
    assert found["gradient"] == pytest.approx(verl["gradient"], rel=EXACT, abs=1e-12)
    assert found["mismatch/k3_kl"] == pytest.approx(verl["k3_kl"], rel=EXACT)


@pytest.mark.parametrize("correction", ["token", "sequence", "icepop"])
def test_statistics_of_the_weights_are_verls(correction: str) -> None:
    found, verl = ours(correction), VALUES["corrections"][correction]
    assert found["tis/weight_mean"] == pytest.approx(verl["rollout_is_mean"], rel=EXACT)
    assert found["tis/ess"] == pytest.approx(verl["rollout_is_eff_sample_size"], rel=EXACT)
    if correction != "sequence":  # verl's is before the cap there, ours the weight that is used
        assert found["tis/weight_max"] == pytest.approx(verl["rollout_is_max"], rel=EXACT)


def test_shares_of_capped_and_masked_tokens_are_verls() -> None:
    values = VALUES["corrections"]
    capped = values["token"]["rollout_is_ratio_fraction_high"]
    assert ours("token")["tis/capped_fraction"] == pytest.approx(capped, rel=EXACT)
    assert ours("icepop")["tis/masked_fraction"] == pytest.approx(values["icepop"]["rollout_is_oob_ratio"], rel=EXACT)
    masked = values["geometric"]["rollout_rs_masked_fraction"]
    assert ours("geometric")["tis/masked_fraction"] == pytest.approx(masked, rel=EXACT)
    assert min(capped, masked, values["icepop"]["rollout_is_oob_ratio"]) > 0.2, "else nothing would be compared"


@pytest.mark.parametrize("correction", ["token", "sequence", "icepop", "none"])
def test_clip_fractions_are_verls(correction: str) -> None:
    found, verl = ours(correction), VALUES["corrections"][correction]
    both = found["clip/low_fraction"] + found["clip/high_fraction"]
    assert both == pytest.approx(verl["actor/pg_clipfrac"], rel=EXACT)
    assert found["clip/dual_fraction"] == pytest.approx(verl["actor/pg_clipfrac_lower"], rel=EXACT)
    assert found["clip/dual_fraction"] > 0
