"""The command line in processes of its own: exit codes, one-line errors, signals."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.helpers.wire_trainer import TIMEOUT_S
from typer.testing import CliRunner

from flashrl_rollout.cli import app
from flashrl_rollout.config import RolloutConfig

START_LIMIT_S = 180.0  # for a crowded machine; nothing waits for it in vain


def command(*arguments: str, **variables: str) -> tuple[int, str, str]:
    """Exit code, output and errors of `flashrl-rollout`, inside this process."""
    clean = dict.fromkeys(name for name in os.environ if name.startswith("FLASHRL_"))
    done = CliRunner().invoke(app, list(arguments), env=clean | {"HF_HUB_OFFLINE": "1"} | variables)
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.stdout, done.stderr


def environment(**variables: str) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("FLASHRL_")}
    return inherited | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TERM": "dumb"} | variables


class Running:
    """A scripted service in a process of its own."""

    def __init__(self, options: dict[str, Any], **variables: str) -> None:
        settings = {"FLASHRL_ROLLOUT_PORT": "0", "FLASHRL_ROLLOUT_WEIGHTS_PORT": "0"} | variables
        self.process = subprocess.Popen(
            [sys.executable, "-m", "flashrl_rollout.scripted_service", json.dumps(options)],
            stderr=subprocess.PIPE, text=True, env=environment(**settings),
        )  # fmt: skip
        self.log = ""

    def read_until(self, pattern: str) -> re.Match[str]:
        """The first match in the log."""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log += line
            if found := re.search(pattern, line):
                return found
        raise AssertionError(f"{pattern} never came:\n{self.log}")

    def url(self) -> str:
        """Where it listens, once it is ready."""
        return self.read_until(r"ready on (http://\S+:\d+)").group(1)

    def end(self) -> tuple[int, str]:
        """Exit code and the rest of the log."""
        rest = self.process.communicate(timeout=START_LIMIT_S)[1]
        return self.process.returncode, self.log + rest


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Any]:
    """Starts scripted services and ends them with the test."""
    started: list[Running] = []

    def begin(options: dict[str, Any] | None = None, **variables: str) -> Running:
        started.append(Running(options or {}, **{"FLASHRL_ROLLOUT_STAGE_ROOT": str(tmp_path)} | variables))
        return started[-1]

    yield begin
    for running in started:
        running.process.kill()
        running.process.communicate()


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "error: model: is required"),
        (["--model", "/no/such/folder"], "error: model: there is no folder /no/such/folder"),
        (["--model", "org/no-such-model"], "error: model: there is no folder org/no-such-model, and the model hub"),
        (["--model", "m", "--max-num-seqs", "none"], "error: max_num_seqs: "),
        (["--model", "m", "--config", "/no/such.toml"], "error: config: /no/such.toml: No such file"),
    ],
)
def test_mistakes_exit_with_2_and_one_line(arguments: list[str], message: str) -> None:
    code, _, errors = command("serve", *arguments)
    assert code == 2
    assert errors.startswith(message)
    assert errors.count("\n") == 1


def test_unknown_variable_is_a_mistake_too() -> None:
    code, _, errors = command("serve", "--model", "m", FLASHRL_ROLLOUT_MODLE="x")
    assert (code, errors.count("\n")) == (2, 1)
    assert "modle: unknown setting; did you mean model?" in errors


def test_model_folder_without_a_model(tmp_path: Path) -> None:
    code, _, errors = command("serve", "--model", str(tmp_path))
    assert (code, "has no config.json" in errors) == (2, True)


def test_port_in_use_is_found_before_the_model_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").touch()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        for flag, other, name in (("--port", "--weights-port", "port"), ("--weights-port", "--port", "weights_port")):
            code, _, errors = command("serve", "--model", str(tmp_path), flag, port, other, "0")
            assert (code, errors.count("\n")) == (2, 1)
            assert errors.startswith(f"error: {name}: cannot listen on 127.0.0.1:{port}: Address already in use")


def test_beyond_loopback_without_keys_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").touch()
    code, _, errors = command("serve", "--model", str(tmp_path), "--host", "0.0.0.0", FLASHRL_TOKEN="t")
    assert (code, errors.count("\n")) == (2, 1)
    assert "CURVE keys (keys_dir)" in errors


def test_keys_are_written_once_and_explained(tmp_path: Path) -> None:
    folder = tmp_path / "keys"
    code, output, _ = command("keys", str(folder))
    assert code == 0
    assert f"--keys-dir {folder}/service" in output
    code, _, errors = command("keys", str(folder))
    assert (code, errors.count("\n")) == (2, 1)
    assert "never replaced" in errors


def test_help_names_every_setting() -> None:
    code, output, _ = command("serve", "--help", COLUMNS="200", TERM="dumb")
    assert code == 0
    for name in RolloutConfig.model_fields:
        assert f"--{name.replace('_', '-')} " in output


def test_program_is_installed_and_names_its_commands_without_loading_torch() -> None:
    code = "import sys; from flashrl_rollout.cli import main; sys.argv[1:] = ['--help']\ntry: main()\n"
    code += "finally: print('torch' in sys.modules, 'vllm' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert "serve" in done.stdout
    assert "keys" in done.stdout
    assert done.stdout.splitlines()[-1] == "False False"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_finishes_running_requests_and_exits_with_0(start: Any, number: signal.Signals, tmp_path: Path) -> None:
    running = start({"token_s": 0.05})
    body = {"prompts": ["hi"], "sampling": {"max_tokens": 20, "seed": 1}}
    with httpx.Client(base_url=running.url(), timeout=TIMEOUT_S) as http, ThreadPoolExecutor() as pool:
        waiting = pool.submit(http.post, "/generate", json=body)
        while "flashrl_active_requests 1.0" not in http.get("/metrics").text:
            assert not waiting.done()
        running.process.send_signal(number)
        running.read_until("stopping: 1 requests are running")
        assert waiting.result().status_code == 200
    code, log = running.end()
    assert code == 0, log
    assert list(tmp_path.iterdir()) == []
    assert "Traceback" not in log


def test_second_signal_ends_the_waiting(start: Any) -> None:
    running = start({"token_s": 5.0})
    with httpx.Client(base_url=running.url(), timeout=60) as http, ThreadPoolExecutor() as pool:
        waiting = pool.submit(http.post, "/generate", json={"prompts": ["hi"]})
        while "flashrl_active_requests 1.0" not in http.get("/metrics").text:
            assert not waiting.done()
        running.process.terminate()
        running.read_until("stopping: 1 requests are running")
        running.process.terminate()
        reply = waiting.result()
        assert (reply.status_code, reply.json()["error"]["message"]) == (503, "the service is stopping")
    assert running.end()[0] == 0


def test_service_answers_while_the_model_loads_and_can_be_stopped(start: Any) -> None:
    port = free_port()
    running = start({"start_s": 60}, FLASHRL_ROLLOUT_PORT=str(port))
    running.read_until("loading scripted")
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=TIMEOUT_S) as http:
        assert http.get("/health").status_code == 200
        ready = http.get("/ready")
        assert (ready.status_code, "starting" in ready.json()["error"]["message"]) == (503, True)
    began = time.monotonic()
    running.process.terminate()
    code, log = running.end()
    assert code == 0, log
    assert time.monotonic() - began < 30


def test_engine_that_dies_ends_the_process_with_1(start: Any) -> None:
    running = start({"faults": {"die_after_requests": 0}})
    with httpx.Client(base_url=running.url(), timeout=TIMEOUT_S) as http:
        reply = http.post("/generate", json={"prompts": ["hi"]})
        assert (reply.status_code, reply.json()["error"]["code"]) == (503, "not_ready")
    code, log = running.end()
    assert (code, "the engine has died" in log) == (1, True)


def test_one_of_several_engines_that_dies_ends_the_process_with_1(start: Any) -> None:
    running = start({"engines": [{}, {"faults": {"die_after_requests": 0}}]})
    with httpx.Client(base_url=running.url(), timeout=TIMEOUT_S) as http:
        assert http.post("/generate", json={"prompts": ["hi"]}).status_code == 200  # the first engine's
        assert http.post("/generate", json={"prompts": ["hi", "ho"]}).status_code == 503
    code, log = running.end()
    assert (code, "the engine has died" in log) == (1, True)


def test_engine_that_does_not_start_is_one_line_and_1(start: Any) -> None:
    code, log = start({"start_error": "device: there is\nno such thing"}).end()
    assert code == 1
    assert "the engine did not start: device: there is no such thing\n" in log
    assert "Traceback" not in log
