"""Pretrains the example's model from nothing: `python pretrain.py OUT_DIR` -> a Hugging Face model folder.

Knows nothing of reinforcement learning; it sees only problems of the pretraining split.
"""

import argparse
import itertools
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from generate import pretraining_pairs
from prompt import PROMPT_TEMPLATE, build_tokenizer, encode_pair
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

IGNORED = -100  # cross_entropy leaves these targets out: the model is not taught to write questions


def build_model(tokenizer: PreTrainedTokenizerFast) -> Qwen2ForCausalLM:
    """A Qwen2 of about three million parameters with random weights."""
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.04,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    return Qwen2ForCausalLM(config)


def collate(tokenizer: PreTrainedTokenizerFast, pairs: list[tuple[str, str]]) -> tuple[Tensor, Tensor]:
    """Token ids and targets, both [len(pairs), longest - 1] int64, padded on the right, where causality hides it."""
    encoded = [encode_pair(tokenizer, question, answer) for question, answer in pairs]
    longest = max(len(prompt) + len(answer) for prompt, answer in encoded)
    token_ids = torch.full((len(pairs), longest), tokenizer.pad_token_id)
    targets = torch.full((len(pairs), longest), IGNORED)
    for row, (prompt, answer) in enumerate(encoded):
        end = len(prompt) + len(answer)
        token_ids[row, :end] = torch.tensor(prompt + answer)
        targets[row, len(prompt) : end] = torch.tensor(answer)
    return token_ids[:, :-1], targets[:, 1:]


def learning_rate(step: int, num_steps: int, peak: float) -> float:
    """Linear warm-up over 50 steps, then a cosine down to 2 % of the peak."""
    warm = min(1.0, (step + 1) / 50)
    return peak * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / num_steps)))


def pretrain(
    model: Qwen2ForCausalLM, batches: Iterator[tuple[Tensor, Tensor]], num_steps: int, peak_learning_rate: float
) -> None:
    """Next-token training on the answers, in place, printing the loss every 50 steps."""
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.05)
    started = time.monotonic()
    for step, (token_ids, targets) in enumerate(itertools.islice(batches, num_steps)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, num_steps, peak_learning_rate)
        hidden = model.model(input_ids=token_ids).last_hidden_state  # [batch, length, hidden]
        kept = targets != IGNORED
        loss = F.cross_entropy(model.lm_head(hidden[kept]), targets[kept])
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0 or step == num_steps - 1:
            print(f"step {step:5d}  loss {loss.item():.4f}  {time.monotonic() - started:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Pretrain the tiny model and save it with its tokenizer.")
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=32, help="problems a step")
    parser.add_argument("--learning-rate", type=float, default=1.5e-3)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)

    pairs = pretraining_pairs(random.Random(arguments.seed))
    sample = list(itertools.islice(pairs, 4000))
    tokenizer = build_tokenizer(text for q, a in sample for text in (PROMPT_TEMPLATE.format(question=q), a))
    model = build_model(tokenizer)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(tokenizer)} tokens")
    batches = (collate(tokenizer, list(itertools.islice(pairs, arguments.batch))) for _ in itertools.count())
    pretrain(model, batches, arguments.steps, arguments.learning_rate)

    model.to(torch.bfloat16).save_pretrained(arguments.out_dir)
    tokenizer.save_pretrained(arguments.out_dir)


if __name__ == "__main__":
    main()
