"""Everything a run needs to go on: sharded weights and optimizer, and the trainer's own small state.

Written aside and renamed, so that a checkpoint is there whole or not at all. Knows nothing of what the state means.
"""

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from huggingface_hub import save_torch_state_dict
from torch import nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.optim import Optimizer

from flashrl_trainer.distributed import Ranks
from flashrl_trainer.model import Policy

_STATE = "trainer.json"
_NAME = re.compile(r"^step-(\d{6,})$")


class CheckpointStore:
    """The `checkpoints/` folder of a run."""

    def __init__(self, folder: Path, ranks: Ranks, keep: int) -> None:
        self._folder, self._ranks, self._keep = folder, ranks, keep

    def save(self, step: int, policy: nn.Module, optimizer: Optimizer, state: Mapping[str, Any]) -> Path:
        """Write `checkpoints/step-NNNNNN` and delete the oldest ones beyond `keep`; OSError where there is no room."""
        target = self._path(step)
        aside = self._folder / f".{target.name}.partial"
        if self._ranks.is_main:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
        dist.barrier()
        model_state, optim_state = get_state_dict(policy, optimizer)
        with _failing_as(OSError, f"checkpoint {target} was not written"):
            state_dict_saver.save({"model": model_state, "optimizer": optim_state}, checkpoint_id=aside)
        dist.barrier()
        if self._ranks.is_main:
            sizes = {file.name: file.stat().st_size for file in sorted(aside.iterdir())}
            (aside / _STATE).write_text(json.dumps({"step": step, "files": sizes, "state": dict(state)}))
            shutil.rmtree(target, ignore_errors=True)
            aside.rename(target)
            self._prune()
        dist.barrier()
        return target

    def has(self, step: int) -> bool:
        """Whether that step's checkpoint is there, whole, by rank 0's view."""
        return self._ranks.on_main(lambda: _is_whole(self._path(step)))

    def _path(self, step: int) -> Path:
        return self._folder / f"step-{step:06d}"

    def latest(self) -> Path | None:
        """The newest whole checkpoint; truncated ones are passed over."""
        for folder in reversed(self._all()):
            if _is_whole(folder):
                return folder
        return None

    def load(self, folder: Path, policy: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
        """Restore weights and optimizer in place; the trainer's own state.

        ValueError for a folder that is damaged, or holds another model.
        """
        if not _is_whole(folder):
            raise ValueError(f"checkpoint {folder} is damaged or incomplete")
        model_state, optim_state = get_state_dict(policy, optimizer)
        state: dict[str, Any] = {"model": model_state, "optimizer": optim_state}
        with _failing_as(ValueError, f"checkpoint {folder} does not fit the model"):
            state_dict_loader.load(state, checkpoint_id=folder)
        set_state_dict(policy, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        restored: dict[str, Any] = json.loads((folder / _STATE).read_text())["state"]
        return restored

    def _all(self) -> list[Path]:
        """By step, the oldest first."""
        if not self._folder.is_dir():
            return []
        found = {int(match[1]): path for path in self._folder.iterdir() if (match := _NAME.match(path.name))}
        return [found[step] for step in sorted(found)]

    def _prune(self) -> None:
        whole = [folder for folder in self._all() if _is_whole(folder)]  # a damaged one is no reason to delete another
        for folder in whole[: -self._keep]:
            shutil.rmtree(folder)


@contextmanager
def _failing_as(kind: type[Exception], what: str) -> Iterator[None]:
    """CheckpointException is no Exception, and has every rank's traceback for its text."""
    try:
        yield
    except CheckpointException as error:
        reason, _ = next(iter(error.failures.values()))
        raise kind(f"{what}: {' '.join(str(reason).split())}") from error


def _is_whole(folder: Path) -> bool:
    try:
        sizes = json.loads((folder / _STATE).read_text())["files"]
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError):
        return False


def export(policy: Policy, tokenizer: Any, folder: Path, ranks: Ranks) -> None:
    """Write bf16 safetensors, config and tokenizer that transformers and vLLM load; tied tensors once."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    full: dict[str, Any] = get_model_state_dict(policy, options=options)
    if ranks.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        names = [name for name, _ in policy.lm.named_parameters()]
        weights = {name: full[f"lm.{name}"].to(torch.bfloat16).contiguous() for name in names}
        save_torch_state_dict(weights, str(folder))
        config: Any = policy.lm.config
        config.dtype = torch.bfloat16
        config.save_pretrained(folder)
        generation = getattr(policy.lm, "generation_config", None)
        if generation is not None:
            generation.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    dist.barrier()
