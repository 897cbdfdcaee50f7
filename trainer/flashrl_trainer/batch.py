"""Groups with advantages -> packed micro-batches of a bounded number of tokens. Knows nothing of models or losses."""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import accumulate, chain
from typing import Any

import torch
from torch import Tensor

from flashrl_trainer.samples import Completion, Group, WeightSpan

NO_VERSION = -1  # weight version of prompt tokens, which no policy drew


@dataclass(frozen=True, slots=True)
class TrainingSample:
    """One prompt and one response: `TrainingSample([5, 6, 9, 2], 2, [-0.1, -0.7], [(12, 0, 2)], 0.9, True)`."""

    token_ids: list[int]  # prompt, then response with its end token
    num_prompt_tokens: int  # at least 1: the first token of a sample has no prefix to be predicted from
    rollout_logprobs: list[float]  # one a response token
    weight_versions: list[WeightSpan]
    advantage: float
    in_loss: bool

    @property
    def num_loss_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens if self.in_loss else 0


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """S samples end to end, T tokens; a log-prob at position t is that of `token_ids[t]` given its sample's prefix."""

    token_ids: Tensor  # [T] int64
    position_ids: Tensor  # [T] int64, from 0 in each sample
    sample_ids: Tensor  # [T] int64, 0 to S - 1
    cu_seqlens: Tensor  # [S + 1] int32, where samples begin, and T
    loss_mask: Tensor  # [T] bool, True for response tokens in the loss, end token included; never at position 0
    rollout_logprobs: Tensor  # [T] float32, 0 where loss_mask is False
    advantages: Tensor  # [T] float32
    weight_versions: Tensor  # [T] int64, which weights drew the token; NO_VERSION in prompts
    max_sample_tokens: int

    def to(self, device: torch.device | str) -> "PackedBatch":
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        moved = {name: value.to(device) for name, value in values.items() if isinstance(value, Tensor)}
        return PackedBatch(**(values | moved))


def reward_tensors(groups: Sequence[Group]) -> tuple[Tensor, Tensor]:
    """`(shaped rewards [S] float32, group_ids [S] int64)` of all samples in order, for `group_advantages`."""
    rewards = [sample.shaped_reward for group in groups for sample in group.samples]
    group_ids = [index for index, group in enumerate(groups) for _ in group.samples]
    return torch.tensor(rewards, dtype=torch.float32), torch.tensor(group_ids, dtype=torch.int64)


def truncated_mask(groups: Sequence[Group]) -> Tensor:
    """[S] bool: which samples the response limit cut, for `overlong_filter`."""
    return torch.tensor([s.completion.truncated for group in groups for s in group.samples], dtype=torch.bool)


def training_samples(
    groups: Sequence[Group], advantages: Tensor, in_loss: Tensor | None = None
) -> list[TrainingSample]:
    """Pair each sample, in order, with its advantage [S] and whether it is in the loss ([S] bool, all of them if None).

    Raises ValueError, naming the prompt, where rollout log-probs are missing or not finite, or a prompt has no tokens.
    """
    pairs = [(group, sample.completion) for group in groups for sample in group.samples]
    kept = [True] * len(pairs) if in_loss is None else in_loss.tolist()
    return [
        _training_sample(group, completion, advantage, keep)
        for (group, completion), advantage, keep in zip(pairs, advantages.tolist(), kept, strict=True)
    ]


def num_loss_tokens(samples: Sequence[TrainingSample]) -> int:
    """The loss's denominator; take it over the whole mini-batch, before it is split over ranks."""
    return sum(sample.num_loss_tokens for sample in samples)


def split_for_ranks(
    samples: Sequence[TrainingSample], num_ranks: int, max_tokens: int
) -> list[list[list[TrainingSample]]]:
    """`result[rank][micro_batch]` is a list of samples for `pack`: at most `max_tokens`, or one sample that has more.

    Tokens are balanced over ranks. Every rank gets the same number of micro-batches, because each is a collective under
    FSDP: a rank with fewer is filled up with micro-batches of two tokens that are not in the loss. Samples without a
    token in the loss are left out. Deterministic: longest first, ties in the order given. Raises ValueError for limits
    under 1.
    """
    if num_ranks < 1 or max_tokens < 1:
        raise ValueError(f"num_ranks = {num_ranks} and max_tokens = {max_tokens} must be at least 1")
    useful = [sample for sample in samples if sample.num_loss_tokens]
    longest_first = sorted(useful, key=lambda sample: -len(sample.token_ids))
    ranks = [_micro_batches(share, max_tokens) for share in _balance(longest_first, num_ranks)]
    most = max(len(micro_batches) for micro_batches in ranks)
    return [micro_batches + [[_filler()]] * (most - len(micro_batches)) for micro_batches in ranks]


