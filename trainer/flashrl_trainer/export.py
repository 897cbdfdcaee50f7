"""The policy as a folder that transformers and vLLM load: bf16 safetensors, config and tokenizer.

Written aside and renamed, like a checkpoint. Knows nothing of optimizers and runs.
"""

import shutil
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from flashrl_trainer.distributed import Ranks
from flashrl_trainer.model import Policy


def export(policy: Policy, tokenizer: Any, folder: Path, ranks: Ranks) -> None:
    """Put the policy at `folder`, in place of what is there, tied tensors once; OSError of one line where it cannot."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    full: dict[str, Any] = get_model_state_dict(policy, options=options)
    ranks.on_main(lambda: _replace(policy, tokenizer, full, folder))


def _replace(policy: Policy, tokenizer: Any, full: dict[str, Any], folder: Path) -> None:
    aside = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        names = [name for name, _ in policy.lm.named_parameters()]
        _write(policy, tokenizer, {name: full[f"lm.{name}"] for name in names}, aside)
        shutil.rmtree(folder, ignore_errors=True)
        aside.rename(folder)
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise OSError(f"export {folder} was not written: {' '.join(reason.split())}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _write(policy: Policy, tokenizer: Any, full: dict[str, Tensor], folder: Path) -> None:
    weights = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in full.items()}
    save_torch_state_dict(weights, str(folder))
    config: Any = policy.lm.config
    config.dtype = torch.bfloat16
    config.save_pretrained(folder)
    generation = getattr(policy.lm, "generation_config", None)
    if generation is not None:
        generation.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
