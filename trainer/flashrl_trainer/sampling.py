"""Dynamic sampling (DAPO, arXiv 2503.14476): which groups a step learns from, and how many prompts to ask for next.

Does no I/O: it is fed groups and knows nothing of where they come from or what is done with the chosen ones.

    sampling.begin_step(weight_version)
    while num_prompts := sampling.prompts_wanted():
        sampling.add(sample(num_prompts))
    step = sampling.finish_step()
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from flashrl_trainer.samples import Group, group_from_dict, group_to_dict

MAX_REWARDS_NAMED = 8  # distinct values in an error message


class NoMixedGroupsError(RuntimeError):
    """Every group at the attempt limit had equal rewards (or was too old), so there is nothing to learn from."""


@dataclass(slots=True)
class SamplingCounts:
    """What one step has seen, kept or not; carried-over groups were counted by the step that sampled them."""

    attempts: int = 0
    groups_seen: int = 0
    groups_kept: int = 0  # of those seen: mixed and not too old
    groups_stale: int = 0  # too old, whether carried over or seen
    truncated: int = 0
    response_tokens: int = 0
    rewards: list[float] = field(default_factory=list)  # raw, one a sample

    def see(self, group: Group) -> None:
        self.groups_seen += 1
        self.truncated += sum(sample.completion.truncated for sample in group.samples)
        self.response_tokens += sum(len(sample.completion.token_ids) for sample in group.samples)
        self.rewards += [sample.reward for sample in group.samples]


@dataclass(frozen=True, slots=True)
class SampledStep:
    """The groups to learn from, oldest first, and what it took to get them."""

    groups: list[Group]
    missing: int  # groups short of the wanted number, because the attempt limit was reached
    carried: int  # of `groups`, how many an earlier step had sampled
    weight_version: int
    counts: SamplingCounts

    def metrics(self) -> dict[str, float]:
        """Raw rewards over all samples seen (0 where none were), with population deviation; staleness in versions."""
        num_samples = max(len(self.counts.rewards), 1)
        mean = math.fsum(self.counts.rewards) / num_samples
        variance = math.fsum((reward - mean) ** 2 for reward in self.counts.rewards) / num_samples
        ages = [self.weight_version - group.oldest_version for group in self.groups]
        return {
            "reward/mean": mean,
            "reward/std": math.sqrt(variance),
            "sampling/groups_kept": self.counts.groups_kept,
            "sampling/groups_seen": self.counts.groups_seen,
            "sampling/truncated_fraction": self.counts.truncated / num_samples,
            "response/mean_tokens": self.counts.response_tokens / num_samples,
            "staleness/mean": sum(ages) / len(ages),
            "staleness/max": max(ages),
            "staleness/dropped_groups": self.counts.groups_stale,
        }


class DynamicSampling:
    """Collects `prompts_per_step` mixed groups a step, in at most `max_attempts` rounds.

    A group is mixed if its *raw* rewards differ; with `keep_uniform` (plain GRPO) every group is kept. A group is too
    old, and dropped, if any of its tokens was drawn more than `max_staleness` weight versions before the step's:
    with 0 a surplus never outlives an update. `keep_surplus` off drops it in any case.
    """

    def __init__(
        self,
        prompts_per_step: int,
        max_attempts: int,
        max_staleness: int,
        *,
        keep_surplus: bool = True,
        keep_uniform: bool = False,
    ) -> None:
        self._prompts_per_step = prompts_per_step
        self._max_attempts = max_attempts
        self._max_staleness = max_staleness
        self._keep_surplus = keep_surplus
        self._keep_uniform = keep_uniform
        self._pool: list[Group] = []  # kept groups, oldest first
        self._weight_version = 0
        self._carried = 0
        self._counts = SamplingCounts()

    def begin_step(self, weight_version: int) -> None:
        """Start anew with the surplus that is not too old for a step on `weight_version`."""
        self._weight_version = weight_version
        self._counts = SamplingCounts()
        self._pool = self._fresh(self._pool)
        self._carried = len(self._pool)

    def prompts_wanted(self) -> int:
        """How many prompts to sample next; 0 once the step is full or out of attempts.

        The first round asks for what is missing, later ones for more by the share of groups kept so far in the step, up
        to `prompts_per_step`: asking for the missing ones alone would take a round for every halving or so.
        """
        missing = self._missing()
        if missing == 0 or self._counts.attempts >= self._max_attempts:
            return 0
        if self._counts.attempts == 0:
            return missing
        if self._counts.groups_kept == 0:
            return self._prompts_per_step
        likely = math.ceil(missing * self._counts.groups_seen / self._counts.groups_kept)
        return min(likely, self._prompts_per_step)

    def add(self, groups: Iterable[Group]) -> None:
        """One attempt's groups, in an order that does not depend on timing; fewer than asked for are fine."""
        groups = list(groups)
        for group in groups:
            self._counts.see(group)
        kept = [group for group in self._fresh(groups) if self._keep_uniform or group.is_mixed]
        self._counts.attempts += 1
        self._counts.groups_kept += len(kept)
        self._pool += kept

    def finish_step(self) -> SampledStep:
        """The step's groups; those beyond stay for the next one. Raises NoMixedGroupsError if there are none at all."""
        if not self._pool:
            raise NoMixedGroupsError(self._nothing_kept())
        chosen, surplus = self._pool[: self._prompts_per_step], self._pool[self._prompts_per_step :]
        step = SampledStep(
            groups=chosen,
            missing=self._missing(),
            carried=min(self._carried, len(chosen)),
            weight_version=self._weight_version,
            counts=self._counts,
        )
        self._pool = surplus if self._keep_surplus else []
        return step

    def state_dict(self) -> dict[str, Any]:
        """The surplus, as plain data for a checkpoint between steps; within a step, the groups kept so far as well."""
        return {"surplus": [group_to_dict(group) for group in self._pool]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._pool = [group_from_dict(group) for group in state["surplus"]]

    def _missing(self) -> int:
        return max(self._prompts_per_step - len(self._pool), 0)

    def _fresh(self, groups: list[Group]) -> list[Group]:
        oldest_allowed = self._weight_version - self._max_staleness
        fresh = [group for group in groups if group.oldest_version >= oldest_allowed]
        self._counts.groups_stale += len(groups) - len(fresh)
        return fresh

    def _nothing_kept(self) -> str:
        counts = self._counts
        return (
            f"no group with unequal rewards in {counts.attempts} attempts (sampling.max_attempts): "
            f"{counts.groups_seen} groups, {counts.groups_stale} too old, {len(counts.rewards)} samples, "
            f"rewards: {_distribution(counts.rewards)}; look at data.reward and data.prompt_template"
        )


def _distribution(rewards: list[float]) -> str:
    """`0 x 955, 1 x 5`, most frequent first."""
    common = Counter(rewards).most_common()
    named = ", ".join(f"{reward:g} x {count}" for reward, count in common[:MAX_REWARDS_NAMED])
    others = f", and {len(common) - MAX_REWARDS_NAMED} other values" if len(common) > MAX_REWARDS_NAMED else ""
    return f"{named or 'none'}{others}"
