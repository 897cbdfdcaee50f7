"""Advantages, weights, loss and gradient of a whole mini-batch against plain Python loops in float64.

The reference is written from the formulas alone: it knows samples, no packing, no ranks, no micro-batches. The code
under test gets the same samples through filtering, packing and any split.
"""

import math
import statistics
from dataclasses import dataclass, field
from itertools import accumulate, chain
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flashrl_trainer.algorithm.advantage import group_advantages
from flashrl_trainer.algorithm.importance import CAPPED, CORRECTIONS, correction_weights, mismatch_sums, weight_sums
from flashrl_trainer.algorithm.objective import dapo_loss_sum, loss_for_backward
from flashrl_trainer.algorithm.shaping import overlong_filter
from flashrl_trainer.algorithm.sums import ClipSums, MismatchSums, WeightSums
from flashrl_trainer.batch import (
    TrainingSample,
    num_loss_tokens,
    pack,
    reward_tensors,
    split_for_ranks,
    training_samples,
    truncated_mask,
)
from flashrl_trainer.samples import Completion, Group, Prompt, Sample

CLIP_LOW, CLIP_HIGH, DUAL_CLIP, CAP, BAND = 0.2, 0.28, 10.0, 2.0, (0.5, 3.0)


@dataclass
class Response:
    """One sample as the reference sees it; the three log-prob lists are over its response tokens."""

    reward: float
    truncated: bool
    rollout: list[float]
    proximal: list[float]
    trainer: list[float]


@dataclass
class Expected:
    """What the reference computes; lists run over responses in order, or over all their tokens."""

    num_tokens: int
    loss: float = 0.0
    k3_kl: float = 0.0
    abs_logprob: float = 0.0
    capped: int = 0
    masked: int = 0
    max_ratio: float = 0.0
    clipped: list[int] = field(default_factory=lambda: [0, 0, 0])  # low, high, dual
    advantages: list[float] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)  # 0 for tokens that are not in the loss
    gradients: list[float] = field(default_factory=list)  # with respect to the trainer's log-probs


def reference(groups: list[list[Response]], correction: str, truncated_in_group: bool) -> Expected:
    expected = Expected(sum(len(r.trainer) for r in chain(*groups) if not r.truncated))
    for group in groups:
        counted = [r.reward for r in group if truncated_in_group or not r.truncated]
        mean = statistics.fmean(counted) if counted else 0.0
        deviation = statistics.stdev(counted) if len(counted) > 1 else 0.0
        for response in group:
            counts = truncated_in_group or not response.truncated
            advantage = (response.reward - mean) / (deviation + 1e-6) if counts else 0.0
            expected.advantages.append(advantage)
            add_response(expected, response, advantage, correction)
    return expected


def add_response(expected: Expected, response: Response, advantage: float, correction: str) -> None:
    if response.truncated:
        expected.weights += [0.0] * len(response.trainer)
        expected.gradients += [0.0] * len(response.trainer)
        return
    differences = [p - r for p, r in zip(response.proximal, response.rollout, strict=True)]
    for trainer, proximal, difference in zip(response.trainer, response.proximal, differences, strict=True):
        token_weight = weight(correction, difference, differences)
        loss, gradient, clipped = surrogate(trainer - proximal, advantage)
        expected.loss += token_weight * loss / expected.num_tokens
        expected.k3_kl += (math.exp(difference) - 1 - difference) / expected.num_tokens
        expected.abs_logprob += abs(difference) / expected.num_tokens
        expected.capped += correction in ("token", "sequence") and token_weight == CAP
        expected.masked += token_weight == 0
        expected.max_ratio = max(expected.max_ratio, math.exp(difference))
        expected.clipped = [a + b for a, b in zip(expected.clipped, clipped, strict=True)]
        expected.weights.append(token_weight)
        expected.gradients.append(token_weight * gradient / expected.num_tokens)


def weight(correction: str, difference: float, differences: list[float]) -> float:
    ratio, mean_ratio = math.exp(difference), math.exp(statistics.fmean(differences))
    if correction == "token":
        return min(ratio, CAP)
    if correction == "sequence":
        return min(math.exp(max(-20.0, min(20.0, sum(differences)))), CAP)
    if correction == "geometric":
        return 1.0 if BAND[0] <= mean_ratio <= BAND[1] else 0.0
    if correction == "icepop":
        return ratio if BAND[0] <= ratio <= BAND[1] else 0.0
    return 1.0


