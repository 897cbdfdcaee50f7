"""Bands of masks from ratios worked by hand, and the ratios of a model against transformers' own log-probs."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.helpers import rank_programs
from transformers import AutoModelForCausalLM, Qwen2Config

from flashrl_trainer.distributed import Ranks, start_ranks, stop_ranks
from flashrl_trainer.mismatch_bands import LogRatios, describe, measure, sample_band, token_band


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    yield start_ranks("cpu", timeout_s=30)
    stop_ranks()


def test_the_token_band_leaves_two_in_a_thousand_out() -> None:
    ratios = LogRatios(torch.linspace(-1, 1, 2001, dtype=torch.float64), torch.zeros(2, dtype=torch.float64))
    assert token_band(ratios) == pytest.approx((math.exp(-0.998), math.exp(0.998)), rel=1e-9)


def test_the_sample_band_is_three_deviations_around_the_mean() -> None:
    ratios = LogRatios(torch.zeros(2).double(), torch.tensor([0.02, 0.04], dtype=torch.float64))
    assert sample_band(ratios) == pytest.approx((1.0, math.exp(0.06)), rel=1e-9)  # 0.03 - 3 x 0.01 is 0
    ratios = LogRatios(torch.zeros(2).double(), torch.tensor([-0.02, 0.02], dtype=torch.float64))
    assert sample_band(ratios) == pytest.approx((math.exp(-0.06), math.exp(0.06)), rel=1e-9)


def test_one_is_within_every_band() -> None:
    ratios = LogRatios(torch.full((9,), 0.5).double(), torch.full((3,), -0.5).double())
    assert token_band(ratios) == pytest.approx((1.0, math.exp(0.5)))
    assert sample_band(ratios) == pytest.approx((math.exp(-0.5), 1.0))


def test_the_lines_name_both_masks_with_their_settings() -> None:
    ratios = LogRatios(
        torch.linspace(-0.1, 0.1, 2001, dtype=torch.float64), torch.tensor([-0.01, 0.01], dtype=torch.float64)
    )
    first, second, icepop, geometric = describe(ratios).splitlines()
    assert first.startswith("ratios of 2001 tokens: 0.1% below 0.9050, 1.0% below 0.9066, 50.0% below 1.0000, ")
    assert second.startswith("geometric means of 2 samples: ")
    assert icepop == 'suggested for algorithm.correction = "icepop": mask_low = 0.9050, mask_high = 1.1049'
    assert geometric == 'suggested for algorithm.correction = "geometric": mask_low = 0.9704, mask_high = 1.0305'


@pytest.mark.parametrize("max_tokens", [16, 10**6])
def test_ratios_are_the_trainers_log_probs_less_the_samplers(max_tokens: int, ranks: Ranks, tmp_path: Path) -> None:
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Qwen2Config(vocab_size=rank_programs.VOCABULARY, num_key_value_heads=1, **shape)
    folder = rank_programs.save_model(config, tmp_path)
    policy, _ = rank_programs.make_updater(folder, ranks, max_tokens)  # at temperature 0.9
    groups = rank_programs.make_groups()
    found = measure(policy, ranks, groups, max_tokens)
    assert found is not None
    lm: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager")
    expected = []
    for group in groups:
        for sample in group.samples:
            ids = torch.tensor([group.prompt_token_ids + sample.completion.token_ids])
            logprobs = torch.log_softmax(lm(input_ids=ids).logits[0, :-1] / 0.9, dim=-1)
            chosen = logprobs.gather(1, ids[0, 1:, None])[len(group.prompt_token_ids) - 1 :, 0]
            expected.append(chosen.detach() - torch.tensor(sample.completion.logprobs).double())
    torch.testing.assert_close(found.tokens.sort()[0], torch.cat(expected).sort()[0], rtol=0, atol=2e-6)
    means = torch.stack([values.mean() for values in expected])
    torch.testing.assert_close(found.samples.sort()[0], means.sort()[0], rtol=0, atol=2e-6)
