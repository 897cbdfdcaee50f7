"""Folders that hold no model that can be served: refused in one line, before anything is loaded."""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from flashrl_rollout.model_check import check_folder
from flashrl_rollout.model_limits import check_supported

DENSE = {
    "architectures": ["SomeForCausalLM"],
    "is_multimodal_model": False,
    "runner_type": "generate",
    "is_encoder_decoder": False,
    "use_mla": False,
    "is_moe": False,
}


def _folder(folder: Path, config: object, *files: str) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    for file in files:
        (folder / file).touch()
    return folder


@pytest.mark.parametrize("weights", ["model.safetensors", "model.safetensors.index.json"])
def test_a_folder_with_config_and_weights_passes(tmp_path: Path, weights: str) -> None:
    check_folder(_folder(tmp_path, {"quantization_config": None, "text_config": None}, weights))


@pytest.mark.parametrize(
    ("config", "files", "message"),
    [
        ({}, [], "has neither model.safetensors nor model.safetensors.index.json (no weights)"),
        ({}, ["pytorch_model.bin"], "only .bin files; load and save it once with transformers"),
        ({"quantization_config": {"quant_method": "gptq"}}, ["model.safetensors"], "is quantized already (gptq)"),
        ({"quantization_config": {}, "compression_config": {"a": 1}}, ["model.safetensors"], "already (unknown)"),
        ({"text_config": {"quantization_config": {"quant_method": "fp8"}}}, ["model.safetensors"], "already (fp8)"),
        ({"vision_config": {"depth": 2}}, ["model.safetensors"], "takes more than text (vision_config)"),
        (["llama"], ["model.safetensors"], "holds no settings"),
    ],
)
def test_what_cannot_be_served_is_refused(tmp_path: Path, config: object, files: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as refusal:
        check_folder(_folder(tmp_path, config, *files))
    assert str(refusal.value).startswith("model: ")
    assert "\n" not in str(refusal.value)


def test_a_lora_adapter_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="is a LoRA adapter; merge it into its base model first"):
        check_folder(tmp_path)


def test_a_damaged_configuration_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"^model: config\.json of .* is not readable"):
        check_folder(tmp_path)


def test_dense_text_models_are_supported() -> None:
    check_supported(SimpleNamespace(**DENSE))


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ({"is_moe": True}, "mixtures of experts"),
        ({"use_mla": True, "is_moe": True}, "latent attention"),
        ({"is_multimodal_model": True}, "it takes more than text"),
        ({"is_encoder_decoder": True}, "it has an encoder"),
        ({"runner_type": "pooling"}, "it does not generate text"),
    ],
)
def test_other_kinds_are_refused_with_the_reason(facts: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=f"^model: SomeForCausalLM cannot be updated in place: {reason}"):
        check_supported(SimpleNamespace(**DENSE | facts))
