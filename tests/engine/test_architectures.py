"""Models of several families, cut over two ranks: each rank finds its share, and together they hold every element."""

import json
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks import tiny_models
from tests.helpers.real_engine import command, environment
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from flashrl_rollout import rank_replies, stored_state
from flashrl_rollout.layer_selection import LayerSelection

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1200)]

SIZES = tiny_models.SIZES
ONE_KEY_HEAD = SIZES | {"num_key_value_heads": 1}  # which both ranks then hold
FAMILIES: dict[str, Any] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**ONE_KEY_HEAD, tie_word_embeddings=False)),
    "partly": lambda: LlamaForCausalLM(LlamaConfig(**ONE_KEY_HEAD, tie_word_embeddings=False)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=True)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=32, tie_word_embeddings=False)),
    "phi3": lambda: Phi3ForCausalLM(Phi3Config(**SIZES)),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, head_dim=32)),
    "gpt2": lambda: GPT2LMHeadModel(tiny_models.REFUSED["gpt2"]()),
}

# qkv has (4 + 2) heads x 32 x 128 = 24,576 elements, gate and up 2 x 192 x 128 = 49,152. The two ranks, which both hold
# the only key head, have 32,768 elements of qkv between them
PARTLY = json.dumps({"partly": LayerSelection(keep_bf16=("*.0.*",), quantize_layers=24_577).additional_config()})


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A random checkpoint of each family, biases and norms included."""
    torch.manual_seed(0)
    base = tmp_path_factory.mktemp("families")
    for name, make in FAMILIES.items():
        model = make()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.05)
        model.to(torch.bfloat16).save_pretrained(base / name)
    return {name: base / name for name in FAMILIES}


@pytest.fixture(scope="module")
def replies(folders: dict[str, Path]) -> list[dict[str, Any]]:
    """What each of two ranks found in every model."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    ranks = [
        subprocess.Popen(
            command("open_models.py", [rank, "2", port, "flashrl_int8", PARTLY, *map(str, folders.values())]),
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]
    outputs = [rank.communicate(timeout=600) for rank in ranks]
    return [json.loads(out.splitlines()[-1]) if out.strip() else pytest.fail(err[-3000:]) for out, err in outputs]


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in ("gpt2", "partly")])
def test_two_ranks_hold_what_the_checkpoint_says(
    family: str, folders: dict[str, Path], replies: list[dict[str, Any]]
) -> None:
    ranks = [reply[family] for reply in replies]
    rank_replies.check(ranks)
    layout = rank_replies.layout(ranks)
    assert rank_replies.digests(ranks) == stored_state.digests(stored_state.read_parts(folders[family], layout))
    quantized = [spec.name for spec in layout.tensors if spec.storage == "int8_rows"]
    assert quantized == sorted(spec.name for spec in layout.tensors if spec.name.endswith("_proj.weight"))
    assert all(not rank["unused"] for rank in ranks)


def test_a_layers_size_is_that_of_the_whole_layer(replies: list[dict[str, Any]]) -> None:
    ranks = [reply["partly"] for reply in replies]
    rank_replies.check(ranks)
    quantized = [spec.name for spec in rank_replies.layout(ranks).tensors if spec.storage == "int8_rows"]
    assert quantized == ["model.layers.1.mlp.gate_proj.weight", "model.layers.1.mlp.up_proj.weight"]


def test_tied_heads_are_held_once(replies: list[dict[str, Any]]) -> None:
    heads = {
        family: any(spec["name"] == "lm_head.weight" for spec in replies[0][family]["tensors"])
        for family in ("llama", "qwen2", "qwen3")
    }
    assert heads == {"llama": True, "qwen2": False, "qwen3": True}


def test_a_model_whose_loader_transposes_is_refused_by_name(replies: list[dict[str, Any]]) -> None:
    assert "transformer.h.0.attn.c_attn.weight" in replies[0]["gpt2"]["error"]
