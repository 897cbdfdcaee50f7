"""One prompt on its way to a gradient, as plain data: prompt, completions, rewards.

Knows nothing of HTTP, tensors, tokenizers or where a reward comes from.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

WeightSpan = tuple[int, int, int]  # weight version, first response token, one past the last response token


@dataclass(frozen=True, slots=True)
class Prompt:
    """`Prompt("gsm8k/train/17", [{"role": "user", "content": "..."}], "72")`; a plain text prompt is a `str`."""

    id: str
    prompt: str | list[dict[str, str]]
    answer: str


@dataclass(frozen=True, slots=True)
class Completion:
    """One sampled response: `Completion([9, 4, 2], [-0.1, -2.3, -0.7], "72", "stop", [(12, 0, 3)])`."""

    token_ids: list[int]
    logprobs: list[float]  # natural log of the probability each token was drawn with, after temperature
    text: str
    finish_reason: str  # "stop", or "length" where the response limit cut it
    weight_versions: list[WeightSpan]

    @property
    def truncated(self) -> bool:
        return self.finish_reason == "length"


@dataclass(frozen=True, slots=True)
class Sample:
    """A completion with its raw reward (what is reported) and its shaped one (what is learned from)."""

    completion: Completion
    reward: float
    shaped_reward: float


@dataclass(frozen=True, slots=True)
class Group:
    """All samples of one prompt, and the weight version that the service reported with them."""

    prompt: Prompt
    prompt_token_ids: list[int]
    samples: list[Sample]
    weight_version: int

    @property
    def is_mixed(self) -> bool:
        """Whether raw rewards differ: a group whose rewards are all equal has no gradient."""
        return len({sample.reward for sample in self.samples}) > 1

    @property
    def oldest_version(self) -> int:
        """The oldest weights that any token of the group was drawn from."""
        spans = (span for sample in self.samples for span in sample.completion.weight_versions)
        return min((version for version, _, _ in spans), default=self.weight_version)


def group_to_dict(group: Group) -> dict[str, Any]:
    """The group as dicts, lists, strings and numbers, for a checkpoint; lists are shared, not copied."""
    return {
        "prompt": _fields(group.prompt),
        "prompt_token_ids": group.prompt_token_ids,
        "samples": [_fields(sample) | {"completion": _fields(sample.completion)} for sample in group.samples],
        "weight_version": group.weight_version,
    }


def group_from_dict(state: Mapping[str, Any]) -> Group:
    """The inverse of `group_to_dict`, also after a trip through JSON."""
    return Group(
        prompt=Prompt(**state["prompt"]),
        prompt_token_ids=state["prompt_token_ids"],
        samples=[_sample_from_dict(sample) for sample in state["samples"]],
        weight_version=state["weight_version"],
    )


def _fields(record: Prompt | Completion | Sample) -> dict[str, Any]:
    # dataclasses.asdict deep-copies every token, seconds for a large surplus
    return {name: getattr(record, name) for name in record.__slots__}


def _sample_from_dict(state: Mapping[str, Any]) -> Sample:
    completion = dict(state["completion"])
    completion["weight_versions"] = [(version, start, end) for version, start, end in completion["weight_versions"]]
    return Sample(Completion(**completion), state["reward"], state["shaped_reward"])
