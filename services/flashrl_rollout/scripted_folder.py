"""The scripted engine with the names, weights and tokenizer of a Hugging Face folder, so that a real trainer fits it.

Knows the folder's files; its tokens are still a hash and no model's.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from transformers import AutoTokenizer

from flashrl_rollout.checkpoint_reader import Checkpoint
from flashrl_rollout.engine import EngineInfo
from flashrl_rollout.layer_selection import LayerSelection
from flashrl_rollout.scripted_engine import Faults, ScriptedEngine
from flashrl_rollout.stored_state import read_parts
from flashrl_rollout.tokenization import Tokenization
from flashrl_wire.layout import Storage, TensorSpec, WeightLayout
from flashrl_wire.messages import Quantization

_ROWS: dict[Quantization, Storage] = {"int8": "int8_rows", "fp8": "fp8_rows", "none": "bf16"}
_QUANTIZED = "_proj.weight"


def folder_layout(folder: Path, quantization: Quantization, keep_bf16: Sequence[str] = ()) -> WeightLayout:
    """The projections of every block in rows of codes, but for those that patterns keep, everything else in bf16."""
    selection = LayerSelection(keep_bf16=tuple(keep_bf16))

    def storage(name: str) -> Storage:
        is_kept = not name.endswith(_QUANTIZED) or selection.keeps(name.removesuffix(".weight"), {})
        return "bf16" if is_kept else _ROWS[quantization]

    shapes = Checkpoint(folder).shapes
    return WeightLayout.of(TensorSpec(name=name, shape=shape, storage=storage(name)) for name, shape in shapes.items())


def open_folder(
    folder: Path,
    quantization: Quantization = "int8",
    *,
    keep_bf16: Sequence[str] = (),
    token_s: float = 0.0,
    faults: Faults | None = None,
    kind: type[ScriptedEngine] = ScriptedEngine,
) -> ScriptedEngine:
    """An engine at version 0 with the folder's weights; ValueError for a folder that holds no checkpoint."""
    layout = folder_layout(folder, quantization, keep_bf16)
    config = json.loads((folder / "config.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenization = Tokenization(tokenizer, config["max_position_embeddings"])
    info = EngineInfo(
        model=str(folder),
        quantization=quantization,
        vocab_size=config["vocab_size"],
        max_model_len=config["max_position_embeddings"],
        tokenizer_hash=tokenization.hash,
    )
    return kind(
        layout,
        read_parts(folder, layout),
        info,
        tokenizer=tokenization,
        end_token=tokenizer.eos_token_id,
        token_s=token_s,
        faults=faults,
    )
