"""Models that cannot be followed: refused in one line that says why, before any process is started for them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks import tiny_models
from safetensors.torch import save_file
from tests.helpers.real_engine import LoopThread

from flashrl_rollout.engine_settings import EngineSettings

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1200)]

ARCHITECTURES = {
    "mixtral": "MixtralForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
}
REASONS = {
    "mixtral": "mixtures of experts",
    "qwen2_moe": "mixtures of experts",
    "deepseek_v3": "latent attention",
}


def configured(family: str, folder: Path) -> Path:
    """A folder with the family's configuration and next to no weights: nothing may ask for them."""
    config: Any = tiny_models.REFUSED[family]()
    config.architectures = [ARCHITECTURES[family]]
    config.save_pretrained(folder)
    save_file({"lm_head.weight": torch.zeros(1)}, folder / "model.safetensors")
    return folder


def refusal(loop: LoopThread, folder: Path, quantization: Any = "int8") -> str:
    from flashrl_rollout.vllm_engine import VllmEngine

    with pytest.raises(ValueError) as found:
        loop.run(VllmEngine.start(EngineSettings(str(folder), quantization)))
    return str(found.value)


@pytest.mark.parametrize("family", REASONS)
def test_other_kinds_of_models_are_refused_by_name(family: str, loop: LoopThread, tmp_path: Path) -> None:
    from vllm import ModelRegistry

    registered = ModelRegistry.models[ARCHITECTURES[family]]
    ModelRegistry.register_model(
        ARCHITECTURES[family], registered.load_model_cls()
    )  # else it is looked at in a process
    folder = configured(family, tmp_path / family)
    message = refusal(loop, folder, "none" if family == "mixtral" else "int8")
    assert message.startswith(f"model: {ARCHITECTURES[family]} cannot be updated in place: {REASONS[family]}")
    assert "\n" not in message


def test_an_unknown_architecture_is_named(loop: LoopThread, tmp_path: Path) -> None:
    folder = configured("mixtral", tmp_path / "unknown")
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "nobody_knows"}
    (folder / "config.json").write_text(json.dumps(config))
    assert "nobody_knows" in refusal(loop, folder)


def test_a_damaged_file_is_named(loop: LoopThread, tmp_path: Path) -> None:
    folder = configured("mixtral", tmp_path / "damaged")
    (folder / "model.safetensors").write_bytes(b"\x01")
    assert refusal(loop, folder).startswith(f"checkpoint: {folder / 'model.safetensors'}: ")