def pack(samples: Sequence[TrainingSample]) -> PackedBatch:
    """Lay samples end to end, unpadded, in the order given."""
    lengths = [len(sample.token_ids) for sample in samples]
    counts = torch.tensor(lengths)
    advantages = torch.tensor([sample.advantage for sample in samples], dtype=torch.float32)
    loss_mask = torch.cat([_loss_mask(sample) for sample in samples])
    return PackedBatch(
        token_ids=torch.tensor(list(chain.from_iterable(sample.token_ids for sample in samples))),
        position_ids=torch.cat([torch.arange(length) for length in lengths]),
        sample_ids=torch.arange(len(samples)).repeat_interleave(counts),
        cu_seqlens=torch.tensor([0, *accumulate(lengths)], dtype=torch.int32),
        loss_mask=loss_mask,
        rollout_logprobs=torch.cat([_rollout_logprobs(sample) for sample in samples]).where(loss_mask, 0.0),
        advantages=advantages.repeat_interleave(counts),
        weight_versions=torch.cat([_weight_versions(sample) for sample in samples]),
        max_sample_tokens=max(lengths),
    )


def _training_sample(group: Group, completion: Completion, advantage: float, in_loss: bool) -> TrainingSample:
    if not group.prompt_token_ids:
        raise ValueError(f"prompt {group.prompt.id}: prompt_token_ids is empty")
    num_logprobs = sum(map(math.isfinite, completion.logprobs))
    if not num_logprobs == len(completion.logprobs) == len(completion.token_ids):
        raise ValueError(
            f"prompt {group.prompt.id}: rollout logprobs are missing: "
            f"{num_logprobs} finite ones for {len(completion.token_ids)} response tokens"
        )
    return TrainingSample(
        token_ids=group.prompt_token_ids + completion.token_ids,
        num_prompt_tokens=len(group.prompt_token_ids),
        rollout_logprobs=completion.logprobs,
        weight_versions=completion.weight_versions,
        advantage=advantage,
        in_loss=in_loss,
    )


def _balance(longest_first: list[TrainingSample], num_ranks: int) -> list[list[TrainingSample]]:
    """Each sample to the rank with the fewest tokens so far: within 4/3 of the best split (Graham 1969)."""
    shares: list[list[TrainingSample]] = [[] for _ in range(num_ranks)]
    loads = [(0, rank) for rank in range(num_ranks)]
    for sample in longest_first:
        load, rank = loads[0]
        shares[rank].append(sample)
        heapq.heapreplace(loads, (load + len(sample.token_ids), rank))
    return shares


def _micro_batches(longest_first: list[TrainingSample], max_tokens: int) -> list[list[TrainingSample]]:
    """First fit, longest first: at most 11/9 of the fewest micro-batches possible, and 1 (Johnson 1973)."""
    micro_batches: list[list[TrainingSample]] = []
    room: list[int] = []
    for sample in longest_first:
        length = len(sample.token_ids)
        index = next((i for i, free in enumerate(room) if length <= free), len(room))
        if index == len(room):
            micro_batches.append([])
            room.append(max_tokens)
        micro_batches[index].append(sample)
        room[index] -= length
    return micro_batches


def _filler() -> TrainingSample:
    # two tokens, so that next-token log-probs are not of an empty tensor; id 0 is in every vocabulary
    return TrainingSample([0, 0], 1, [0.0], [], 0.0, in_loss=False)


def _loss_mask(sample: TrainingSample) -> Tensor:
    mask = torch.zeros(len(sample.token_ids), dtype=torch.bool)
    mask[sample.num_prompt_tokens :] = sample.in_loss
    return mask


def _rollout_logprobs(sample: TrainingSample) -> Tensor:
    return torch.cat(
        [torch.zeros(sample.num_prompt_tokens), torch.tensor(sample.rollout_logprobs, dtype=torch.float32)]
    )


def _weight_versions(sample: TrainingSample) -> Tensor:
    versions = torch.full((len(sample.token_ids),), NO_VERSION)
    for version, start, end in sample.weight_versions:
        versions[sample.num_prompt_tokens + start : sample.num_prompt_tokens + end] = version
    return versions
