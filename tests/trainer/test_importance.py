"""Corrections between the sampler's policy and the trainer's, and the statistics about them."""

import math

import pytest
import torch
from torch import Tensor

from flashrl_trainer.algorithm.importance import correction_weights, mismatch_sums, tis_weights, weight_sums
from flashrl_trainer.algorithm.sums import MismatchSums

LN2 = math.log(2)
# two samples: ratios 2, 1/2, 4 and 1/4, 1/4, and a last token that is not in the loss
ROLLOUT = torch.tensor([-2.0, -1.0, -3.0, -1.0, -1.0, 0.0])
PROXIMAL = ROLLOUT + LN2 * torch.tensor([1.0, -1.0, 2.0, -2.0, -2.0, 50.0])
SAMPLE_IDS = torch.tensor([0, 0, 0, 1, 1, 1])
LOSS_MASK = torch.tensor([True] * 5 + [False])


def weights(correction: str, cap: float = 2.0, band: tuple[float, float] = (0.5, 2.0)) -> list[float]:
    return correction_weights(correction, PROXIMAL, ROLLOUT, SAMPLE_IDS, LOSS_MASK, cap=cap, band=band).tolist()


@pytest.mark.parametrize(
    ("log_ratio", "cap", "weight"),
    [(0.0, 2.0, 1.0), (LN2, 8.0, 2.0), (LN2, 1.5, 1.5), (-LN2, 2.0, 0.5), (25.0, 1e12, math.exp(20)), (90.0, 2.0, 2.0)],
)
def test_tis_weight_is_the_capped_ratio(log_ratio: float, cap: float, weight: float) -> None:
    rollout = torch.tensor([-100.0], dtype=torch.float64)
    assert tis_weights(rollout + log_ratio, rollout, cap).item() == pytest.approx(weight, rel=1e-12)


def test_tiny_ratios_stop_at_minus_20() -> None:
    assert tis_weights(torch.tensor([-99.0]), torch.tensor([-1.0]), 2.0).item() == pytest.approx(math.exp(-20))


@pytest.mark.parametrize(
    ("correction", "expected"),
    [
        ("token", [2, 0.5, 2, 0.25, 0.25, 1]),  # 4 is capped
        ("sequence", [2, 2, 2, 1 / 16, 1 / 16, 1]),  # 2 * 1/2 * 4 = 4, capped; 1/16
        ("geometric", [1, 1, 1, 0, 0, 1]),  # 4 ** (1/3) = 1.59 is within the band, 1/4 is not
        ("icepop", [2, 0.5, 0, 0, 0, 1]),  # the band's ends belong to it
        ("none", [1, 1, 1, 1, 1, 1]),
    ],
)
def test_corrections(correction: str, expected: list[float]) -> None:
    # a hair of room, because exp(log 2) in float32 is not 2
    assert weights(correction, band=(0.5 - 1e-6, 2 + 1e-6)) == pytest.approx(expected, rel=1e-6)


def test_token_correction_is_tis() -> None:
    assert weights("token")[:5] == tis_weights(PROXIMAL, ROLLOUT, 2.0)[:5].tolist()


def test_an_unknown_correction_is_named() -> None:
    with pytest.raises(ValueError, match=r"correction: 'tokn' is not one of token, sequence"):
        weights("tokn")


@pytest.mark.parametrize("correction", ["token", "sequence", "geometric", "icepop", "none"])
@pytest.mark.parametrize("missing", [math.nan, -math.inf])
def test_a_missing_rollout_logprob_is_an_error_whatever_the_correction(correction: str, missing: float) -> None:
    rollout = ROLLOUT.clone()
    rollout[3] = missing
    with pytest.raises(ValueError, match=r"rollout_logprobs: 1 of 5 are missing"):
        correction_weights(correction, PROXIMAL, rollout, SAMPLE_IDS, LOSS_MASK, cap=2.0, band=(0.5, 2.0))
    with pytest.raises(ValueError, match=r"rollout_logprobs: 1 of 6 are missing"):
        tis_weights(PROXIMAL, rollout, 2.0)


def test_what_masked_tokens_hold_does_not_matter() -> None:
    rollout = ROLLOUT.clone()
    rollout[5] = math.nan
    for correction in ("token", "sequence", "geometric", "icepop", "none"):
        result = correction_weights(correction, PROXIMAL, rollout, SAMPLE_IDS, LOSS_MASK, cap=2.0, band=(0.5, 2.0))
        assert result.tolist() == weights(correction)


