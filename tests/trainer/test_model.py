"""The packed policy against transformers' own forward, one sample at a time."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3Config,
    Gemma3TextConfig,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)

from flashrl_trainer.batch import TrainingSample, pack
from flashrl_trainer.distributed import Ranks, start_ranks, stop_ranks
from flashrl_trainer.logprobs import token_logprobs
from flashrl_trainer.model import dtype_advice, load_policy

COMMON = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
FAMILIES = {
    "llama": LlamaConfig(**COMMON),
    "qwen2_tied": Qwen2Config(**COMMON, tie_word_embeddings=True),
    "qwen2_window": Qwen2Config(**COMMON, use_sliding_window=True, sliding_window=4, max_window_layers=1),
    "qwen3": Qwen3Config(**COMMON, head_dim=16),
    "mistral": MistralConfig(**COMMON, sliding_window=5),
    "gemma": GemmaConfig(**COMMON, head_dim=8),
    "gemma3": Gemma3TextConfig(**COMMON, head_dim=8, sliding_window=5, query_pre_attn_scalar=8),
    "phi3": Phi3Config(**COMMON, pad_token_id=0),
}


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    yield start_ranks("cpu", timeout_s=30)
    stop_ranks()


def sample(length: int, num_prompt_tokens: int, *, in_loss: bool = True) -> TrainingSample:
    ids = torch.randint(0, 61, (length,)).tolist()
    response = length - num_prompt_tokens
    return TrainingSample(ids, num_prompt_tokens, [-1.0] * response, [(0, 0, response)], 1.0, in_loss)


def reference(folder: Path, samples: list[TrainingSample], temperature: float) -> torch.Tensor:
    """Log-probs [T] from transformers' eager attention, one unpadded sample at a time; 0 outside the loss."""
    lm: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    rows = []
    for item in samples:
        ids = torch.tensor([item.token_ids])
        logits = lm(input_ids=ids).logits[0, :-1].double() / temperature
        found = torch.log_softmax(logits, dim=-1).gather(1, ids[0, 1:, None]).squeeze(1)
        row = torch.cat([torch.zeros(1), found.detach().float()])
        row[: item.num_prompt_tokens if item.in_loss else len(row)] = 0
        rows.append(row)
    return torch.cat(rows)


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_log_probs_equal_those_of_single_samples(family: str, ranks: Ranks, tmp_path: Path) -> None:
    torch.manual_seed(3)
    AutoModelForCausalLM.from_config(FAMILIES[family]).save_pretrained(tmp_path)
    samples = [sample(9, 4), sample(17, 1), sample(2, 1), sample(5, 2, in_loss=False), sample(12, 11)]
    policy = load_policy(
        str(tmp_path), ranks, compute_dtype="float32", checkpointing=False, temperature=0.7, chunk_tokens=4
    )
    with torch.no_grad():
        logprobs, entropy = policy(pack(samples))
    torch.testing.assert_close(logprobs, reference(tmp_path, samples, 0.7), atol=2e-5, rtol=0)
    assert bool((entropy[logprobs != 0] > 0).all())
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:  # the names that the service goes by
        assert sorted(name for name, _ in policy.lm.named_parameters()) == sorted(file.keys())


def padded_logprobs(lm: Any, samples: list[TrainingSample]) -> torch.Tensor:
    """[S, longest - 1] from transformers' own forward over a padded batch, at temperature 1."""
    longest = max(len(item.token_ids) for item in samples)
    ids = torch.tensor([item.token_ids + [0] * (longest - len(item.token_ids)) for item in samples])
    mask = torch.tensor([[1] * len(i.token_ids) + [0] * (longest - len(i.token_ids)) for i in samples])
    logits = lm(input_ids=ids, attention_mask=mask).logits[:, :-1].float()
    found: torch.Tensor = torch.log_softmax(logits, dim=-1).gather(2, ids[:, 1:, None])[..., 0]
    return found


@pytest.mark.parametrize("family", ["llama", "qwen2_tied", "qwen2_window", "qwen3"])
@pytest.mark.parametrize("shares", [False, True])
def test_packed_gradients_equal_those_of_a_padded_batch(
    family: str, shares: bool, ranks: Ranks, tmp_path: Path
) -> None:
    """With and without prompts that the samples of a group share."""
    torch.manual_seed(6)
    AutoModelForCausalLM.from_config(FAMILIES[family]).save_pretrained(tmp_path)
    prompt = torch.randint(0, 61, (6,)).tolist()
    samples = [replace(sample(n, 6), group=0 if shares else None) for n in (9, 15, 7)]
    samples = [replace(each, token_ids=prompt + each.token_ids[6:]) for each in samples] + [sample(12, 3)]
    policy = load_policy(
        str(tmp_path), ranks, compute_dtype="float32", checkpointing=False, temperature=1.0, chunk_tokens=4
    )
    batch = pack(samples)
    assert len(batch.token_ids) == 43 - 12 * shares
    logprobs = policy(batch)[0][batch.loss_mask]
    weights = torch.linspace(-1, 1, len(logprobs))
    (logprobs * weights).sum().backward()
    lm: Any = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager")
    rows = padded_logprobs(lm, samples)
    expected = torch.cat(
        [row[item.num_prompt_tokens - 1 : len(item.token_ids) - 1] for row, item in zip(rows, samples, strict=True)]
    )
    (expected * weights).sum().backward()
    torch.testing.assert_close(logprobs, expected, atol=5e-6, rtol=1e-6)
    gradients = {name: parameter.grad for name, parameter in lm.named_parameters()}
    for name, parameter in policy.lm.named_parameters():
        found = parameter.grad.full_tensor()  # type: ignore[union-attr,attr-defined,operator]
        torch.testing.assert_close(found, gradients[name], rtol=1e-4, atol=2e-5 * float(gradients[name].abs().max()))


