"""Dynamic sampling: which groups are kept, how many prompts are asked for, and what survives a step or a restart."""

import json

import pytest

from flashrl_trainer.samples import Completion, Group, Prompt, Sample, group_from_dict, group_to_dict
from flashrl_trainer.sampling import DynamicSampling, NoMixedGroupsError


def group(name: str, *rewards: float, version: int = 7, shaped: float = 0.0, finish: str = "stop") -> Group:
    completion = Completion([4, 2], [-0.5, -1 / 3], "72", finish, [(version, 0, 1), (version + 1, 1, 2)])
    samples = [Sample(completion, reward, reward + shaped * index) for index, reward in enumerate(rewards)]
    return Group(Prompt(name, [{"role": "user", "content": "?"}], "72"), [1, 2, 3], samples, version + 1)


def mixed(*names: str, version: int = 7) -> list[Group]:
    return [group(name, 1, 0, version=version) for name in names]


def uniform(count: int, reward: float = 0) -> list[Group]:
    return [group("uniform", reward, reward) for _ in range(count)]


def sampler(target: int = 4, max_attempts: int = 30, max_staleness: int = 2, **options: bool) -> DynamicSampling:
    sampling = DynamicSampling(target, max_attempts, max_staleness, **options)
    sampling.begin_step(7)
    return sampling


def names(groups: list[Group]) -> list[str]:
    return [group.prompt.id for group in groups]


def test_only_mixed_groups_are_kept_in_the_order_they_came() -> None:
    sampling = sampler()
    sampling.add([group("a", 1, 0), group("b", 0, 0), group("c", 1, 1), group("d", 0, 0.5)])
    sampling.add(mixed("e", "f"))
    assert sampling.prompts_wanted() == 0
    step = sampling.finish_step()
    assert names(step.groups) == ["a", "d", "e", "f"]
    assert (step.missing, step.carried, step.counts.attempts) == (0, 0, 2)


def test_groups_are_judged_on_the_raw_reward_not_on_the_shaped_one() -> None:
    sampling = sampler(target=1)
    sampling.add([group("equal, but shaped apart", 1, 1, shaped=-0.5)])
    assert sampling.prompts_wanted() == 1


def test_later_rounds_ask_for_more_by_the_share_kept_so_far() -> None:
    sampling = sampler(target=12)
    assert sampling.prompts_wanted() == 12
    sampling.add(mixed("a", "b", "c") + uniform(9))
    assert sampling.prompts_wanted() == 12  # 9 missing at one in four: 36, but never more than a step's worth
    sampling.add(mixed(*"defghi") + uniform(2))
    assert sampling.prompts_wanted() == 7  # 3 missing at 9 in 20


def test_with_nothing_kept_it_asks_for_a_full_round() -> None:
    sampling = sampler(target=5)
    sampling.add(uniform(2))
    assert sampling.prompts_wanted() == 5


def test_reward_and_counts_are_over_all_groups_seen() -> None:
    sampling = sampler(target=1)
    sampling.add([group("a", 1, 0), group("b", 0, 0, finish="length"), group("c", 0, 0), group("d", 1, 1)])
    metrics = sampling.finish_step().metrics()
    assert metrics == pytest.approx(
        {
            "reward/mean": 3 / 8,
            "reward/std": (15 / 64) ** 0.5,
            "sampling/groups_kept": 1,
            "sampling/groups_seen": 4,
            "sampling/truncated_fraction": 2 / 8,
            "response/mean_tokens": 2,
            "staleness/mean": 0,
            "staleness/max": 0,
            "staleness/dropped_groups": 0,
        }
    )


def test_surplus_goes_first_in_the_next_step() -> None:
    sampling = sampler(target=2)
    sampling.add(mixed("a", "b", "c"))
    assert names(sampling.finish_step().groups) == ["a", "b"]
    sampling.begin_step(9)
    assert sampling.prompts_wanted() == 1
    sampling.add(mixed("d", version=9))
    step = sampling.finish_step()
    assert (names(step.groups), step.carried) == (["c", "d"], 1)
    assert (step.counts.groups_seen, step.counts.rewards) == (1, [1, 0])
    assert (step.metrics()["staleness/mean"], step.metrics()["staleness/max"]) == (1, 2)


def test_a_surplus_of_several_steps_is_used_up_step_by_step() -> None:
    sampling = sampler(target=2)
    sampling.add(mixed(*"abcde"))
    sampling.finish_step()
    sampling.begin_step(8)
    assert sampling.prompts_wanted() == 0
    step = sampling.finish_step()
    assert (names(step.groups), step.carried, step.counts.groups_seen) == (["c", "d"], 2, 0)
    assert step.metrics()["reward/mean"] == 0
    assert len(sampling.state_dict()["surplus"]) == 1