def test_weights_carry_no_gradient() -> None:
    proximal = PROXIMAL.clone().requires_grad_()
    for correction in ("token", "sequence", "geometric", "icepop", "none"):
        result = correction_weights(correction, proximal, ROLLOUT, SAMPLE_IDS, LOSS_MASK, cap=2.0, band=(0.5, 2.0))
        assert not result.requires_grad
    assert not tis_weights(proximal, ROLLOUT, 2.0).requires_grad


def sums(mask: Tensor) -> MismatchSums:
    return mismatch_sums(PROXIMAL, ROLLOUT, mask)


def test_mismatch_metrics_by_hand() -> None:
    expected_k3 = (2 - 1 - LN2) + (0.5 - 1 + LN2) + (4 - 1 - 2 * LN2) + 2 * (0.25 - 1 + 2 * LN2)
    assert sums(LOSS_MASK).metrics() == pytest.approx(
        {
            "mismatch/k3_kl": expected_k3 / 5,
            "mismatch/mean_abs_logprob": 8 * LN2 / 5,
            "mismatch/max_ratio": 4,
        },
        rel=1e-6,
    )


def test_a_cause_goes_before_the_names_of_its_metrics() -> None:
    second = sums(LOSS_MASK & SAMPLE_IDS.eq(1)).metrics("stale_")
    assert second == pytest.approx(
        {
            "mismatch/stale_k3_kl": 0.25 - 1 + 2 * LN2,
            "mismatch/stale_mean_abs_logprob": 2 * LN2,
            "mismatch/stale_max_ratio": 0.25,
        },
        rel=1e-6,
    )


def test_weight_metrics_by_hand() -> None:
    metrics = weight_sums(tis_weights(PROXIMAL, ROLLOUT, 2.0), LOSS_MASK, 2.0).metrics()
    assert metrics == pytest.approx(
        {
            "tis/weight_mean": (2 + 0.5 + 2 + 0.25 + 0.25) / 5,
            "tis/weight_max": 2,
            "tis/ess": 5**2 / (4 + 0.25 + 4 + 0.0625 + 0.0625) / 5,
            "tis/capped_fraction": 2 / 5,
            "tis/masked_fraction": 0,
        },
        rel=1e-6,
    )


def test_masked_tokens_are_counted_and_stay_in_the_denominator() -> None:
    icepop = torch.tensor(weights("icepop", band=(0.4, 2.1)))
    metrics = weight_sums(icepop, LOSS_MASK, math.inf).metrics()
    assert metrics["tis/masked_fraction"] == 3 / 5
    assert metrics["tis/capped_fraction"] == 0
    assert metrics["tis/weight_mean"] == pytest.approx(2.5 / 5, rel=1e-6)
    assert metrics["tis/ess"] == pytest.approx(2.5**2 / 4.25 / 5, rel=1e-6)


@pytest.mark.parametrize(("values", "ess"), [([1.0] * 4, 1.0), ([0.3] * 4, 1.0), ([2, 0, 0, 0], 0.25), ([0.0] * 4, 0)])
def test_effective_sample_size_is_the_share_of_tokens_that_count(values: list[float], ess: float) -> None:
    every = torch.ones(4, dtype=torch.bool)
    assert weight_sums(torch.tensor(values), every, math.inf).metrics()["tis/ess"] == pytest.approx(ess, rel=1e-6)


def test_k3_of_a_small_mismatch_is_half_its_square() -> None:
    # d**2 / 2 + d**3 / 6; in float32 exp(d) - 1 - d would be 0 or 1.2e-7
    rollout = torch.tensor([-0.5])
    proximal = rollout + 2.0**-12
    one = mismatch_sums(proximal, rollout, torch.ones(1, dtype=torch.bool))
    assert one.metrics()["mismatch/k3_kl"] == pytest.approx(2.0**-25 + 2.0**-36 / 6, rel=1e-6)


def test_sums_add_up_over_any_split_and_survive_a_trip_as_tensors() -> None:
    pieces = [sums(LOSS_MASK & SAMPLE_IDS.eq(sample)) for sample in (0, 1)]
    gathered = torch.stack([piece.as_tensor() for piece in pieces])
    whole = sums(LOSS_MASK).metrics()
    assert (pieces[0] + pieces[1]).metrics() == pytest.approx(whole, rel=1e-12)
    assert MismatchSums.merged(gathered.sum(0), gathered.amax(0)).metrics() == pytest.approx(whole, rel=1e-12)


def test_no_tokens_give_zeros() -> None:
    nothing = torch.zeros(6, dtype=torch.bool)
    assert set(sums(nothing).metrics().values()) == {0.0}
    assert set(weight_sums(torch.ones(6), nothing, 2.0).metrics().values()) == {0.0}
