"""An update by its settings: whose log-probs are proximal, what is stale, and what is done about NaN."""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.helpers import rank_programs
from tests.helpers.rank_programs import VERSION, make_groups, whole_tensor
from transformers import Qwen2Config

from flashrl_trainer.config import load_config
from flashrl_trainer.distributed import Ranks, start_ranks, stop_ranks
from flashrl_trainer.model import Policy, load_policy
from flashrl_trainer.optimizer import SkippedStepsError
from flashrl_trainer.samples import Group
from flashrl_trainer.settings import AlgorithmSettings, OptimSettings
from flashrl_trainer.update import Updater, UpdateTotals

CLIP_LOW, CLIP_HIGH = 0.2, 0.28


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    yield start_ranks("cpu", timeout_s=30)
    stop_ranks()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Qwen2Config(vocab_size=rank_programs.VOCABULARY, num_key_value_heads=1, **shape)
    return rank_programs.save_model(config, tmp_path_factory.mktemp("model"))


def updater(folder: str, ranks: Ranks, **algorithm: Any) -> tuple[Policy, Updater]:
    policy = load_policy(folder, ranks, compute_dtype="float32", checkpointing=False, temperature=1.0, chunk_tokens=8)
    settings = AlgorithmSettings(overlong="none", clip_low=CLIP_LOW, clip_high=CLIP_HIGH, **algorithm)
    return policy, Updater(policy, ranks, settings, OptimSettings(lr=1e-3, mini_batch_prompts=3, max_skipped_steps=2))


def with_logprobs(groups: list[Group], shift: float) -> list[Group]:
    """All rollout log-probs moved by `shift`."""
    return [
        replace(
            group,
            samples=[
                replace(s, completion=replace(s.completion, logprobs=[p + shift for p in s.completion.logprobs]))
                for s in group.samples
            ],
        )
        for group in groups
    ]


def test_the_rollout_as_proximal_puts_the_mismatch_into_the_clipped_ratio(folder: str, ranks: Ranks) -> None:
    _, ours = updater(folder, ranks, proximal="rollout", correction="none")
    metrics = ours.step(with_logprobs(make_groups(), -30.0), 1, VERSION).metrics(ranks)
    # every ratio is far over 1 + clip_high: tokens of good samples are clipped, and those of bad ones by the dual clip
    assert (metrics["clip/low_fraction"], metrics["tis/weight_mean"]) == (0, 1)
    assert (metrics["clip/high_fraction"] or 0) + (metrics["clip/dual_fraction"] or 0) == pytest.approx(1)
    assert metrics["grad_norm"] == 0
    assert (metrics["mismatch/mean_abs_logprob"] or 0) > 25, "and is still measured against the trainer"


def test_the_trainer_as_proximal_leaves_a_single_update_unclipped(folder: str, ranks: Ranks) -> None:
    _, ours = updater(folder, ranks, correction="none")
    metrics = ours.step(with_logprobs(make_groups(), -30.0), 1, VERSION).metrics(ranks)
    assert metrics["clip/high_fraction"] == metrics["clip/dual_fraction"] == 0
    assert (metrics["grad_norm"] or 0) > 0


def test_without_a_mismatch_it_does_not_matter_who_is_proximal(folder: str, ranks: Ranks) -> None:
    policy, _ = updater(folder, ranks)
    groups = matched(policy, make_groups())
    rows, weights = [], []
    for proximal in ("trainer", "rollout"):
        policy, ours = updater(folder, ranks, proximal=proximal, correction="none")
        rows.append(ours.step(groups, 1, VERSION).metrics(ranks))
        weights.append({name: whole_tensor(parameter) for name, parameter in policy.lm.named_parameters()})
    assert rows[0]["loss"] == pytest.approx(rows[1]["loss"], abs=1e-6)
    assert rows[0]["grad_norm"] == pytest.approx(rows[1]["grad_norm"], rel=1e-5)


