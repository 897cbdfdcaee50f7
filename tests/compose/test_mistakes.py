"""What a person gets wrong, in containers: one line that says what to do, and an end."""

import socket
from pathlib import Path

import pytest
from tests.compose.stack import Stack

pytestmark = [pytest.mark.compose, pytest.mark.timeout(900)]


def _error(stack: Stack) -> str:
    """The line with which `up` refused to go on."""
    done = stack.compose("run", "--rm", "init", check=False)
    stack.compose("down", "--volumes", check=False)
    assert done.returncode == 2, done.stdout + done.stderr
    (line,) = [line for line in (done.stdout + done.stderr).splitlines() if line.startswith("error: ")]
    return line


def test_a_wrong_value_is_named(clone: Path, command: list[str]) -> None:
    line = _error(Stack(clone, "flashrl-wrong", command, FLASHRL_ROLLOUT_QUANTIZATION="int9"))
    assert "quantization" in line
    assert "'int9' (from FLASHRL_ROLLOUT_QUANTIZATION)" in line


def test_up_ends_with_that_line_before_a_model_is_loaded(clone: Path, command: list[str]) -> None:
    stack = Stack(clone, "flashrl-wrong", command, FLASHRL_RECIPE="configs/none.toml")
    with stack.up() as process:
        assert process.wait(300) != 0
        assert not stack.running("rollout")
        # docker-compose 1 shows nothing of a container that ends before it has started all of them
        said = stack.log.read_text() + stack.compose("logs", "init").stdout
    assert "error: FLASHRL_RECIPE: the image has no configs/none.toml; it has configs/" in said


def test_a_folder_of_another_user_is_named_with_what_to_do(clone: Path, command: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "others"
    folder.mkdir(mode=0o755)
    (folder / "file").touch()
    line = _error(Stack(clone, "flashrl-owner", command, FLASHRL_RUNS=str(folder), FLASHRL_UID="4321"))
    assert "cannot be written by user 4321: on the host, `sudo chown 4321:1000 runs`" in line


def test_too_little_room_is_named(clone: Path, command: list[str]) -> None:
    line = _error(Stack(clone, "flashrl-room", command, FLASHRL_MIN_FREE_GIB="1000000"))
    assert "GiB of free space, 1e+06 are needed: make room, or set FLASHRL_RUNS" in line


def test_a_taken_port_is_named(clone: Path, command: list[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        stack = Stack(clone, "flashrl-port", command, FLASHRL_PORTS=port)
        with stack.up() as process:
            assert process.wait(300) != 0
        text = stack.log.read_text()
    assert f"127.0.0.1:{port}" in text
    assert "already" in text or "in use" in text
