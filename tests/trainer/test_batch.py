"""Packing: what stands where, and that splitting over ranks and micro-batches loses and doubles nothing."""

import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flashrl_trainer.batch import (
    TrainingSample,
    num_loss_tokens,
    num_packed_tokens,
    pack,
    reward_tensors,
    split_for_ranks,
    training_samples,
    truncated_mask,
)
from flashrl_trainer.samples import Completion, Group, Prompt, Sample, WeightSpan


def group(prompt_token_ids: list[int], *responses: tuple[list[int], list[float], str]) -> Group:
    samples = [
        Sample(Completion(token_ids, logprobs, "", finish, [(3, 0, len(token_ids))]), index, index / 2)
        for index, (token_ids, logprobs, finish) in enumerate(responses)
    ]
    return Group(Prompt("gsm8k/train/17", "text", "72"), prompt_token_ids, samples, 3)


GROUPS = [
    group([5, 6, 7], ([8, 2], [-0.5, -0.25], "stop"), ([9, 9, 9], [-1.0, -2.0, -3.0], "length")),
    group([4], ([2], [-0.125], "stop")),
]


def test_rewards_and_groups_are_read_in_order() -> None:
    rewards, group_ids = reward_tensors(GROUPS)
    assert rewards.tolist() == [0, 0.5, 0]  # the shaped ones
    assert group_ids.tolist() == [0, 0, 1]
    assert truncated_mask(GROUPS).tolist() == [False, True, False]


def test_a_packed_batch_token_by_token() -> None:
    in_loss = torch.tensor([True, False, True])
    samples = training_samples(GROUPS, torch.tensor([0.5, -0.5, 2.0]), in_loss)
    batch = pack([replace(one, group=None) for one in samples])
    t, f = True, False
    assert batch.token_ids.tolist() == [5, 6, 7, 8, 2, 5, 6, 7, 9, 9, 9, 4, 2]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 0, 1]
    assert batch.sample_ids.tolist() == [0] * 5 + [1] * 6 + [2] * 2
    assert batch.previous.tolist() == [0, 0, 1, 2, 3, 5, 5, 6, 7, 8, 9, 11, 11]
    assert batch.rows.tolist() == list(range(13))
    assert batch.kept.all()
    assert batch.cu_seqlens.tolist() == [0, 5, 11, 13]
    assert batch.loss_mask.tolist() == [f, f, f, t, t, f, f, f, f, f, f, f, t]
    assert batch.rollout_logprobs.tolist() == [0, 0, 0, -0.5, -0.25, 0, 0, 0, 0, 0, 0, 0, -0.125]
    assert batch.advantages.tolist() == [0.5] * 5 + [-0.5] * 6 + [2.0] * 2
    assert batch.weight_versions.tolist() == [-1, -1, -1, 3, 3, -1, -1, -1, 3, 3, 3, -1, 3]
    assert batch.max_sample_tokens == 6
    dtypes = [batch.token_ids.dtype, batch.position_ids.dtype, batch.sample_ids.dtype, batch.weight_versions.dtype]
    assert dtypes == [torch.int64] * 4
    assert (batch.cu_seqlens.dtype, batch.loss_mask.dtype) == (torch.int32, torch.bool)
    assert (batch.rollout_logprobs.dtype, batch.advantages.dtype) == (torch.float32, torch.float32)


def test_neighbours_of_a_group_share_their_prompt() -> None:
    samples = training_samples(GROUPS, torch.tensor([0.5, -0.5, 2.0]))
    assert num_packed_tokens(samples) == 10
    batch = pack(samples)
    t, f = True, False
    assert batch.token_ids.tolist() == [5, 6, 7, 8, 2, 9, 9, 9, 4, 2]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 4, 3, 4, 5, 0, 1]
    assert batch.sample_ids.tolist() == [0] * 5 + [1] * 3 + [2] * 2
    assert batch.previous.tolist() == [0, 0, 1, 2, 3, 2, 5, 6, 8, 8]  # the second response begins after the prompt
    assert batch.rows.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 5, 6, 7, 8, 9]
    assert batch.kept.tolist() == [t] * 5 + [f, f, f, t, t, t] + [t, t]
    assert batch.rows[batch.kept].tolist() == list(range(10))
    assert batch.cu_seqlens.tolist() == [0, 5, 11, 13]
    assert batch.loss_mask.tolist() == [f, f, f, t, t, t, t, t, f, t]
    assert batch.rollout_logprobs.tolist() == [0, 0, 0, -0.5, -0.25, -1, -2, -3, 0, -0.125]
    assert batch.advantages.tolist() == [0.5] * 5 + [-0.5] * 3 + [2.0] * 2
    assert batch.weight_versions.tolist() == [-1, -1, -1, 3, 3, 3, 3, 3, -1, 3]
    assert batch.max_sample_tokens == 6


def test_a_shared_prompt_counts_once_against_the_budget() -> None:
    first, second, third = training_samples(GROUPS, torch.zeros(3))  # 3 + 2, 3 + 3 and 1 + 1 tokens
    assert split_for_ranks([first, second, third], 1, 10) == [[[first, second, third]]]
    assert split_for_ranks([first, second, third], 1, 9) == [[[first, second], [third]]]
    assert split_for_ranks([first, second, third], 1, 7) == [[[second], [first, third]]]


