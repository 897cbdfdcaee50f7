"""The same step on 1, 2 and 4 ranks, in two copies of two, and in micro-batches of any size, to fp32 rounding."""

import math

import pytest
import torch
from tests.helpers import rank_programs
from tests.helpers.rank_job import run_ranks
from tests.helpers.rank_programs import LEARNING_RATE, Outcome
from transformers import LlamaConfig, PreTrainedConfig, Qwen2Config, Qwen3Config

# four ranks share rows of 61 and of 30 unevenly, and Qwen3's norms of 6 leave one of them without any
SHAPE = {
    "vocab_size": rank_programs.VOCABULARY,
    "hidden_size": 24,
    "intermediate_size": 30,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
FAMILIES: dict[str, PreTrainedConfig] = {
    "qwen2": Qwen2Config(**SHAPE, tie_word_embeddings=True),
    "llama": LlamaConfig(**SHAPE),
    "qwen3": Qwen3Config(**SHAPE, head_dim=6, tie_word_embeddings=True),
}
NUMBERS = ("loss", "grad_norm", "entropy", "mismatch/k3_kl", "mismatch/fresh_k3_kl", "mismatch/stale_k3_kl")
NUMBERS += ("mismatch/max_ratio", "tis/weight_mean", "tis/weight_max", "tis/ess", "tis/capped_fraction")
NUMBERS += ("mismatch/stale_fraction", "clip/low_fraction", "clip/high_fraction")
ONE_BATCH = 10**6


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    root = tmp_path_factory.mktemp("models")
    return [rank_programs.save_model(config, root / name) for name, config in FAMILIES.items()]


@pytest.fixture(scope="module")
def alone(folders: list[str]) -> list[Outcome]:
    """One rank, one micro-batch an update."""
    return job(folders, 1, ONE_BATCH)


def job(folders: list[str], world_size: int, max_tokens: int, num_replicas: int = 1) -> list[Outcome]:
    """Rank 0's outcomes, once all ranks are found to hold the same weights to the last bit."""
    ends = run_ranks(rank_programs.steps, world_size, folders, max_tokens, num_replicas)
    assert [end.error for end in ends] == [""] * world_size
    for end in ends[1:]:
        for mine, other in zip(ends[0].value, end.value, strict=True):
            assert mine.metrics["loss"] == other.metrics["loss"]
            assert all(torch.equal(mine.weights[name], other.weights[name]) for name in mine.weights)
    found = ends[0].value
    assert isinstance(found, list)
    return found


def assert_same(outcomes: list[Outcome], expected: list[Outcome]) -> None:
    assert len(outcomes) == len(expected)
    for family, mine, other in zip(FAMILIES, outcomes, expected, strict=False):
        assert_numbers(family, mine, other, 2e-6)
        for name, mean in other.means.items():
            size = mean.abs().max()
            torch.testing.assert_close(
                mine.means[name], mean, rtol=1e-5, atol=2e-6 * float(size), msg=f"{family} {name}"
            )
            # Adam makes a whole step of a gradient's rounding where the gradient is next to nothing
            is_clear = mean.abs() > 1e-3 * size
            difference = (mine.weights[name] - other.weights[name]).abs()
            assert difference[is_clear].max() < 2.5e-7, (family, name)  # two roundings of a weight near 1
            assert difference.max() <= 2.1 * LEARNING_RATE, (family, name)
            assert is_clear.float().mean() > 0.1 or "embed" in name, "else hardly anything would be compared"
    # the second update begins from weights that differ where the first one's gradient was next to nothing
    assert_numbers("two updates", outcomes[-1], expected[-1], 1e-4)


def assert_numbers(family: str, mine: Outcome, other: Outcome, tolerance: float) -> None:
    for number in NUMBERS:
        assert mine.metrics[number] == pytest.approx(other.metrics[number], rel=tolerance, abs=1e-9), (family, number)


@pytest.mark.parametrize(("world_size", "num_replicas"), [(2, 1), (4, 1), (4, 2)])
def test_ranks_make_the_step_of_one(
    world_size: int, num_replicas: int, folders: list[str], alone: list[Outcome]
) -> None:
    assert_same(job(folders, world_size, 24, num_replicas), alone)


@pytest.mark.parametrize("max_tokens", [1, 17, 40])
def test_any_size_of_micro_batch_makes_the_step_of_one_batch(
    max_tokens: int, folders: list[str], alone: list[Outcome]
) -> None:
    assert_same(job(folders, 1, max_tokens), alone)


def test_the_step_moves_weights_and_has_every_statistic(alone: list[Outcome]) -> None:
    for each in alone:
        assert each.metrics["train/skipped_steps"] == 0
        assert each.metrics["mismatch/stale_fraction"] == pytest.approx(25 / 56)  # the halves, rounded down
        for number in ("mismatch/fresh_k3_kl", "mismatch/stale_k3_kl", "tis/capped_fraction", "grad_norm"):
            assert (each.metrics[number] or 0) > 0, number
        assert (each.metrics["tis/ess"] or 1) < 1
    assert alone[-1].metrics["loss"] != alone[0].metrics["loss"], "two updates, the second one off-policy"


def test_every_row_is_some_ranks_and_of_one_rank_only(folders: list[str]) -> None:
    ends = run_ranks(rank_programs.shards, 4, folders[2], 2)
    whole = run_ranks(rank_programs.shards, 1, folders[2], 1)[0].value
    for index, (name, _, rows) in enumerate(whole):
        pieces = [end.value[index] for end in ends]
        assert [piece[0] for piece in pieces] == [name] * 4
        assert torch.equal(torch.cat([piece[2] for piece in pieces]), rows), name
        assert [piece[1] for piece in pieces[2:]] == [rows.shape[0]] * 2, "the second copy answers for nothing"


def test_a_number_of_ranks_that_copies_cannot_share_is_refused(folders: list[str]) -> None:
    (end,) = run_ranks(rank_programs.shards, 1, folders[0], 2)
    assert end.error == "ValueError: model.hsdp_replicas: 1 ranks are no multiple of 2"


def test_a_loss_that_is_nan_on_one_rank_is_skipped_by_all(folders: list[str], alone: list[Outcome]) -> None:
    ends = run_ranks(rank_programs.poisoned_steps, 2, folders[0])
    assert [end.error for end in ends] == ["", ""]
    for end in ends:
        for row in end.value["rows"]:
            assert (row["loss"], row["grad_norm"], row["train/skipped_steps"]) == (None, None, 1)
            assert all(value is None or math.isfinite(value) for value in row.values())
        assert end.value["unharmed"]
        assert end.value["stopped"].startswith("optim.max_skipped_steps: 3 updates in a row were left out (loss nan, ")
        assert "--resume" in end.value["stopped"]
    assert_same([ends[0].value["after"]] * 2, [alone[0]] * 2)  # and nothing of it is left in the optimizer
