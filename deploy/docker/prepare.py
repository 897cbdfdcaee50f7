"""What `compose up` does before anything else: look whether it can work, and make keys and token into volumes.

Says what is wrong in one line, before a model is loaded. Knows settings, folders and owners; knows nothing of Docker.
"""

import os
import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from start import STATE, End

from flashrl_rollout.config import load_config as load_rollout
from flashrl_rollout.security import read_keys, read_token, write_keys
from flashrl_trainer.config import load_config as load_trainer

RUNS, KEYS = Path("/runs"), Path("/keys")
OWNED = (Path("/cache"), STATE, Path("/prometheus"))
SIDES = ("service", "trainer")
USAGE = 2


def main(arguments: list[str], environ: Mapping[str, str]) -> int:
    """0, or 2 with a line that says what to do. With --rotate: keys and token anew."""
    try:
        uid, gid = (number(environ, name) for name in ("FLASHRL_UID", "FLASHRL_GID"))
        check_settings(environ)
        take_over(RUNS, uid, gid)
        check_runs(RUNS, uid, gid, float(environ.get("FLASHRL_MIN_FREE_GIB") or 1))
        if "--rotate" in arguments or not has_keys(KEYS):
            make_keys(KEYS, uid, gid)
            print("made keys and a token")
        for folder in OWNED:
            os.chown(folder, uid, gid)
        End(STATE).reset()
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return USAGE
    return 0


def number(environ: Mapping[str, str], name: str) -> int:
    """A user or group of the host."""
    value = environ.get(name, "")
    if not value.isdecimal() or int(value) == 0:
        raise ValueError(f"{name}: must be the number of a user or group other than root, got {value!r}")
    return int(value)


def check_settings(environ: Mapping[str, str]) -> None:
    """ValueError where the settings of either side are wrong, or do not fit the other's."""
    recipe = Path(environ["FLASHRL_RECIPE"])
    if not recipe.is_file():
        known = ", ".join(sorted(str(path) for path in Path("configs").glob("*.toml")))
        raise ValueError(f"FLASHRL_RECIPE: the image has no {recipe}; it has {known}")
    service = load_rollout(None, environ, {})
    trainer = load_trainer(recipe, [], environ)
    for name, ours, theirs in (
        ("QUANTIZATION", service.quantization, trainer.rollout.quantization),
        ("MODEL", service.model, trainer.model.path),
    ):
        if ours != theirs:
            raise ValueError(f"FLASHRL_ROLLOUT_{name}: is {ours}, but FLASHRL_RECIPE={recipe} is for {theirs}")


def take_over(folder: Path, uid: int, gid: int) -> None:
    """Docker makes a missing folder of the host as root's: give it, while it is empty, to who will write there."""
    if folder.stat().st_uid == 0 and not any(folder.iterdir()):
        os.chown(folder, uid, gid)


def check_runs(folder: Path, uid: int, gid: int, min_free_gib: float) -> None:
    """ValueError where the run folder could not be written, or has no room."""
    status = folder.stat()
    bits = {status.st_uid: 0o300}.get(uid) or {status.st_gid: 0o030}.get(gid) or 0o003
    if status.st_mode & bits != bits:
        raise ValueError(
            f"the folder of runs belongs to user {status.st_uid} and cannot be written by user {uid}: on the host, "
            f"`sudo chown {uid}:{gid} runs`, or set FLASHRL_UID={status.st_uid} FLASHRL_GID={status.st_gid}"
        )
    free_gib = shutil.disk_usage(folder).free / 2**30
    if free_gib < min_free_gib:
        raise ValueError(
            f"the folder of runs has {free_gib:.1f} GiB of free space, {min_free_gib:g} are needed: make room, or set "
            "FLASHRL_RUNS to a folder on another disk"
        )


def has_keys(folder: Path) -> bool:
    """Whether both sides have keys, and the same token."""
    try:
        read_keys(folder / "service")
        tokens = {read_token(folder / side / "token", {}) for side in SIDES}
    except ValueError:
        return False
    return len(tokens) == 1 and (folder / "trainer" / "trainer.key_secret").is_file()


def make_keys(folder: Path, uid: int, gid: int) -> None:
    """New keys and a new token in `folder`/service and `folder`/trainer, readable by `uid` alone."""
    with tempfile.TemporaryDirectory() as scratch:
        made = Path(scratch) / "keys"
        write_keys(made)
        for side in SIDES:
            for old in (folder / side).iterdir():
                shutil.rmtree(old) if old.is_dir() else old.unlink()
            shutil.copytree(made / side, folder / side, dirs_exist_ok=True)
            for path in (folder / side, *(folder / side).rglob("*")):
                os.chown(path, uid, gid)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], os.environ))