def test_a_group_is_cut_up_where_ranks_would_have_nothing_to_do() -> None:
    samples = [replace(sample(3, 5, name=name), group=0) for name in range(4)]
    assert [[len(each) for each in rank] for rank in split_for_ranks(samples, 2, 100)] == [[2], [2]]


def test_every_token_knows_the_version_that_drew_it() -> None:
    spans: list[WeightSpan] = [(11, 0, 1), (12, 1, 3)]
    batch = pack([TrainingSample([1, 2, 3, 4, 5], 2, [-1.0] * 3, spans, 0.0, True)])
    assert batch.weight_versions.tolist() == [-1, -1, 11, 12, 12]


def test_moving_moves_every_tensor_and_keeps_the_rest() -> None:
    batch = pack(training_samples(GROUPS, torch.zeros(3))).to("meta")
    assert {value.device.type for value in (batch.token_ids, batch.loss_mask, batch.cu_seqlens)} == {"meta"}
    assert batch.max_sample_tokens == 6


def test_num_loss_tokens_counts_responses_in_the_loss() -> None:
    assert num_loss_tokens(training_samples(GROUPS, torch.zeros(3))) == 6
    assert num_loss_tokens(training_samples(GROUPS, torch.zeros(3), torch.tensor([True, False, True]))) == 3


@pytest.mark.parametrize("logprobs", [[], [-0.5], [-0.5, -0.5, -0.5], [-0.5, math.nan], [-math.inf, -0.5]])
def test_missing_rollout_logprobs_are_an_error_that_names_the_prompt(logprobs: list[float]) -> None:
    with pytest.raises(ValueError, match=r"prompt gsm8k/train/17: rollout logprobs are missing: .* for 2 response"):
        training_samples([group([1], ([8, 2], logprobs, "stop"))], torch.zeros(1))


def test_a_prompt_without_tokens_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"prompt gsm8k/train/17: prompt_token_ids is empty"):
        training_samples([group([], ([2], [-1.0], "stop"))], torch.zeros(1))


def test_as_many_advantages_as_samples() -> None:
    with pytest.raises(ValueError, match="shorter"):
        training_samples(GROUPS, torch.zeros(2))


def sample(prompt: int, response: int, in_loss: bool = True, name: int = 0) -> TrainingSample:
    token_ids = [name] * (prompt + response)
    return TrainingSample(token_ids, prompt, [-1.0] * response, [(3, 0, response)], 1.0, in_loss)


def lengths(micro_batches: list[list[TrainingSample]]) -> list[list[int]]:
    return [[len(one.token_ids) for one in micro_batch] for micro_batch in micro_batches]


def test_micro_batches_are_filled_longest_first() -> None:
    samples = [sample(1, n - 1) for n in (3, 9, 4, 6, 12, 2)]
    assert lengths(split_for_ranks(samples, 1, 10)[0]) == [[12], [9], [6, 4], [3, 2]]


def test_ranks_get_balanced_tokens_and_equally_many_micro_batches() -> None:
    samples = [sample(1, n - 1) for n in (9, 3, 3, 3)]
    first, second = split_for_ranks(samples, 2, 4)
    assert (lengths(first), lengths(second)) == ([[9], [2], [2]], [[3], [3], [3]])
    filler = pack(first[1])
    assert not filler.loss_mask.any()
    assert num_loss_tokens(first[1] + first[2]) == 0


def test_a_rank_without_samples_still_takes_part() -> None:
    assert [lengths(rank) for rank in split_for_ranks([sample(2, 3)], 3, 8)] == [[[5]], [[2]], [[2]]]


def test_samples_with_nothing_to_learn_cost_no_forward() -> None:
    samples = [sample(2, 3, in_loss=False), sample(2, 0), sample(2, 2)]
    assert lengths(split_for_ranks(samples, 1, 100)[0]) == [[4]]
    assert split_for_ranks(samples[:2], 2, 100) == [[], []]


@pytest.mark.parametrize(("num_ranks", "max_tokens"), [(0, 8), (1, 0)])
def test_limits_below_one_are_refused(num_ranks: int, max_tokens: int) -> None:
    with pytest.raises(ValueError, match="must be at least 1"):
        split_for_ranks([], num_ranks, max_tokens)


shapes = st.lists(st.tuples(st.integers(1, 5), st.integers(0, 20), st.booleans()), max_size=20)


@given(shapes, st.integers(1, 5), st.integers(1, 40))
def test_a_split_keeps_every_sample_once_within_the_budget(
    shapes: list[tuple[int, int, bool]], num_ranks: int, max_tokens: int
) -> None:
    samples = [sample(*shape, name=name) for name, shape in enumerate(shapes, start=1)]
    ranks = split_for_ranks(samples, num_ranks, max_tokens)
    assert len({len(rank) for rank in ranks}) == 1
    assert all(micro_batch for rank in ranks for micro_batch in rank)
    for micro_batch in lengths([micro_batch for rank in ranks for micro_batch in rank]):
        assert sum(micro_batch) <= max_tokens or len(micro_batch) == 1
    placed = Counter(one.token_ids[0] for rank in ranks for micro_batch in rank for one in micro_batch)
    placed.pop(0, None)  # fillers
    assert placed == Counter(one.token_ids[0] for one in samples if one.num_loss_tokens)
    assert num_loss_tokens([one for rank in ranks for micro in rank for one in micro]) == num_loss_tokens(samples)
    assert split_for_ranks(samples, num_ranks, max_tokens) == ranks
