"""Texts of the model itself: greedy ones against a loop of forward passes, sampled ones against the softmax."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from flashrl_trainer.config import load_config
from flashrl_trainer.local_sampler import LocalSampler

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "examples/tiny_arith/model"
PROMPTS = ["What is 1+1?\n", "Jack buys 8 pens a day for 5 days. How many pens are there in the end?\n", "Why?\n"]
TOKENS = 12


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture
def model() -> Any:
    """In fp32, where padding changes no argmax; with defaults of its own that would change every text."""
    model: Any = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    model.generation_config.repetition_penalty = 1.7
    model.generation_config.top_k = 1
    return model


def quiet(done: int, total: int) -> None:
    """Nobody watches."""


@torch.no_grad()
def by_hand(model: Any, tokenizer: Any, prompt: str) -> str:
    """One token after the other, without cache, padding or generate()."""
    tokens = list(tokenizer(prompt)["input_ids"])
    start = len(tokens)
    while len(tokens) < start + TOKENS:
        token = int(model(torch.tensor([tokens])).logits[0, -1].argmax())
        if token == tokenizer.eos_token_id:
            break
        tokens.append(token)
    return str(tokenizer.decode(tokens[start:], skip_special_tokens=True))


@pytest.mark.parametrize("batch", [1, 2, 64])
def test_greedy_texts_are_those_of_plain_forward_passes(model: Any, tokenizer: Any, batch: int) -> None:
    expected = [[by_hand(model, tokenizer, prompt)] for prompt in PROMPTS]
    assert LocalSampler(model, tokenizer, batch).greedy(PROMPTS, TOKENS, quiet) == expected


def test_samples_are_of_the_whole_distribution_at_temperature_1(model: Any, tokenizer: Any) -> None:
    with torch.no_grad():
        logits = model.eval()(torch.tensor([tokenizer(PROMPTS[0])["input_ids"]])).logits[0, -1]
    probabilities = logits.softmax(-1)
    count = 2000
    ((*texts,),) = LocalSampler(model, tokenizer, 500).sample(PROMPTS[:1], count, 1, quiet)
    for token in probabilities.topk(4).indices.tolist():
        p = float(probabilities[token])
        drawn = texts.count(tokenizer.decode([token], skip_special_tokens=True)) / count
        assert abs(drawn - p) < 5 * math.sqrt(p * (1 - p) / count) + 1e-9, (token, p, drawn)


def test_texts_are_in_the_order_of_the_prompts_and_the_same_every_time(model: Any, tokenizer: Any) -> None:
    sampler, seen = LocalSampler(model, tokenizer, 4), []
    first = sampler.sample(PROMPTS, 3, TOKENS, lambda done, total: seen.append((done, total)))
    assert [len(texts) for texts in first] == [3, 3, 3]
    assert seen == [(4, 9), (8, 9), (9, 9)]
    assert sampler.sample(PROMPTS, 3, TOKENS, quiet) == first
    assert sampler.greedy(PROMPTS[::-1], TOKENS, quiet) == sampler.greedy(PROMPTS, TOKENS, quiet)[::-1]


def test_a_folder_that_is_no_model_is_one_line(tokenizer: Any, tmp_path: Path) -> None:
    config = load_config(None, [f"model.path={MODEL}", "data.train=x", "eval.every=0"], {})
    with pytest.raises(ValueError, match=r"^--checkpoint: .*: [^\n]+$"):
        LocalSampler.load(config, tokenizer, tmp_path)
