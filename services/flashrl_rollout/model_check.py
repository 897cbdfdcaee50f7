"""Whether there is a model to load, before a minute is spent on loading it.

Knows folders, the model hub and what a folder says about itself; knows nothing of architectures (`model_limits`).
"""

import json
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

_MORE_THAN_TEXT = ("vision_config", "audio_config")
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")


def check_model(model: str) -> None:
    """ValueError unless `model` is a folder that can be loaded or a model that the hub or its cache has."""
    folder = Path(model)
    if folder.is_dir():
        check_folder(folder)
        return
    if folder.is_absolute() or model.startswith((".", "~")) or model.count("/") != 1:
        raise ValueError(f"model: there is no folder {model}")
    try:
        config = huggingface_hub.hf_hub_download(model, "config.json")
    except HFValidationError as error:
        raise ValueError(f"model: {model} is neither a folder nor a name on the model hub") from error
    except RepositoryNotFoundError as error:
        raise ValueError(f"model: there is no folder {model}, and the model hub has none of this name") from error
    except (LocalEntryNotFoundError, OSError) as error:
        raise ValueError(f"model: there is no folder {model}, and the model hub cannot be reached") from error
    _check_config(model, Path(config))


def check_folder(folder: Path) -> None:
    """ValueError unless the folder holds a language model's configuration and unquantized safetensors weights."""
    if not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            raise ValueError(f"model: {folder} is a LoRA adapter; merge it into its base model first")
        raise ValueError(f"model: the folder {folder} has no config.json")
    _check_config(str(folder), folder / "config.json")
    if not any((folder / name).is_file() for name in _WEIGHTS):
        others = (
            "only .bin files; load and save it once with transformers" if any(folder.glob("*.bin")) else "no weights"
        )
        raise ValueError(f"model: {folder} has neither {_WEIGHTS[0]} nor {_WEIGHTS[1]} ({others})")


def _check_config(model: str, file: Path) -> None:
    try:
        config = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"model: config.json of {model} is not readable: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"model: config.json of {model} holds no settings")
    for kind in _MORE_THAN_TEXT:
        if config.get(kind):
            raise ValueError(
                f"model: {model} takes more than text ({kind}); save its language model as a checkpoint of its own"
            )
    text = config.get("text_config")
    for settings in (config, text if isinstance(text, dict) else {}):
        found = settings.get("quantization_config") or settings.get("compression_config")
        if found:
            method = found.get("quant_method", "unknown") if isinstance(found, dict) else found
            raise ValueError(
                f"model: {model} is quantized already ({method}); give the bf16 model, the service quantizes it itself"
            )