def test_surplus_too_old_is_dropped_and_counted() -> None:
    sampling = sampler(target=1, max_staleness=2)
    sampling.add(mixed("a", "b", "c"))
    sampling.finish_step()
    sampling.begin_step(10)  # drawn from 7, though finished under 8
    assert sampling.prompts_wanted() == 1
    sampling.add(mixed("d", version=10))
    step = sampling.finish_step()
    assert (names(step.groups), step.counts.groups_stale) == (["d"], 2)


def test_groups_too_old_on_arrival_are_dropped_and_counted() -> None:
    sampling = sampler(target=2, max_staleness=0)
    sampling.add([*mixed("old", version=6), *mixed("new")])
    step = sampling.finish_step()
    assert names(step.groups) == ["new"]
    assert (step.counts.groups_seen, step.counts.groups_kept, step.counts.groups_stale) == (2, 1, 1)


def test_without_staleness_a_surplus_does_not_outlive_an_update() -> None:
    sampling = sampler(target=1, max_staleness=0)
    sampling.add(mixed("a", "b"))
    sampling.finish_step()
    sampling.begin_step(8)
    assert sampling.prompts_wanted() == 1


def test_surplus_can_be_switched_off() -> None:
    sampling = sampler(target=1, keep_surplus=False)
    sampling.add(mixed("a", "b"))
    sampling.finish_step()
    sampling.begin_step(7)
    assert sampling.prompts_wanted() == 1


def test_plain_grpo_keeps_every_group() -> None:
    sampling = sampler(target=3, keep_uniform=True)
    sampling.add(uniform(3))
    assert sampling.prompts_wanted() == 0
    assert len(sampling.finish_step().groups) == 3


def test_at_the_attempt_limit_it_goes_on_with_what_there_is_and_says_so() -> None:
    sampling = sampler(target=4, max_attempts=2)
    sampling.add(mixed("a") + uniform(3))
    assert sampling.prompts_wanted() > 0
    sampling.add(uniform(4))
    assert sampling.prompts_wanted() == 0
    step = sampling.finish_step()
    assert (names(step.groups), step.missing) == (["a"], 3)


def test_with_nothing_at_all_it_stops_and_names_the_rewards() -> None:
    sampling = sampler(target=2, max_attempts=2)
    sampling.add(uniform(3))
    sampling.add([*uniform(1, reward=0.5), *mixed("old", version=1)])
    with pytest.raises(NoMixedGroupsError, match="in 2 attempts") as caught:
        sampling.finish_step()
    assert "5 groups, 1 too old, 10 samples, rewards: 0 x 7, 0.5 x 2, 1 x 1" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_thousand_different_rewards_make_no_thousand_word_message() -> None:
    sampling = sampler(max_attempts=1)
    sampling.add([group("g", reward / 7, reward / 7) for reward in range(1000)])
    with pytest.raises(NoMixedGroupsError, match=r"and 992 other values;"):
        sampling.finish_step()


def test_no_samples_at_all_is_the_same_error() -> None:
    sampling = sampler(max_attempts=1)
    sampling.add([])
    with pytest.raises(NoMixedGroupsError, match="rewards: none"):
        sampling.finish_step()


def test_a_restart_from_json_goes_on_as_if_there_had_been_none() -> None:
    original, restarted = sampler(target=1), DynamicSampling(1, 30, 2)
    original.add([group("a", 1, 0), group("b", 1, 0, 0.25, shaped=-0.1), group("c", 0, 1, finish="length")])
    original.finish_step()
    restarted.load_state_dict(json.loads(json.dumps(original.state_dict())))
    for sampling in (original, restarted):
        sampling.begin_step(8)
    assert restarted.finish_step() == original.finish_step()
    assert restarted.state_dict() == original.state_dict() != {"surplus": []}


def test_groups_survive_json_bit_for_bit() -> None:
    before = group("a", 0.1, 1 / 3, 1e-300, shaped=-1 / 7)
    assert group_from_dict(json.loads(json.dumps(group_to_dict(before)))) == before


def test_age_is_that_of_the_oldest_token_and_of_the_reply_where_there_is_none() -> None:
    assert group("a", 1, 0, version=7).oldest_version == 7
    assert Group(Prompt("p", "text", "1"), [1], [], 12).oldest_version == 12
