"""The DAPO surrogate, token by token, with numbers worked by hand."""

import math

import pytest
import torch
from torch import Tensor

from flashrl_trainer.algorithm.objective import dapo_loss_sum, loss_for_backward
from flashrl_trainer.algorithm.sums import ClipSums


def one_token(ratio: float, advantage: float, weight: float = 1.0) -> tuple[float, float, ClipSums]:
    """(loss, its gradient with respect to the trainer's log-prob, clip sums) of a single token."""
    trainer = torch.tensor([-1.0 + math.log(ratio)], dtype=torch.float64, requires_grad=True)
    proximal, advantages, weights = torch.tensor([[-1.0], [advantage], [weight]], dtype=torch.float64)
    loss, clips = dapo_loss_sum(trainer, proximal, advantages, weights, torch.tensor([True]), 0.2, 0.28, 10.0)
    (gradient,) = torch.autograd.grad(loss, trainer)
    return loss.item(), gradient.item(), clips


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [
        (1.0, 2.0, -2.0, -2.0),
        (1.0, -2.0, 2.0, 2.0),
        (1.27, 1.0, -1.27, -1.27),  # just inside clip-higher
        (1.29, 1.0, -1.28, 0.0),  # clipped high
        (0.1, 1.0, -0.1, -0.1),  # far below, but a good token: pull it back
        (0.81, -1.0, 0.81, 0.81),
        (0.79, -1.0, 0.8, 0.0),  # clipped low
        (1.5, -1.0, 1.5, 1.5),  # far above, and a bad token: push it down
        (9.9, -3.0, 29.7, 29.7),
        (11.0, -3.0, 30.0, 0.0),  # dual clip
        (11.0, 3.0, -3.84, 0.0),  # not for a positive advantage
        (0.5, 0.0, 0.0, 0.0),
        (math.exp(-21), 1.0, -math.exp(-20), 0.0),  # the log-ratio stops at -20
    ],
)
def test_loss_and_gradient_of_a_token(ratio: float, advantage: float, loss: float, gradient: float) -> None:
    result = one_token(ratio, advantage)
    assert result[:2] == pytest.approx((loss, gradient), rel=1e-12)


@pytest.mark.parametrize(
    ("ratio", "advantage", "low", "high", "dual"),
    [
        (0.79, -1.0, 1, 0, 0),
        (0.79, 1.0, 0, 0, 0),
        (1.29, 1.0, 0, 1, 0),
        (1.29, -1.0, 0, 0, 0),
        (10.5, -1.0, 0, 0, 1),
        (10.5, 1.0, 0, 1, 0),
        (1.0, 1.0, 0, 0, 0),
    ],
)
def test_a_token_counts_as_clipped_where_its_gradient_is_gone(
    ratio: float, advantage: float, low: int, high: int, dual: int
) -> None:
    _, gradient, clips = one_token(ratio, advantage)
    assert clips.as_tensor().tolist() == [1, low, high, dual]
    assert (gradient == 0) == bool(low + high + dual)


def test_the_weight_multiplies_after_clipping() -> None:
    assert one_token(1.29, 1.0, weight=2.0)[0] == pytest.approx(-2.56)
    assert one_token(11.0, -3.0, weight=0.5)[0] == pytest.approx(15.0)
    assert one_token(1.0, 2.0, weight=0.0)[:2] == (0.0, 0.0)


def packed(mask: Tensor, rubbish: float) -> tuple[Tensor, Tensor]:
    """The loss and gradient of four tokens; those outside `mask` hold `rubbish`."""
    trainer = torch.tensor([-1.0, -2.0, -3.0, -4.0])
    others = torch.tensor([[-1.1, -2.1, -2.9, -4.1], [1.0, -1.0, 1.0, 1.0], [1.0, 0.5, 2.0, 1.0]])
    trainer[~mask], others[:, ~mask] = rubbish, rubbish
    trainer.requires_grad_()
    proximal, advantages, weights = others
    loss, _ = dapo_loss_sum(trainer, proximal, advantages, weights, mask, 0.2, 0.28, 10.0)
    (gradient,) = torch.autograd.grad(loss, trainer)
    return loss.detach(), gradient


def test_nan_at_masked_positions_reaches_neither_loss_nor_gradient() -> None:
    mask = torch.tensor([False, True, True, False])
    loss, gradient = packed(mask, math.nan)
    assert loss.item() == pytest.approx(0.5 * math.exp(0.1) - 2 * math.exp(-0.1), rel=1e-6)
    assert gradient.tolist() == pytest.approx([0, 0.5 * math.exp(0.1), -2 * math.exp(-0.1), 0], rel=1e-6)


def test_a_micro_batch_without_loss_tokens_still_has_a_gradient_of_zero() -> None:
    # a filler micro-batch must take part in FSDP's backward collectives
    loss, gradient = packed(torch.zeros(4, dtype=torch.bool), 7.0)
    assert loss.item() == 0
    assert gradient.tolist() == [0, 0, 0, 0]


def test_proximal_logprobs_get_no_gradient() -> None:
    trainer, proximal = torch.tensor([-1.0], requires_grad=True), torch.tensor([-1.5], requires_grad=True)
    loss, _ = dapo_loss_sum(trainer, proximal, torch.ones(1), torch.ones(1), torch.tensor([True]), 0.2, 0.8, 10.0)
    gradients = torch.autograd.grad(loss, (trainer, proximal), allow_unused=True)
    assert gradients[0] is not None
    assert gradients[1] is None


def test_clip_fractions_are_of_all_loss_tokens() -> None:
    total = ClipSums.zero()
    for ratio, advantage in ((0.5, -1.0), (1.5, 1.0), (1.6, 1.0), (20.0, -1.0), (1.0, 1.0)):
        total = total + one_token(ratio, advantage)[2]
    assert total.metrics() == {"clip/low_fraction": 0.2, "clip/high_fraction": 0.4, "clip/dual_fraction": 0.2}
    assert set(ClipSums.zero().metrics().values()) == {0.0}


def test_loss_for_backward_undoes_the_average_over_ranks() -> None:
    rank_sums = torch.tensor([6.0, -2.0, 4.0])
    shares = [loss_for_backward(rank_sum, 16, 3) for rank_sum in rank_sums]
    assert torch.stack(shares).mean().item() == pytest.approx(8 / 16)


def test_no_loss_tokens_are_an_error_not_a_nan() -> None:
    with pytest.raises(ValueError, match="num_loss_tokens"):
        loss_for_backward(torch.tensor(0.0), 0, 1)