def test_recomputed_blocks_give_the_same_gradients(ranks: Ranks, tmp_path: Path) -> None:
    torch.manual_seed(4)
    AutoModelForCausalLM.from_config(FAMILIES["qwen2_tied"]).save_pretrained(tmp_path)
    batch = pack([sample(9, 4), sample(7, 2)])
    gradients = []
    for checkpointing in (False, True):
        policy = load_policy(
            str(tmp_path), ranks, compute_dtype="float32", checkpointing=checkpointing, temperature=1.0, chunk_tokens=64
        )
        policy(batch)[0].sum().backward()
        gradients.append({name: p.grad.full_tensor() for name, p in policy.named_parameters()})  # type: ignore[union-attr,attr-defined,operator]
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], msg=name)


@pytest.mark.slow  # compiling takes the better part of a minute
def test_compiled_blocks_give_the_same_log_probs_and_gradients(ranks: Ranks, tmp_path: Path) -> None:
    torch.manual_seed(4)
    AutoModelForCausalLM.from_config(FAMILIES["qwen2_tied"]).save_pretrained(tmp_path)
    outcomes = []
    for compiled in (False, True):
        policy = load_policy(
            str(tmp_path),
            ranks,
            compute_dtype="float32",
            checkpointing=False,
            temperature=1.0,
            chunk_tokens=64,
            compiled=compiled,
        )
        torch.manual_seed(8)
        batches = [pack([sample(9, 4), sample(7, 2)]), pack([sample(13, 4), sample(6, 2), sample(21, 2)])]
        logprobs = [policy(batch)[0] for batch in batches]  # two shapes, one graph
        torch.cat(logprobs).sum().backward()
        gradients = {n: p.grad.full_tensor() for n, p in policy.named_parameters()}  # type: ignore[union-attr,attr-defined,operator]
        outcomes.append((torch.cat(logprobs), gradients))
    torch.testing.assert_close(outcomes[0][0], outcomes[1][0], atol=5e-6, rtol=1e-5)
    assert outcomes[0][1].keys() == outcomes[1][1].keys()
    for name, gradient in outcomes[0][1].items():
        torch.testing.assert_close(outcomes[1][1][name], gradient, rtol=1e-4, atol=2e-5 * float(gradient.abs().max()))


@pytest.mark.parametrize("chunk_tokens", [1, 3, 100])
def test_chunked_log_probs_and_gradients_equal_float64(chunk_tokens: int) -> None:
    torch.manual_seed(5)
    hidden, head = torch.randn(10, 6, dtype=torch.float64), torch.randn(13, 6, dtype=torch.float64)
    targets, weights = torch.randint(0, 13, (10,)), torch.randn(10, dtype=torch.float64)
    exact = [t.clone().requires_grad_() for t in (hidden, head)]
    distribution = torch.log_softmax(exact[0] @ exact[1].t() / 1.3, dim=1)
    expected = distribution.gather(1, targets[:, None]).squeeze(1)
    (expected * weights).sum().backward()
    ours = [t.float().requires_grad_() for t in (hidden, head)]
    logprobs, entropy = token_logprobs(*ours, targets, 1.3, chunk_tokens)
    (logprobs * weights.float()).sum().backward()
    torch.testing.assert_close(logprobs.double(), expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(entropy.double(), -(distribution.exp() * distribution).sum(1), atol=1e-6, rtol=1e-6)
    for mine, reference_tensor in zip(ours, exact, strict=True):
        torch.testing.assert_close(mine.grad.double(), reference_tensor.grad, atol=1e-5, rtol=1e-5)  # type: ignore[union-attr]


def test_a_missing_folder_is_one_line_naming_the_setting(ranks: Ranks, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^model\.path: no folder .*nowhere$"):
        load_policy(
            str(tmp_path / "nowhere"),
            ranks,
            compute_dtype="float32",
            checkpointing=False,
            temperature=1.0,
            chunk_tokens=8,
        )


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (Gemma2Config(**COMMON, head_dim=8), "final_logit_softcapping"),
        (Gemma3Config(text_config=COMMON, vision_config={"hidden_size": 32}), "vision_config"),
    ],
)
def test_what_the_forward_pass_leaves_out_is_refused_by_name(
    config: Any, name: str, ranks: Ranks, tmp_path: Path
) -> None:
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"^model\.path: .* sets {name}, which is not supported in training$"):
        load_policy(str(tmp_path), ranks, compute_dtype="float32", checkpointing=False, temperature=1.0, chunk_tokens=8)


@pytest.mark.parametrize(
    ("device_type", "compute_dtype", "has_bf16", "is_said"),
    [
        ("cpu", "bfloat16", False, True),
        ("cpu", "bfloat16", True, False),
        ("cpu", "float32", False, False),
        ("cuda", "bfloat16", False, False),
    ],
)
def test_slow_bf16_is_said(
    monkeypatch: pytest.MonkeyPatch, device_type: str, compute_dtype: str, has_bf16: bool, is_said: bool
) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: has_bf16)
    assert (dtype_advice(device_type, compute_dtype) is not None) == is_said
