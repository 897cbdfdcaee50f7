"""Overlong responses: soft punishment and filtering."""

import pytest
import torch

from flashrl_trainer.algorithm.advantage import group_advantages
from flashrl_trainer.algorithm.shaping import overlong_filter, soft_overlong_penalty


def test_punishment_grows_over_the_buffer_and_stays_at_the_limit() -> None:
    lengths = torch.tensor([0, 511, 512, 640, 768, 1023, 1024, 1100])
    penalty = soft_overlong_penalty(lengths, max_response_tokens=1024, buffer=512, factor=2.0)
    assert penalty.tolist() == [0, 0, 0, -0.5, -1.0, -2 * 511 / 512, -2.0, -2.0]


def test_a_buffer_of_the_whole_response_punishes_from_the_first_token() -> None:
    assert soft_overlong_penalty(torch.tensor([0, 1, 4]), 4, 4, 1.0).tolist() == [0, -0.25, -1]


@pytest.mark.parametrize("buffer", [0, -1, 1025])
def test_a_buffer_outside_the_response_is_refused(buffer: int) -> None:
    with pytest.raises(ValueError, match="overlong_buffer"):
        soft_overlong_penalty(torch.tensor([1]), 1024, buffer, 1.0)


@pytest.mark.parametrize(
    ("stays", "expected"),
    [
        (True, [0.75 / 0.500001, -0.25 / 0.500001, -0.25 / 0.500001]),  # mean 1/4 of four
        (False, [(2 / 3) / (3**-0.5 + 1e-6), (-1 / 3) / (3**-0.5 + 1e-6), (-1 / 3) / (3**-0.5 + 1e-6)]),  # 1/3 of three
    ],
)
def test_filtered_samples_leave_the_loss_and_by_choice_the_group(stays: bool, expected: list[float]) -> None:
    truncated = torch.tensor([False, False, True, False])
    in_loss, in_group = overlong_filter(truncated, stays_in_group=stays)
    assert in_loss.tolist() == [True, True, False, True]
    advantages = group_advantages(torch.tensor([1.0, 0, 0, 0]), torch.zeros(4, dtype=torch.int64), in_group)
    assert advantages[in_loss].tolist() == pytest.approx(expected, rel=1e-6)
