"""Groups with advantages -> packed micro-batches of a bounded number of tokens. Knows nothing of models or losses."""

import heapq
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import accumulate
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
    group: int | None = None  # samples of one group have the same prompt, and neighbours share it in a batch

    @property
    def num_loss_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens if self.in_loss else 0

    def shared_tokens(self, before: "TrainingSample | None") -> int:
        """How many of its tokens the sample packed before it has already: its prompt, or none."""
        is_same = before is not None and self.group is not None and self.group == before.group
        return self.num_prompt_tokens if is_same else 0


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """S samples end to end, T tokens; a log-prob at position t is that of `token_ids[t]` given its sample's prefix.

    A prompt that neighbours share is there once, before the first one's response. `rows` lists every sample with its
    prompt: E positions, of which each of the T is `kept` once, in order.
    """

    token_ids: Tensor  # [T] int64
    position_ids: Tensor  # [T] int64, from 0 in each sample
    sample_ids: Tensor  # [T] int64, 0 to S - 1; of a shared prompt the first one's
    previous: Tensor  # [T] int64, position of the token before it in its sample
    rows: Tensor  # [E] int64, positions of each sample's tokens
    kept: Tensor  # [E] bool, False for a prompt that stands with an earlier sample
    cu_seqlens: Tensor  # [S + 1] int32, where samples begin in `rows`, and E
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
    pairs = [(group, number, s.completion) for number, group in enumerate(groups) for s in group.samples]
    kept = [True] * len(pairs) if in_loss is None else in_loss.tolist()
    return [
        _training_sample(group, number, completion, advantage, keep)
        for (group, number, completion), advantage, keep in zip(pairs, advantages.tolist(), kept, strict=True)
    ]


def num_loss_tokens(samples: Sequence[TrainingSample]) -> int:
    """The loss's denominator; take it over the whole mini-batch, before it is split over ranks."""
    return sum(sample.num_loss_tokens for sample in samples)


