"""The model's folder as a benchmark needs it: no token that ends an answer, and the size of the cache for a load.

Knows Hugging Face's JSON files; knows nothing of weights.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import huggingface_hub

from flashrl_rollout.model_check import check_model

_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
_BYTES = 2  # keys and values are bf16
_BLOCK = 128  # tokens of the largest block in vLLM, which the CPU has
_SLACK = 1.05
_LEAST_GIB = 0.125


def find_folder(model: str) -> Path:
    """The model's folder, fetched from the model hub where `model` is no folder; ValueError if there is none."""
    check_model(model)
    return (
        Path(model) if Path(model).is_dir() else Path(huggingface_hub.snapshot_download(model, allow_patterns=_FILES))
    )


def without_end(model: Path, folder: Path) -> Path:
    """`folder` as the same model by links, but with no end token, so that every answer has the length asked for.

    The wire has no flag to ignore an end token, and should not have one for a benchmark's sake.
    """
    folder.mkdir()
    for file in model.iterdir():
        if file.is_file() and file.name not in _CHANGED:
            (folder / file.name).symlink_to(file.resolve())
    for name, change in _CHANGED.items():
        if (model / name).is_file():
            values = json.loads((model / name).read_text())
            (folder / name).write_text(json.dumps(values | change))
    return folder


_CHANGED: dict[str, dict[str, None]] = {
    "config.json": {"eos_token_id": None},
    "generation_config.json": {"eos_token_id": None},
    "tokenizer_config.json": {"eos_token": None},
    "special_tokens_map.json": {"eos_token": None},
}


def read_config(folder: Path) -> dict[str, Any]:
    """The text model's part of config.json."""
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    text: dict[str, Any] = config.get("text_config", config)
    return text


def kv_cache_gib(config: dict[str, Any], prompt_tokens: int, lengths: Sequence[int], max_num_seqs: int) -> float:
    """GiB in which the longest `max_num_seqs` sequences (tokens of their answers: `lengths`) fit at a time.

    ValueError where the configuration does not say how large keys and values are.
    """
    longest = sorted(lengths, reverse=True)[:max_num_seqs]
    blocks = sum(-(-(prompt_tokens + length) // _BLOCK) for length in longest)
    num_bytes = blocks * _BLOCK * _bytes_per_token(config)
    return max(_LEAST_GIB, round(num_bytes * _SLACK / (1 << 30), 3))


def _bytes_per_token(config: dict[str, Any]) -> int:
    try:
        heads = config["num_attention_heads"]
        head_dim = config.get("head_dim") or config["hidden_size"] // heads
        kv_heads = config.get("num_key_value_heads") or heads
        return int(2 * config["num_hidden_layers"] * kv_heads * head_dim * _BYTES)
    except (KeyError, TypeError) as error:
        raise ValueError(f"kv_cache_gib: config.json has no {error}, so name the size of the cache") from error
