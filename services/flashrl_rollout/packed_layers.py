"""What vLLM fuses in a model, asked of vLLM's class for it, and patterns checked against that before anything starts.

Knows vLLM's model classes and a checkpoint's names; knows nothing of what is done with a selection.
"""

from pathlib import Path
from typing import Any

from pydantic import ValidationError
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.model_loader.utils import get_model_architecture

from flashrl_rollout.checkpoint_reader import Checkpoint
from flashrl_rollout.layer_selection import LayerSelection, Packed

_WEIGHT = ".weight"


def describe_model(model: str) -> Any:
    """vLLM's ModelConfig of a folder or a name on the model hub; ValueError of one line where it has none."""
    try:
        return EngineArgs(model=model, dtype="bfloat16").create_model_config()
    except ValidationError as error:
        raise ValueError(error.errors()[0]["msg"].removeprefix("Value error, ")) from error


def packed_layers(model_config: Any) -> Packed:
    """Fused layers and their parts by last name, of vLLM's ModelConfig; empty for a model that fuses nothing."""
    model_class, _ = get_model_architecture(model_config)
    return dict(getattr(model_class, "packed_modules_mapping", None) or {})


def check_patterns(selection: LayerSelection, model_config: Any, folder: Path) -> None:
    """ValueError for a pattern of `keep_bf16` that fits nothing in the checkpoint, or a part of a fused layer only."""
    names = (name.removesuffix(_WEIGHT) for name in Checkpoint(folder).shapes if name.endswith(_WEIGHT))
    selection.check(names, packed_layers(model_config))
