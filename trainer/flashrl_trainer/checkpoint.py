"""Everything a run needs to go on: sharded weights and optimizer, random states, and the trainer's own small state.

Written aside and renamed, so that a checkpoint is there whole or not at all. Knows nothing of what the state means.
"""

import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.optim import Optimizer

from flashrl_trainer.checkpoint_files import damage, looks_whole, read_content, seal, sync_folder
from flashrl_trainer.distributed import Ranks

_NAME = re.compile(r"^step-(\d{6,})$")
_ASIDE = ".step-*.partial"
FULL_BYTES = 1 << 20  # a disk with less free is full


class CheckpointStore:
    """The `checkpoints/` folder of a run. Every method that reads files is called on every rank."""

    def __init__(self, folder: Path, ranks: Ranks, keep: int) -> None:
        self._folder, self._ranks, self._keep = folder, ranks, keep
        self._damaged: set[Path] = set()  # found so; by its sizes alone a damaged one may look whole

    def save(self, step: int, policy: nn.Module, optimizer: Optimizer, state: Mapping[str, Any]) -> Path:
        """Write `checkpoints/step-NNNNNN`, then delete the oldest ones beyond `keep`.

        OSError of one line where there is no room; the older ones are all there then.
        """
        target = self._path(step)
        aside = self._folder / f".{target.name}.partial"
        try:
            with _failing_as(OSError, f"checkpoint {target} was not written, the older ones are whole", self._folder):
                self._ranks.on_main(lambda: _emptied(aside))
                live = _live_state(policy, optimizer, self._ranks, with_optimizer=bool(optimizer.state))
                state_dict_saver.save(live, checkpoint_id=aside)
                dist.barrier()
                seal(aside, {"step": step, "state": dict(state)}, self._ranks)
                self._ranks.on_main(lambda: _moved(aside, target))
        finally:  # a half of one would keep the disk full
            self._ranks.on_main(lambda: shutil.rmtree(aside, ignore_errors=True))
        self._damaged.discard(target)
        self._ranks.on_main(self._prune)
        return target

    def has(self, step: int) -> bool:
        """Whether that step's checkpoint is there, whole."""
        return not damage(self._path(step), self._ranks)

    def latest(self, report: Callable[[str], None] = lambda _: None) -> Path | None:
        """The newest whole checkpoint; `report` hears (on every rank) of each damaged one passed over."""
        for folder in reversed(self._ranks.on_main(self._all)):
            problem = damage(folder, self._ranks)
            if not problem:
                return folder
            self._damaged.add(folder)
            report(f"checkpoint {folder} is damaged ({problem}) and passed over")
        return None

    def load(self, folder: Path, policy: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
        """Restore weights, optimizer and random states from what `latest` found; the trainer's own state.

        ValueError for a folder that cannot be read, or holds another model.
        """
        if not self._ranks.on_main(lambda: looks_whole(folder)):
            raise ValueError(f"checkpoint {folder} is damaged or incomplete")
        saved = FileSystemReader(folder).read_metadata().state_dict_metadata
        has_stepped = any(key.startswith("optimizer.") for key in saved)
        state = _live_state(policy, optimizer, self._ranks, with_optimizer=has_stepped)
        if not all(f"random.{name}" in saved for name in state["random"]):
            state["random"] = {}  # a job of fewer ranks, or on another device: its random numbers are new ones
        with _failing_as(ValueError, f"checkpoint {folder} does not fit the model"):
            state_dict_loader.load(state, checkpoint_id=folder)
        if has_stepped:
            set_state_dict(policy, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        else:
            set_model_state_dict(policy, state["model"])
        _set_random_states(state["random"], self._ranks)
        restored: dict[str, Any] = read_content(folder)["state"]
        return restored

    def _path(self, step: int) -> Path:
        return self._folder / f"step-{step:06d}"

    def _all(self) -> list[Path]:
        """By step, the oldest first."""
        if not self._folder.is_dir():
            return []
        found = {int(match[1]): path for path in self._folder.iterdir() if (match := _NAME.match(path.name))}
        return [found[step] for step in sorted(found)]

    def _prune(self) -> None:
        """After a new one is whole. A damaged one is no reason to delete another; a trainer that died left halves."""
        whole = [folder for folder in self._all() if folder not in self._damaged and looks_whole(folder)]
        for folder in (*whole[: -self._keep], *self._folder.glob(_ASIDE)):
            shutil.rmtree(folder)


def _live_state(policy: nn.Module, optimizer: Optimizer, ranks: Ranks, *, with_optimizer: bool) -> dict[str, Any]:
    state: dict[str, Any] = {"random": _random_states(ranks)}
    if not with_optimizer:  # torch would have it make a step for its state, which counts as one ever after
        return state | {"model": get_model_state_dict(policy)}
    model, optim = get_state_dict(policy, optimizer)
    return state | {"model": model, "optimizer": optim}


def _random_states(ranks: Ranks) -> dict[str, Tensor]:
    """torch's, which dropout draws from; every rank has its own."""
    states = {f"cpu{ranks.rank}": torch.get_rng_state()}
    if ranks.device.type == "cuda":
        states[f"cuda{ranks.rank}"] = torch.cuda.get_rng_state(ranks.device)
    return states


def _set_random_states(states: Mapping[str, Tensor], ranks: Ranks) -> None:
    if (cpu := states.get(f"cpu{ranks.rank}")) is not None:
        torch.set_rng_state(cpu)
    if (cuda := states.get(f"cuda{ranks.rank}")) is not None:
        torch.cuda.set_rng_state(cuda, ranks.device)


def _emptied(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _moved(aside: Path, target: Path) -> None:
    shutil.rmtree(target, ignore_errors=True)  # only a damaged one is written again
    aside.rename(target)
    sync_folder(target.parent)


@contextmanager
def _failing_as(kind: type[Exception], what: str, written: Path | None = None) -> Iterator[None]:
    """CheckpointException is no Exception, and has every rank's traceback for its text.

    Where the disk of `written` is full, that is the reason: torch says something about positions in a file.
    """
    try:
        yield
    except (CheckpointException, OSError) as error:
        raise kind(f"{what}: {_reason(error, written)}") from error


def _reason(error: CheckpointException | OSError, written: Path | None) -> str:
    if written is not None and written.exists() and shutil.disk_usage(written).free < FULL_BYTES:
        return f"no space left on the disk of {written}"
    if isinstance(error, OSError):
        return error.strerror or str(error)
    reason, _ = next(iter(error.failures.values()))
    return " ".join(str(reason).split())
