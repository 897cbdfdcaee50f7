"""One clone of the committed files, as a person would have it, for all tests of the compose files."""

import shutil
import subprocess
from pathlib import Path

import pytest
from tests.compose.stack import ROOT, Stack, commands, run

pytestmark = pytest.mark.compose


def has_docker() -> bool:
    return shutil.which("docker") is not None and run(["docker", "info"], check=False).returncode == 0


@pytest.fixture(scope="session")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """HEAD; what is not committed does not count."""
    if not has_docker() or not commands():
        pytest.skip("no Docker engine or no compose command")
    folder = tmp_path_factory.mktemp("compose") / "flashrl"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(folder)], check=True)
    return folder


@pytest.fixture(scope="session")
def command() -> list[str]:
    return commands()[0]


SHORT = (
    "--set run.steps=12 --set run.stop_accuracy=0 --set run.stop_min_versions=0 --set eval.every=0 "
    "--set sampling.prompts_per_step=8 --set optim.mini_batch_prompts=8 --set checkpoint.every=2 "
    "--set checkpoint.export=false"
)


@pytest.fixture
def short(clone: Path, command: list[str], tmp_path: Path) -> Stack:
    """A run of twelve small steps with a folder of its own on the host."""
    runs = clone / "runs"
    if runs.exists():
        runs.rename(tmp_path / "runs-before")
    return Stack(clone, "flashrl-short", command, FLASHRL_TRAIN_ARGS=SHORT)
