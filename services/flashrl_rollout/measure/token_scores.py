"""Tokens sampled from a model, their log-probs under it and under others, and how far the two are apart.

Knows Hugging Face models and token ids; knows nothing of precisions or layers.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_BATCH_TOKENS = 2048
_SAMPLING_BATCH = 64


@dataclass(frozen=True)
class ScoredText:
    """A sequence of tokens, of which those from `start` on count; `start` is at least 1."""

    token_ids: tuple[int, ...]
    start: int

    @property
    def num_scored(self) -> int:
        """Tokens that count."""
        return len(self.token_ids) - self.start


@dataclass(frozen=True)
class Mismatch:
    """`k3_kl` estimates KL(reference || other) as in docs/algorithm.md; `mean_abs_logprob` is the mean of |d|."""

    k3_kl: float
    mean_abs_logprob: float


def mismatch(reference: Tensor, other: Tensor) -> Mismatch:
    """From log-probs [T] of tokens that were sampled from the reference: k3 = exp(d) - 1 - d, d = other - reference."""
    d = other.double() - reference.double()
    return Mismatch(float((d.expm1() - d).mean()), float(d.abs().mean()))


def sample(
    model: Any, prompts: Iterator[Sequence[int]], num_tokens: int, max_tokens: int, seed: int
) -> list[ScoredText]:
    """Samples of up to `max_tokens` tokens a prompt from the plain softmax, until there are `num_tokens`.

    Equal seeds give equal tokens. The last sample may bring a few more than were asked for.
    """
    torch.manual_seed(seed)
    found: list[ScoredText] = []
    while (missing := num_tokens - sum(text.num_scored for text in found)) > 0:
        count = min(_SAMPLING_BATCH, math.ceil(missing / max_tokens))
        found += _sample(model, list(itertools.islice(prompts, count)), max_tokens)
    return found


@torch.inference_mode()
def _sample(model: Any, prompts: Sequence[Sequence[int]], max_tokens: int) -> list[ScoredText]:
    width = max(map(len, prompts))
    padded = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=model.device)
    is_prompt = torch.tensor(
        [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device
    )
    ends = _end_tokens(model)
    drawn = model.generate(
        padded, attention_mask=is_prompt, max_new_tokens=max_tokens, do_sample=True, temperature=1.0, top_k=0,
        top_p=1.0, repetition_penalty=1.0, pad_token_id=min(ends, default=0), eos_token_id=sorted(ends) or None,
    )[:, width:]  # fmt: skip
    return [
        ScoredText((*prompt, *_until_end(row, ends)), len(prompt))
        for prompt, row in zip(prompts, drawn.tolist(), strict=True)
    ]


def _end_tokens(model: Any) -> set[int]:
    ends = model.generation_config.eos_token_id
    return set() if ends is None else set(ends if isinstance(ends, list) else [ends])


def _until_end(token_ids: list[int], ends: set[int]) -> list[int]:
    """What comes after the end is padding."""
    first = next((i for i, token in enumerate(token_ids) if token in ends), len(token_ids))
    return token_ids[: first + 1]


@torch.inference_mode()
def token_logprobs(model: Any, texts: Sequence[ScoredText]) -> Tensor:
    """fp32 log-probs [T] of all tokens that count, in order; equal texts are batched alike, whatever the layers."""
    scores = []
    for batch in _batches(texts):
        width = max(len(text.token_ids) for text in batch)
        padded = [[*text.token_ids, *[0] * (width - len(text.token_ids))] for text in batch]  # after the end: unseen
        logits = model(input_ids=torch.tensor(padded, device=model.device), use_cache=False).logits
        for text, rows in zip(batch, logits, strict=True):
            drawn = torch.tensor(text.token_ids[text.start :], device=model.device)
            all_scores = rows[text.start - 1 : len(text.token_ids) - 1].float().log_softmax(dim=-1)
            scores.append(all_scores.gather(1, drawn[:, None])[:, 0].cpu())
    return torch.cat(scores)


def _batches(texts: Sequence[ScoredText]) -> Iterator[list[ScoredText]]:
    """Runs of texts that, padded to the longest, have a bounded number of tokens."""
    batch: list[ScoredText] = []
    width = 0
    for text in texts:
        wider = max(width, len(text.token_ids))
        if batch and wider * (len(batch) + 1) > _BATCH_TOKENS:
            yield batch
            batch, wider = [], len(text.token_ids)
        batch.append(text)
        width = wider
    if batch:
        yield batch