def matched(policy: Policy, groups: list[Group]) -> list[Group]:
    """The groups as if the policy had drawn them itself."""
    from flashrl_trainer.batch import pack, training_samples

    found = []
    for group in groups:
        samples = []
        for each in group.samples:
            (one,) = training_samples([replace(group, samples=[each])], torch.zeros(1))
            with torch.no_grad():
                logprobs = policy(pack([one]))[0][one.num_prompt_tokens :].tolist()
            samples.append(replace(each, completion=replace(each.completion, logprobs=logprobs)))
        found.append(replace(group, samples=samples))
    return found


def step_at(version: int, folder: str, ranks: Ranks) -> dict[str, float | None]:
    _, ours = updater(folder, ranks)
    totals: UpdateTotals = ours.step(make_groups(), 1, version)
    return totals.metrics(ranks)


def test_mismatch_is_split_by_the_version_that_drew_a_token(folder: str, ranks: Ranks) -> None:
    """The first half of every response, rounded down, is one version older."""
    half, all_stale, all_fresh = (step_at(version, folder, ranks) for version in (VERSION, VERSION + 1, VERSION - 1))
    assert half["mismatch/stale_fraction"] == pytest.approx(25 / 56)
    whole = (half["mismatch/stale_k3_kl"] or 0) * 25 / 56 + (half["mismatch/fresh_k3_kl"] or 0) * 31 / 56
    assert half["mismatch/k3_kl"] == pytest.approx(whole)
    assert all_stale["mismatch/stale_fraction"] == 1
    assert all_stale["mismatch/stale_k3_kl"] == pytest.approx(half["mismatch/k3_kl"])
    assert (all_stale["mismatch/fresh_k3_kl"], all_fresh["mismatch/stale_fraction"]) == (0, 0)
    assert all_fresh["mismatch/fresh_max_ratio"] == half["mismatch/max_ratio"]


def test_an_update_with_nan_changes_nothing_and_too_many_in_a_row_end_it(folder: str, ranks: Ranks) -> None:
    policy, ours = updater(folder, ranks)
    before = {name: whole_tensor(parameter) for name, parameter in policy.lm.named_parameters()}
    metrics = ours.step(make_groups(math.nan), 1, VERSION).metrics(ranks)
    assert (metrics["loss"], metrics["grad_norm"], metrics["train/skipped_steps"]) == (None, None, 1)
    ours.check()
    for name, parameter in policy.lm.named_parameters():
        assert torch.equal(whole_tensor(parameter), before[name])
    assert ours.step(make_groups(), 2, VERSION).metrics(ranks)["train/skipped_steps"] == 0
    ours.step(make_groups(math.nan), 3, VERSION)
    ours.check()  # one in a row: the one before was good
    ours.step(make_groups(math.nan), 4, VERSION)
    with pytest.raises(
        SkippedStepsError, match=r"^optim\.max_skipped_steps: 2 updates in a row were left out \(loss nan"
    ):
        ours.check()


def test_memory_and_speed_are_reported_and_mfu_is_null_on_a_cpu(folder: str, ranks: Ranks) -> None:
    metrics = step_at(VERSION, folder, ranks)
    assert metrics["perf/mfu"] is None
    assert 0.05 < (metrics["perf/peak_memory_gib"] or 0) < 64
    assert (metrics["perf/train_tokens_per_s"] or 0) > 0


def settings(*overrides: str) -> None:
    load_config(None, ["model.path=m", "data.train=t", "eval.every=0", "algorithm.proximal=rollout", *overrides], {})


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["optim.mini_batch_prompts=1024"],
            "where a weight would count it twice: algorithm.correction must be none or",
        ),
        (
            ["algorithm.correction=none"],
            "algorithm.proximal: rollout needs steps of one update: optim.mini_batch_prompts",
        ),
        (
            ["algorithm.correction=none", "optim.mini_batch_prompts=1024", "algorithm.update_epochs=2"],
            "algorithm.update_epochs = 1, got 1024 and 2",
        ),
    ],
)
def test_the_rollout_as_proximal_is_refused_where_it_does_not_hold(overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings(*overrides)


@pytest.mark.parametrize("correction", ["none", "geometric"])
def test_the_rollout_as_proximal_is_accepted_for_steps_of_one_update(correction: str) -> None:
    settings(f"algorithm.correction={correction}", "optim.mini_batch_prompts=1024")
