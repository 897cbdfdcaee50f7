"""A disk that is full when a checkpoint is due: one line, older checkpoints whole, and the run goes on from there."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.helpers.workshop import Straight, Workshop, rows, timeless

CHECKPOINTS_THAT_FIT = 2


@pytest.fixture
def runs(straight: Straight, workshop: Workshop) -> Iterator[Path]:
    """The runs' folder, on a file system with room for two checkpoints and no third; needs root."""
    checkpoint = straight.folder / "checkpoints/step-000001"
    size = sum(file.stat().st_size for file in checkpoint.iterdir())
    workshop.runs.mkdir()
    options = f"size={int(size * (CHECKPOINTS_THAT_FIT + 0.5))}"
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(workshop.runs)]
    if subprocess.run(command, check=False, capture_output=True).returncode != 0:
        pytest.skip("needs the right to mount a file system")
    yield workshop.runs
    workshop.end()
    subprocess.run(["umount", str(workshop.runs)], check=True)


def test_full_disk_at_a_checkpoint(straight: Straight, workshop: Workshop, runs: Path) -> None:
    service = workshop.service()
    ended = workshop.trainer(service.url, run__name="full").wait()
    run = runs / "full"
    assert (ended.code, "Traceback" in ended.errors) == (1, False), ended.errors
    line = ended.errors.splitlines()[-1]
    assert line.startswith(f"error: checkpoint {run}/checkpoints/step-000003 was not written, the older ones are whole")
    assert line.endswith(f": no space left on the disk of {run}/checkpoints")
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-000001", "step-000002"]
    subprocess.run(["mount", "-o", "remount,size=1g", str(runs)], check=True)
    resumed = workshop.trainer(service.url, f"--resume={run}").wait()
    assert resumed.code == 0, resumed.errors
    assert [timeless(row) for row in rows(run)] == [timeless(row) for row in rows(straight.folder)]
    assert service.weights()["digest"] == straight.digest
