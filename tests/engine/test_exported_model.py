"""What the trainer exports loads in vLLM as it is, and is the policy: tokens with the log-probs it gives them."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.helpers.real_engine import PROMPTS, ROOT, output_of
from transformers import AutoModelForCausalLM, AutoTokenizer

from flashrl_trainer.distributed import Ranks, start_ranks, stop_ranks
from flashrl_trainer.export import export
from flashrl_trainer.model import load_policy

pytestmark = [pytest.mark.engine, pytest.mark.slow]

MODEL = ROOT / "examples" / "tiny_arith" / "model"
TOKENS = 12
BF16_NATS = 0.0625  # of a logit from 8 to 16, of which the model has many, a unit in the last place of bf16


@pytest.fixture
def ranks() -> Iterator[Ranks]:
    yield start_ranks("cpu", timeout_s=30)
    stop_ranks()


def exported(folder: Path, ranks: Ranks) -> Path:
    """The tiny model, a little further: not the weights that the folder it came from holds."""
    options: dict[str, Any] = {"compute_dtype": "float32", "checkpointing": False, "temperature": 1.0}
    policy = load_policy(str(MODEL), ranks, chunk_tokens=64, **options)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in policy.parameters():
            local = parameter.to_local()  # type: ignore[operator]
            local.mul_(1 + 0.05 * torch.randn(local.shape, generator=generator))
    export(policy, AutoTokenizer.from_pretrained(MODEL), folder, ranks)
    return folder


def logprobs_of(model: Any, prompt: list[int], response: list[int]) -> list[float]:
    with torch.no_grad():
        logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1].float()
    return [float(row.log_softmax(-1)[token]) for row, token in zip(logits, response, strict=True)]


def test_vllm_and_transformers_load_an_export_as_one_model(tmp_path: Path, ranks: Ranks) -> None:
    folder = exported(tmp_path / "export", ranks)
    arguments = [str(folder), json.dumps(PROMPTS), str(TOKENS), "{}", "none"]
    # in fp32, so that vLLM's are the only roundings: two sides of bf16 can be further apart, which depends on the CPU
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    before = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    moved = 0.0
    for prompt, (token_ids, logprobs) in zip(PROMPTS, output_of("fresh_greedy.py", arguments)["none"], strict=True):
        assert logprobs == pytest.approx(logprobs_of(model, prompt, token_ids), abs=BF16_NATS)
        others = logprobs_of(before, prompt, token_ids)
        moved = max(moved, *(abs(other - logprob) for other, logprob in zip(others, logprobs, strict=True)))
    assert moved > 2 * BF16_NATS, "the first model would have passed too"
