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
    "--set run.steps=8 --set run.stop_accuracy=0 --set run.stop_min_versions=0 --set eval.every=0 "
    "--set sampling.prompts_per_step=4 --set sampling.samples_per_prompt=4 --set optim.mini_batch_prompts=4 "
    "--set sampling.max_attempts=1 --set sampling.dynamic=false --set checkpoint.every=2 "
    "--set checkpoint.export=false"
)
# the scripted engine's texts are noise, and so is a comparison with the answer: rewards of both kinds in every group
SCRIPTED = f"{SHORT} --set data.reward=operator:lt --set sampling.max_tokens=32"


@pytest.fixture(params=["scripted", "vllm"])
def short(clone: Path, command: list[str], tmp_path: Path, request: pytest.FixtureRequest) -> Stack:
    """A run of eight small steps with a folder of its own on the host; `-k scripted` takes minutes."""
    if request.param == "vllm":
        return Stack(
            clone,
            "flashrl-short",
            command,
            FLASHRL_TRAIN_ARGS=SHORT,
            FLASHRL_RUNS=str(tmp_path / "runs"),
            FLASHRL_PORTS="8100-8109",
        )
    files = ["-f", "compose.yaml", "-f", "tests/compose/scripted.yaml"]
    return Stack(
        clone,
        "flashrl-short",
        [*command, *files],
        FLASHRL_TRAIN_ARGS=SCRIPTED,
        FLASHRL_RUNS=str(tmp_path / "runs"),
        FLASHRL_PORTS="8100-8109",
    )
