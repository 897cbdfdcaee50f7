"""What a row of metrics.jsonl and of samples.jsonl holds.

It does not know where rows go, nor how any number is computed.
"""

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

from flashrl_trainer.samples import Group

METRIC_KEYS = (
    "step",
    "weight_version",
    "reward/mean",
    "reward/std",
    "eval/accuracy",
    "eval/greedy",
    "loss",
    "grad_norm",
    "lr",
    "entropy",
    "clip/low_fraction",
    "clip/high_fraction",
    "clip/dual_fraction",
    "tis/weight_mean",
    "tis/weight_max",
    "tis/ess",
    "tis/capped_fraction",
    "tis/masked_fraction",
    "mismatch/k3_kl",
    "mismatch/mean_abs_logprob",
    "mismatch/max_ratio",
    "mismatch/fresh_k3_kl",
    "mismatch/fresh_mean_abs_logprob",
    "mismatch/fresh_max_ratio",
    "mismatch/stale_k3_kl",
    "mismatch/stale_mean_abs_logprob",
    "mismatch/stale_max_ratio",
    "mismatch/stale_fraction",
    "train/skipped_steps",
    "sampling/groups_kept",
    "sampling/groups_seen",
    "sampling/truncated_fraction",
    "response/mean_tokens",
    "sync/kind",
    "sync/wire_bytes",
    "sync/full_bytes",
    "sync/changed_fraction",
    "sync/seconds",
    "sync/pause_ms",
    "perf/rollout_tokens_per_s",
    "perf/train_tokens_per_s",
    "perf/mfu",
    "perf/peak_memory_gib",
    "perf/step_seconds",
    "staleness/mean",
    "staleness/max",
)

NULLABLE = ("eval/accuracy", "eval/greedy", "loss", "grad_norm", "perf/mfu")
"""Null where nothing was evaluated, every update was skipped, or the device's peak is not known."""

Row = dict[str, float | None]


def complete_row(row: Mapping[str, float | None]) -> Row:
    """`row` with every key of METRIC_KEYS, in that order; ValueError names a key that is missing or not finite.

    What was not evaluated is null, and so may be what else is NULLABLE. Step 0 trained nothing, and a step interrupted
    before its update went out has no `sync/*`: these are 0.
    """
    zeros: Row = dict.fromkeys(METRIC_KEYS, 0.0) | {"perf/mfu": None} if row.get("step") == 0 else {}
    if not any(key.startswith("sync/") for key in row):
        zeros |= {key: 0.0 for key in METRIC_KEYS if key.startswith("sync/")}
    given: dict[str, Any] = {**zeros, "eval/accuracy": None, "eval/greedy": None, **row}
    if missing := [key for key in METRIC_KEYS if key not in given]:
        raise ValueError(f"metrics of step {given.get('step')}: no {', '.join(missing)}")
    for key, value in given.items():
        _check(key, value, given["step"])
    return {key: given[key] for key in (*METRIC_KEYS, *given)}


def _check(key: str, value: object, step: object) -> None:
    if value is None and (key in NULLABLE or key.startswith("eval/")):
        return
    if not isinstance(value, Real) or not math.isfinite(value):
        raise ValueError(f"metrics of step {step}: {key} is {value}")


def sample_rows(step: int, groups: Sequence[Group], count: int) -> list[dict[str, Any]]:
    """`count` completions as JSON types: the first of each group, then the second of each, and so on."""
    longest = max((len(group.samples) for group in groups), default=0)
    chosen = [(group, group.samples[i]) for i in range(longest) for group in groups if i < len(group.samples)]
    return [
        {
            "step": step,
            "id": group.prompt.id,
            "prompt": group.prompt.prompt,
            "answer": group.prompt.answer,
            "text": sample.completion.text,
            "reward": sample.reward,
            "shaped_reward": sample.shaped_reward,
            "tokens": len(sample.completion.token_ids),
            "finish_reason": sample.completion.finish_reason,
            "weight_versions": [list(span) for span in sample.completion.weight_versions],
        }
        for group, sample in chosen[:count]
    ]