def surrogate(difference: float, advantage: float) -> tuple[float, float, list[int]]:
    """Loss, its derivative by the trainer's log-prob, and whether it was clipped low, high or by the dual clip."""
    ratio = math.exp(difference)
    if advantage > 0 and ratio > 1 + CLIP_HIGH:
        return -(1 + CLIP_HIGH) * advantage, 0.0, [0, 1, 0]
    if advantage < 0 and ratio < 1 - CLIP_LOW:
        return -(1 - CLIP_LOW) * advantage, 0.0, [1, 0, 0]
    if advantage < 0 and ratio > DUAL_CLIP:
        return -DUAL_CLIP * advantage, 0.0, [0, 0, 1]
    return -ratio * advantage, -ratio * advantage, [0, 0, 0]


@dataclass
class Actual:
    """The same from the code under test, from any split over ranks and micro-batches."""

    advantages: list[float]
    weights: list[float]
    gradients: list[float]
    loss: float
    clips: ClipSums
    mismatch: MismatchSums
    weight_sums: WeightSums


def train(
    groups: list[list[Response]],
    correction: str,
    truncated_in_group: bool,
    num_ranks: int = 1,
    max_tokens: int = 10**6,
    dtype: torch.dtype = torch.float64,
) -> Actual:
    records, responses = as_groups(groups), list(chain(*groups))
    in_loss, in_group = overlong_filter(truncated_mask(records), truncated_in_group)
    advantages = group_advantages(*reward_tensors(records), in_group)
    samples = training_samples(records, advantages, in_loss)
    num_tokens = num_loss_tokens(samples)
    # slot 0 stands for every position that is not in the loss: what it holds must not matter
    trainer = torch.tensor([math.nan, *chain(*(r.trainer for r in responses))], dtype=dtype, requires_grad=True)
    proximal = torch.tensor([math.nan, *chain(*(r.proximal for r in responses))], dtype=dtype)
    starts = [0, *accumulate((len(r.trainer) for r in responses), initial=1)]  # by sample number
    all_weights, loss = torch.zeros_like(proximal), 0.0
    clips, mismatch, total_weights = ClipSums.zero(), MismatchSums.zero(), WeightSums.zero()
    cap = CAP if correction in CAPPED else math.inf
    for micro_batch in chain(*split_for_ranks(samples, num_ranks, max_tokens)):
        batch, slots = pack(micro_batch), slots_of(micro_batch, starts)
        mask, rollout, ids = batch.loss_mask, batch.rollout_logprobs, batch.sample_ids
        weights = correction_weights(correction, proximal[slots], rollout, ids, mask, cap=CAP, band=BAND)
        loss_sum, more_clips = dapo_loss_sum(
            trainer[slots], proximal[slots], batch.advantages, weights, mask, CLIP_LOW, CLIP_HIGH, DUAL_CLIP
        )
        (loss_for_backward(loss_sum, num_tokens, num_ranks) / num_ranks).backward()  # type: ignore[no-untyped-call]
        loss += loss_sum.item() / num_tokens
        clips, mismatch = clips + more_clips, mismatch + mismatch_sums(proximal[slots], rollout, mask)
        total_weights += weight_sums(weights, mask, cap)
        all_weights[slots[mask]] = weights[mask]
    assert trainer.grad is not None
    gradients = trainer.grad[1:].tolist()
    return Actual(advantages.tolist(), all_weights[1:].tolist(), gradients, loss, clips, mismatch, total_weights)


def as_groups(groups: list[list[Response]]) -> list[Group]:
    """Every response token is its sample's number, from 1, so that a packed sample can be told."""
    numbers = iter(range(1, 1 + sum(map(len, groups))))
    return [
        Group(Prompt(f"p{index}", "", ""), [77] * (index % 3 + 1), [as_sample(r, next(numbers)) for r in group], 0)
        for index, group in enumerate(groups)
    ]


def as_sample(response: Response, number: int) -> Sample:
    finish_reason = "length" if response.truncated else "stop"
    completion = Completion([number] * len(response.rollout), response.rollout, "", finish_reason, [])
    return Sample(completion, response.reward, response.reward)


def slots_of(micro_batch: list[TrainingSample], starts: list[int]) -> torch.Tensor:
    """For each packed token the position of its log-prob in the flat tensors; 0 in prompts and fillers."""
    slots: list[int] = []
    for before, sample in zip([None, *micro_batch], micro_batch, strict=False):
        start = starts[sample.token_ids[-1]]
        num_response_tokens = len(sample.token_ids) - sample.num_prompt_tokens
        slots += [0] * (sample.num_prompt_tokens - sample.shared_tokens(before))
        slots += range(start, start + num_response_tokens) if start else [0] * num_response_tokens
    return torch.tensor(slots)


