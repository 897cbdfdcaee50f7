"""Shared memory that is full or read-only: an update is refused or undone, and the next one works."""

import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from tests.helpers.rig import running

from flashrl_rollout.stage_dir import StageDir
from flashrl_wire.frames import Failed

pytestmark = pytest.mark.anyio
Mount = Callable[[str], Path]


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Mount]:
    """`mount("size=2m")` is a file system in memory; needs root."""
    mounted: list[Path] = []

    def make(options: str) -> Path:
        folder = tmp_path / f"mount-{len(mounted)}"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        if subprocess.run(command, check=False, capture_output=True).returncode != 0:
            pytest.skip("needs the right to mount a file system")
        mounted.append(folder)
        return folder

    yield make
    for folder in mounted:
        subprocess.run(["umount", str(folder)], check=True)


def fill(file: Path) -> None:
    """Write until there is no room."""
    with suppress(OSError), file.open("wb", buffering=0) as opened:
        while True:
            opened.write(bytes(4096))


async def test_disk_that_fills_up_while_an_update_is_staged(mount: Mount) -> None:
    root = mount("size=2m")
    async with running(root) as rig:
        before, sample = await rig.weights(), await rig.sample()
        transfer_id = await rig.trainer.accepted(rig.snapshot(rig.state(1)))
        filler = root / "somebody's"
        fill(filler)
        update = rig.snapshot(rig.state(1))
        await rig.trainer.wire.push(transfer_id, update.payloads)
        outcome = await rig.trainer.wire.receive_last(transfer_id)
        assert isinstance(outcome, Failed)
        assert (outcome.code, "No space left on device" in outcome.message) == ("too_large", True)
        assert (await rig.trainer.begin(update)).status_code == 413  # now it is seen before anything is sent
        assert (await rig.weights(), await rig.sample()) == (before | {"run_id": "run-a"}, sample)
        assert rig.staged_files() == []
        filler.unlink()
        assert (await rig.trainer.publish(update)).json()["version"] == 1


def test_read_only_root_is_named_at_the_start(mount: Mount) -> None:
    with pytest.raises(ValueError, match=r"stage_root: cannot make .*: Read-only file system"):
        StageDir(mount("ro"), 8001)
