"""Rounds -> medians, ratios, table and JSON.

Knows numbers and their names; knows nothing of how they were measured.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from rich.table import Table

from flashrl_rollout.bench.settings import ArmName, Side


@dataclass(frozen=True)
class Turn:
    """One arm in one round; `tokens` are those that it drew."""

    round: int
    arm: ArmName
    seconds: float
    tokens: int
    front_cpu_s: float

    @property
    def tokens_per_s(self) -> float:
        """Drawn tokens over the time to the last one."""
        return self.tokens / self.seconds

    def as_json(self) -> dict[str, Any]:
        """A raw row of the JSON file."""
        return {
            "round": self.round,
            "arm": str(self.arm),
            "seconds": self.seconds,
            "tokens": self.tokens,
            "tokens_per_s": self.tokens_per_s,
            "front_cpu_s": self.front_cpu_s,
        }


@dataclass(frozen=True)
class ArmFacts:
    """What one arm needed: memory of its weights, tokens that its cache holds, where known, and the time to load."""

    weight_bytes: int | None
    cache_tokens: int | None
    start_s: float


def arm_numbers(turns: Sequence[Turn], arm: ArmName, facts: ArmFacts) -> dict[str, Any]:
    """Medians over the rounds of one arm, and the range of its speed."""
    own = [turn for turn in turns if turn.arm == arm]
    speeds = [turn.tokens_per_s for turn in own]
    return {
        "tokens_per_s": statistics.median(speeds),
        "tokens_per_s_min": min(speeds),
        "tokens_per_s_max": max(speeds),
        "seconds": statistics.median(turn.seconds for turn in own),
        "front_cpu_s": statistics.median(turn.front_cpu_s for turn in own),
        "weight_bytes": facts.weight_bytes,
        "cache_tokens": facts.cache_tokens,
        "start_s": facts.start_s,
    }


def ratio(turns: Sequence[Turn], over: ArmName, under: ArmName) -> float | None:
    """Median over the rounds of one arm's speed over another's in the same round; None where one was not measured."""
    speeds = {(turn.arm, turn.round): turn.tokens_per_s for turn in turns}
    pairs = [
        speed / speeds[under, round_index]
        for (arm, round_index), speed in speeds.items()
        if arm == over and (under, round_index) in speeds
    ]
    return statistics.median(pairs) if pairs else None


def ratios(turns: Sequence[Turn]) -> dict[str, dict[str, float | None]]:
    """For each quantization: the service over the engine, and each of them over itself without quantization."""
    quantizations = dict.fromkeys(turn.arm.quantization for turn in turns)
    return {
        quantization: {
            "service_over_engine": ratio(turns, ArmName("service", quantization), ArmName("engine", quantization)),
            **{
                f"{side}_over_none": ratio(turns, ArmName(side, quantization), ArmName(side, "none"))
                for side in get_args(Side)
            },
        }
        for quantization in quantizations
    }


def numbers(turns: Sequence[Turn], facts: Mapping[ArmName, ArmFacts]) -> dict[str, Any]:
    """All that was measured; `service_over_engine` is the lowest over the quantizations."""
    by_quantization = ratios(turns)
    compared = [found for each in by_quantization.values() if (found := each["service_over_engine"]) is not None]
    return {
        "service_over_engine": min(compared) if compared else None,
        "ratios": by_quantization,
        "arms": {str(arm): arm_numbers(turns, arm, fact) for arm, fact in facts.items()},
        "rounds": [turn.as_json() for turn in turns],
    }


def table(found: Mapping[str, Any], title: str) -> Table:
    """What `numbers` found, a row an arm."""
    shown = Table(title=title, title_justify="left")
    shown.add_column("arm")
    for heading in ("tokens/s", "min - max", "last token", "front CPU", "weights", "cache", "over none", "over engine"):
        shown.add_column(heading, justify="right")
    for arm, values in found["arms"].items():
        side, _, quantization = arm.partition("/")
        between = found["ratios"][quantization]
        shown.add_row(
            arm,
            f"{values['tokens_per_s']:,.0f}",
            f"{values['tokens_per_s_min']:,.0f} - {values['tokens_per_s_max']:,.0f}",
            f"{values['seconds']:.2f} s",
            f"{values['front_cpu_s']:.2f} s",
            _memory(values["weight_bytes"]),
            _tokens(values["cache_tokens"]),
            _times(between[f"{side}_over_none"]),
            _times(between["service_over_engine"]) if side == "service" else "",
        )
    return shown


def _memory(num_bytes: int | None) -> str:
    if num_bytes is None:
        return ""
    return f"{num_bytes / (1 << 20):.1f} MiB" if num_bytes < 1 << 28 else f"{num_bytes / (1 << 30):.2f} GiB"


def _tokens(count: int | None) -> str:
    return "" if count is None else f"{count:,} tok"


def _times(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}x"