def assert_equal(actual: Actual, expected: Expected, tolerance: float = 1e-6) -> None:
    def approx(value: float | list[float]) -> object:
        return pytest.approx(value, rel=tolerance, abs=tolerance / 10)

    assert actual.advantages == approx(expected.advantages)
    assert actual.weights == approx(expected.weights)
    assert actual.gradients == approx(expected.gradients)
    assert actual.loss == approx(expected.loss)
    assert actual.clips.as_tensor().tolist() == [expected.num_tokens, *expected.clipped]
    metrics = actual.mismatch.metrics()
    assert metrics["mismatch/k3_kl"] == approx(expected.k3_kl)
    assert metrics["mismatch/max_ratio"] == approx(expected.max_ratio)
    assert metrics["mismatch/mean_abs_logprob"] == approx(expected.abs_logprob)
    weights = actual.weight_sums.metrics()
    squares = math.fsum(w * w for w in expected.weights)
    assert weights["tis/weight_mean"] == approx(sum(expected.weights) / expected.num_tokens)
    assert weights["tis/weight_max"] == approx(max(expected.weights))
    assert weights["tis/ess"] == approx(sum(expected.weights) ** 2 / squares / expected.num_tokens if squares else 0.0)
    assert weights["tis/masked_fraction"] * expected.num_tokens == pytest.approx(expected.masked)
    assert weights["tis/capped_fraction"] * expected.num_tokens == pytest.approx(expected.capped)


def random_groups(shapes: list[list[int]], seed: int) -> list[list[Response]]:
    """`shapes[group][sample]` is a response's length; values are exact in float32. The first is never truncated."""
    random = Random(seed)
    groups = [[random_response(random, length) for length in group] for group in shapes]
    groups[0][0].truncated = False
    return groups


def random_response(random: Random, length: int) -> Response:
    rollout = [random.uniform(-4, 0) for _ in range(length)]
    proximal = [logprob + random.gauss(0, 0.7) for logprob in rollout]
    trainer = [logprob + random.gauss(0, 1.2) for logprob in proximal]
    exact: list[list[float]] = [torch.tensor(values).tolist() for values in (rollout, proximal, trainer)]
    return Response(random.choice([0.0, 1.0, -0.5]), random.random() < 0.25, *exact)


RAGGED = [[3, 17, 1, 30], [8], [5, 5], [40, 2, 11, 6, 23], [9, 14, 1]]


@pytest.mark.parametrize("truncated_in_group", [True, False])
@pytest.mark.parametrize("correction", CORRECTIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_ragged_mini_batch_in_any_split(dtype: torch.dtype, correction: str, truncated_in_group: bool) -> None:
    groups = random_groups(RAGGED, seed=5)
    expected = reference(groups, correction, truncated_in_group)
    for num_ranks, max_tokens in ((1, 10**6), (1, 30), (2, 50), (3, 1), (16, 64)):
        assert_equal(train(groups, correction, truncated_in_group, num_ranks, max_tokens, dtype), expected)


def test_the_ragged_mini_batch_meets_every_branch() -> None:
    groups = random_groups(RAGGED, seed=5)
    token, icepop = reference(groups, "token", True), reference(groups, "icepop", True)
    assert min(token.clipped) > 0
    assert CAP in token.weights
    assert any(w == 0 < capped for w, capped in zip(icepop.weights, token.weights, strict=True))
    assert {r.truncated for r in chain(*groups)} == {True, False}


shapes = st.lists(st.lists(st.integers(1, 12), min_size=1, max_size=5), min_size=1, max_size=5)


@settings(max_examples=60, deadline=None)
@given(
    shapes, st.integers(0, 2**32), st.sampled_from(CORRECTIONS), st.booleans(), st.integers(1, 4), st.integers(1, 60)
)
def test_any_shape_in_any_split(
    shapes: list[list[int]], seed: int, correction: str, truncated_in_group: bool, num_ranks: int, max_tokens: int
) -> None:
    groups = random_groups(shapes, seed)
    actual = train(groups, correction, truncated_in_group, num_ranks, max_tokens)
    assert_equal(actual, reference(groups, correction, truncated_in_group))


def test_a_mean_of_means_would_be_another_loss() -> None:
    groups = random_groups(RAGGED, seed=5)
    expected = reference(groups, "token", True)
    means = [reference([group], "token", True).loss for group in groups if any(not r.truncated for r in group)]
    assert statistics.fmean(means) != pytest.approx(expected.loss, rel=0.01)
