"""Random weights in the shape of a known model: `python -m flashrl_rollout.bench.shapes NAME FOLDER`.

Knows architectures and a checkpoint's files; knows nothing of engines. Throughput depends on shapes and not on values.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from flashrl_rollout.bench.shape_names import SHAPES

_STD = 0.02
_SHARD_BYTES = 4 << 30


def write_shape(name: str, folder: Path, device: str, seed: int = 0) -> None:
    """A bf16 checkpoint of SHAPES[name] with a tokenizer of as many words, neither with an end token."""
    config = AutoConfig.for_model(**SHAPES[name], eos_token_id=None, bos_token_id=None)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    _write_tokenizer(folder, config.vocab_size)
    shapes = {key: tuple(value.shape) for key, value in model.named_parameters()}
    if config.tie_word_embeddings:
        shapes.pop("lm_head.weight", None)
    _write_shards(folder, _random_tensors(shapes, device, seed))


def _random_tensors(shapes: dict[str, tuple[int, ...]], device: str, seed: int) -> Iterator[tuple[str, Tensor]]:
    """Norms are 1, all else is normal; one tensor at a time is on the device."""
    generator = torch.Generator(device).manual_seed(seed)
    for name, shape in shapes.items():
        values = torch.ones(shape, dtype=torch.bfloat16, device=device)
        if not name.endswith("norm.weight"):
            values.normal_(0.0, _STD, generator=generator)
        yield name, values.cpu()


def _write_shards(folder: Path, tensors: Iterator[tuple[str, Tensor]]) -> None:
    files: dict[str, str] = {}
    shard: dict[str, Tensor] = {}

    def flush() -> None:
        file = f"model-{len(set(files.values())):05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        files.update(dict.fromkeys(shard, file))
        shard.clear()

    for name, values in tensors:
        shard[name] = values
        if sum(held.nbytes for held in shard.values()) >= _SHARD_BYTES:
            flush()
    if shard:
        flush()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))


def _write_tokenizer(folder: Path, vocab_size: int) -> None:
    """Words t0, t1, ...: the service needs a tokenizer, and this one has an id for every row of the embedding."""
    words = Tokenizer(WordLevel({f"t{index}": index for index in range(vocab_size)}, unk_token="t0"))
    words.pre_tokenizer = WhitespaceSplit()
    tokenizer: Any = PreTrainedTokenizerFast(tokenizer_object=words)
    tokenizer.save_pretrained(folder)
    config = folder / "tokenizer_config.json"
    # said outright: the architecture's own tokenizer class would add its usual ones
    config.write_text(json.dumps(json.loads(config.read_text()) | {"eos_token": None, "pad_token": None}))


if __name__ == "__main__":
    write_shape(sys.argv[1], Path(sys.argv[2]), "cuda" if torch.cuda.is_available() else "cpu")