def split_for_ranks(
    samples: Sequence[TrainingSample], num_ranks: int, max_tokens: int
) -> list[list[list[TrainingSample]]]:
    """`result[rank][micro_batch]` is a list of samples for `pack`: at most `max_tokens`, or one sample that has more.

    Tokens are balanced over ranks, those of a shared prompt counted once. Every rank gets the same number of
    micro-batches, because each is a collective under FSDP: a rank with fewer is filled up with micro-batches of two
    tokens that are not in the loss. Samples without a token in the loss are left out. Deterministic: longest first,
    ties in the order given. Raises ValueError for limits under 1.
    """
    if num_ranks < 1 or max_tokens < 1:
        raise ValueError(f"num_ranks = {num_ranks} and max_tokens = {max_tokens} must be at least 1")
    useful = [sample for sample in samples if sample.num_loss_tokens]
    # groups in one piece would leave ranks with nothing to do where there are few of them
    piece = max_tokens if num_ranks == 1 else min(max_tokens, num_packed_tokens(useful) // (4 * num_ranks))
    longest_first = sorted(_pieces(useful, piece), key=num_packed_tokens, reverse=True)
    ranks = [_micro_batches(share, max_tokens) for share in _balance(longest_first, num_ranks)]
    most = max(len(micro_batches) for micro_batches in ranks)
    return [micro_batches + [[_filler()]] * (most - len(micro_batches)) for micro_batches in ranks]


def num_packed_tokens(samples: Sequence[TrainingSample]) -> int:
    """Tokens that `pack` lays end to end."""
    return sum(len(sample.token_ids) - skipped for sample, skipped in _with_shared(samples))


def pack(samples: Sequence[TrainingSample]) -> PackedBatch:
    """Lay samples end to end, unpadded, in the order given; neighbours of one group share their prompt."""
    shared = [skipped for _, skipped in _with_shared(samples)]
    lengths = [len(sample.token_ids) for sample in samples]
    own = [length - skipped for length, skipped in zip(lengths, shared, strict=True)]
    starts = [0, *accumulate(own)]  # of what is each sample's own
    rows = _rows(samples, shared, starts)

    def laid(values: Iterable[Tensor]) -> Tensor:
        return torch.cat([value[skipped:] for value, skipped in zip(values, shared, strict=True)])

    loss_mask = laid(map(_loss_mask, samples))
    advantages = torch.tensor([sample.advantage for sample in samples], dtype=torch.float32)
    return PackedBatch(
        token_ids=laid(torch.tensor(sample.token_ids) for sample in samples),
        position_ids=laid(torch.arange(length) for length in lengths),
        sample_ids=torch.arange(len(samples)).repeat_interleave(torch.tensor(own)),
        previous=laid(torch.cat([row[:1], row[:-1]]) for row in rows),
        rows=torch.cat(rows),
        kept=torch.cat([torch.arange(n) >= skipped for n, skipped in zip(lengths, shared, strict=True)]),
        cu_seqlens=torch.tensor([0, *accumulate(lengths)], dtype=torch.int32),
        loss_mask=loss_mask,
        rollout_logprobs=laid(map(_rollout_logprobs, samples)).where(loss_mask, 0.0),
        advantages=advantages.repeat_interleave(torch.tensor(own)),
        weight_versions=laid(map(_weight_versions, samples)),
        max_sample_tokens=max(lengths),
    )


def _with_shared(samples: Sequence[TrainingSample]) -> Iterator[tuple[TrainingSample, int]]:
    """Each sample and how many of its tokens the one before it has already."""
    for before, sample in zip([None, *samples], samples, strict=False):
        yield sample, sample.shared_tokens(before)


def _rows(samples: Sequence[TrainingSample], shared: list[int], starts: list[int]) -> list[Tensor]:
    """Where each sample's tokens stand, its prompt where the first of its neighbours has it."""
    rows: list[Tensor] = []
    for sample, skipped, start in zip(samples, shared, starts, strict=False):
        own = torch.arange(start, start + len(sample.token_ids) - skipped)
        rows.append(torch.cat([rows[-1][:skipped], own]) if skipped else own)
    return rows


def _pieces(samples: Sequence[TrainingSample], max_tokens: int) -> list[list[TrainingSample]]:
    """Neighbours of one group together, up to `max_tokens` in a piece."""
    pieces: list[list[TrainingSample]] = []
    for sample in samples:
        belongs = pieces and sample.shared_tokens(pieces[-1][-1])
        if belongs and num_packed_tokens([*pieces[-1], sample]) <= max_tokens:
            pieces[-1].append(sample)
        else:
            pieces.append([sample])
    return pieces


def _training_sample(
    group: Group, number: int, completion: Completion, advantage: float, in_loss: bool
) -> TrainingSample:
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
        group=number,
    )


def _balance(longest_first: list[list[TrainingSample]], num_ranks: int) -> list[list[list[TrainingSample]]]:
    """Each piece to the rank with the fewest tokens so far: within 4/3 of the best split (Graham 1969)."""
    shares: list[list[list[TrainingSample]]] = [[] for _ in range(num_ranks)]
    loads = [(0, rank) for rank in range(num_ranks)]
    for piece in longest_first:
        load, rank = loads[0]
        shares[rank].append(piece)
        heapq.heapreplace(loads, (load + num_packed_tokens(piece), rank))
    return shares


def _micro_batches(longest_first: list[list[TrainingSample]], max_tokens: int) -> list[list[TrainingSample]]:
    """First fit, longest first: at most 11/9 of the fewest micro-batches possible, and 1 (Johnson 1973)."""
    micro_batches: list[list[TrainingSample]] = []
    room: list[int] = []
    for piece in longest_first:
        length = num_packed_tokens(piece)
        index = next((i for i, free in enumerate(room) if length <= free), len(room))
        if index == len(room):
            micro_batches.append([])
            room.append(max_tokens)
        micro_batches[index] += piece
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
