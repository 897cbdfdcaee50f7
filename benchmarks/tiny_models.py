"""Random checkpoints of a few hundred kilobytes, one a model family, and others a small step away from them.

Knows transformers' configurations and the files of a checkpoint; knows nothing of engines.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    DeepseekV3Config,
    Ernie4_5Config,
    Exaone4Config,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    Glm4Config,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    Olmo3Config,
    Phi3Config,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    SeedOssConfig,
    SmolLM3Config,
    StableLmConfig,
    Starcoder2Config,
)

SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 301,  # padded by the engine
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
_HEADS = SIZES | {"head_dim": 32}
_WINDOW = 16  # shorter than a sequence, so that it matters
_GPT2: dict[str, Any] = {
    "n_embd": 128, "n_layer": 1, "n_head": 4, "vocab_size": 301, "n_positions": 64,
    "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
_EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 64}

CORE: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(**SIZES, tie_word_embeddings=False),
    "llama_tied": lambda: LlamaConfig(**SIZES, tie_word_embeddings=True),
    "llama_one_kv_head": lambda: LlamaConfig(**SIZES | {"num_key_value_heads": 1}, attention_bias=True, mlp_bias=True),
    "qwen2": lambda: Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen3": lambda: Qwen3Config(**_HEADS, tie_word_embeddings=False),
    "mistral": lambda: MistralConfig(**_HEADS, sliding_window=_WINDOW),
    "gemma": lambda: GemmaConfig(**_HEADS),
    "gemma2": lambda: Gemma2Config(**_HEADS, sliding_window=_WINDOW, query_pre_attn_scalar=32),
    "gemma3": lambda: Gemma3TextConfig(**_HEADS, sliding_window=_WINDOW, query_pre_attn_scalar=32),
    "phi3": lambda: Phi3Config(**SIZES),
}
"""The families that the service promises."""

OTHERS: dict[str, Callable[[], Any]] = {
    "cohere": lambda: CohereConfig(**SIZES),
    "ernie4_5": lambda: Ernie4_5Config(**_HEADS),
    "exaone4": lambda: Exaone4Config(**_HEADS, sliding_window=_WINDOW),
    "glm4": lambda: Glm4Config(**_HEADS),
    "granite": lambda: GraniteConfig(**SIZES),
    "olmo2": lambda: Olmo2Config(**SIZES),
    "olmo3": lambda: Olmo3Config(**SIZES, sliding_window=_WINDOW),
    "seed_oss": lambda: SeedOssConfig(**_HEADS),
    "smollm3": lambda: SmolLM3Config(**SIZES),
    "stablelm": lambda: StableLmConfig(**SIZES),
    "starcoder2": lambda: Starcoder2Config(**SIZES, sliding_window=_WINDOW),
}
"""Families that nobody looked at before they worked."""

REFUSED: dict[str, Callable[[], Any]] = {
    "gpt2": lambda: GPT2Config(**_GPT2),
    "mixtral": lambda: MixtralConfig(**SIZES, num_local_experts=4),
    "qwen2_moe": lambda: Qwen2MoeConfig(**SIZES, **_EXPERTS, num_experts=4, shared_expert_intermediate_size=64),
    "deepseek_v3": lambda: DeepseekV3Config(
        **SIZES | {"num_key_value_heads": 4}, **_EXPERTS, n_routed_experts=4, n_group=1, topk_group=1,
        first_k_dense_replace=2, kv_lora_rank=32, q_lora_rank=None, qk_nope_head_dim=32, qk_rope_head_dim=32,
        v_head_dim=32,
    ),
}  # fmt: skip
"""Families that are refused at start."""

ALL = CORE | OTHERS | REFUSED

ODD = ("fp32", "fp16", "sharded", "extra_tensors", "head_twice")
"""The same weights as others would have saved them."""


def make(family: str, folder: Path, seed: int = 0, dtype: torch.dtype = torch.bfloat16, **save: Any) -> Path:
    """Write a random checkpoint of the family: every parameter differs from its initial value, norms and biases too."""
    torch.manual_seed(seed)
    model: Any = AutoModelForCausalLM.from_config(ALL[family]())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    model.to(dtype).save_pretrained(folder, **save)
    return folder


def make_odd(kind: str, folder: Path) -> Path:
    """A checkpoint in another type, in several files, or with tensors that the model has no use for; head tied."""
    if kind in ("fp32", "fp16"):
        return make("qwen2", folder, dtype=torch.float32 if kind == "fp32" else torch.float16)
    if kind == "sharded":
        return make("qwen2", folder, max_shard_size="200KB")
    make("llama_tied", folder)
    tensors = load_file(folder / "model.safetensors")
    if kind == "head_twice":
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    else:
        tensors |= {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(16) for i in range(2)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def step_away(model: Path, folder: Path, seed: int, share: float = 0.3) -> Path:
    """A copy of a checkpoint, in one file, with noise of a tenth of its spread on a share of each tensor's elements.

    A head that stands twice stays twice the same: vLLM and transformers take one that differs as not tied.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: values for file in sorted(model.glob("*.safetensors")) for name, values in load_file(file).items()}
    head, embedding = tensors.get("lm_head.weight"), tensors.get("model.embed_tokens.weight")
    is_twice = head is not None and embedding is not None and torch.equal(head, embedding)
    for name, values in tensors.items():
        noise = torch.randn(values.shape, generator=generator) * 0.1 * (values.float().std(correction=0) + 0.01)
        hit = torch.rand(values.shape, generator=generator) < share
        tensors[name] = torch.where(hit, values.float() + noise, values.float()).to(values.dtype)
    if is_twice:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    return save_like(model, folder, tensors)


def save_like(model: Path, folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """A checkpoint of these tensors, with the configuration and tokenizer of another."""
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("*.safetensors", "*.index.json"))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
