"""Whether there is a model to load, before a minute is spent on loading it.

Knows folders and the model hub; knows nothing of what a model contains.
"""

from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError


def check_model(model: str) -> None:
    """ValueError unless `model` is a folder with a config.json or a model that the hub or its cache has."""
    folder = Path(model)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ValueError(f"model: the folder {model} has no config.json")
        return
    if folder.is_absolute() or model.startswith((".", "~")) or model.count("/") != 1:
        raise ValueError(f"model: there is no folder {model}")
    try:
        huggingface_hub.hf_hub_download(model, "config.json")
    except HFValidationError as error:
        raise ValueError(f"model: {model} is neither a folder nor a name on the model hub") from error
    except RepositoryNotFoundError as error:
        raise ValueError(f"model: there is no folder {model}, and the model hub has none of this name") from error
    except (LocalEntryNotFoundError, OSError) as error:
        raise ValueError(f"model: there is no folder {model}, and the model hub cannot be reached") from error
