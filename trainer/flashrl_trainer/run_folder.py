"""A run's folder: its name, and which one `--resume` means. Knows nothing of what is written inside."""

import re
from datetime import datetime
from pathlib import Path

from flashrl_trainer.settings import RunSettings

AUTO = "auto"


def choose_folder(run: RunSettings, stem: str, resume: str, now: datetime) -> tuple[Path, bool]:
    """`(folder, whether it is gone on with)`; `stem` names runs that have no name of their own.

    `resume` is empty for a new run, `auto` for the newest run of the same name or stem if there is one, else a
    folder; one that was stopped before its first checkpoint begins anew. ValueError where a folder is missing, or a
    new run would write into an old one.
    """
    root = Path(run.dir)
    if resume == AUTO:
        newest = _newest(root, run.name or stem, exact=bool(run.name))
        return (newest, True) if newest else (root / (run.name or _stamped(stem, now)), False)
    if resume:
        folder = Path(resume)
        has_checkpoint = any((folder / "checkpoints").glob("step-*"))
        if not has_checkpoint and not (folder / "metrics.jsonl").exists():
            raise ValueError(f"--resume: {folder} holds no run")
        return folder, has_checkpoint
    folder = root / (run.name or _stamped(stem, now))
    if (folder / "metrics.jsonl").exists():
        raise ValueError(f"run.name: {folder} holds a run already; go on with --resume {folder} or choose another name")
    return folder, False


def _stamped(stem: str, now: datetime) -> str:
    return f"{stem}-{now:%Y%m%d-%H%M%S}"


def _newest(root: Path, name: str, *, exact: bool) -> Path | None:
    """The newest run that has a checkpoint to go on from."""
    pattern = re.compile(re.escape(name) + ("" if exact else r"-\d{8}-\d{6}"))
    runs = [path for path in (root.iterdir() if root.is_dir() else ()) if pattern.fullmatch(path.name)]
    return max((run for run in runs if any((run / "checkpoints").glob("step-*/trainer.json"))), default=None)
