"""Group advantages: numbers worked by hand, and a loop over groups in float64."""

import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from flashrl_trainer.algorithm.advantage import group_advantages


def advantages(rewards: list[float], group_ids: list[int], counted: list[bool] | None = None) -> list[float]:
    mask: Tensor | None = None if counted is None else torch.tensor(counted)
    return group_advantages(torch.tensor(rewards), torch.tensor(group_ids, dtype=torch.int64), mask).tolist()


def test_one_right_of_four() -> None:
    # mean 1/4, squared deviations 9/16 + 3/16 = 3/4 over 3: deviation 1/2
    expected = [0.75 / 0.500001, -0.25 / 0.500001, -0.25 / 0.500001, -0.25 / 0.500001]
    assert advantages([1, 0, 0, 0], [0, 0, 0, 0]) == pytest.approx(expected, rel=1e-6)


def test_groups_may_be_ragged_and_interleaved() -> None:
    # group 9: 3, 1: mean 2, deviation sqrt(2); group -4: 2, 4, 6: mean 4, deviation 2
    result = advantages([3, 2, 4, 1, 6], [9, -4, -4, 9, -4])
    root = 2**0.5 + 1e-6
    assert result == pytest.approx([1 / root, -2 / 2.000001, 0, -1 / root, 2 / 2.000001], rel=1e-6)


@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1, -1e6, 1 / 3])
def test_equal_rewards_give_exactly_zero(reward: float) -> None:
    assert advantages([reward] * 7, [0] * 7) == [0.0] * 7


def test_a_group_of_one_gives_zero_and_leaves_others_alone() -> None:
    assert advantages([5, 1, 0], [0, 1, 1])[0] == 0.0
    assert advantages([5, 1, 0], [0, 1, 1])[1:] == advantages([1, 0], [1, 1])


def test_uncounted_samples_leave_mean_and_deviation_and_get_zero() -> None:
    result = advantages([1, 0, -50, 0, 0], [0, 0, 0, 0, 0], [True, True, False, True, True])
    assert result[2] == 0.0
    assert [result[i] for i in (0, 1, 3, 4)] == advantages([1, 0, 0, 0], [0] * 4)


def test_a_group_with_no_counted_sample_is_zero_not_nan() -> None:
    assert advantages([1, 0, 1, 0], [0, 0, 1, 1], [False, False, True, True])[:2] == [0.0, 0.0]


def test_no_samples_at_all() -> None:
    assert advantages([], []) == []


groups = st.lists(st.lists(st.floats(-10, 10, width=32), min_size=1, max_size=6), min_size=1, max_size=5)


@given(groups, st.randoms(use_true_random=False))
def test_matches_a_loop_in_float64_in_any_order(rewards: list[list[float]], random: object) -> None:
    expected: list[tuple[float, int, float]] = []
    for group_id, group in enumerate(rewards):
        deviation = statistics.stdev(group) if len(group) > 1 else 0.0
        mean = statistics.fmean(group)
        expected += [(reward, group_id, (reward - mean) / (deviation + 1e-6)) for reward in group]
    random.shuffle(expected)  # type: ignore[attr-defined]
    result = group_advantages(
        torch.tensor([reward for reward, _, _ in expected], dtype=torch.float64),
        torch.tensor([group_id for _, group_id, _ in expected]),
    )
    assert result.tolist() == pytest.approx([advantage for _, _, advantage in expected], abs=1e-6)
