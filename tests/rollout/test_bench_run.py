"""The order of a benchmark with scripted arms, and the arms' processes around small programs."""

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.rollout.test_bench_load import settings
from tests.rollout.test_rollout_cli import command

from flashrl_rollout.bench.arms import Answer, ArmFailedError, Launch
from flashrl_rollout.bench.engine_arm import EngineArm, engine_environment
from flashrl_rollout.bench.process import Child, arm_environment
from flashrl_rollout.bench.report import ArmFacts, Turn
from flashrl_rollout.bench.run import load, run
from flashrl_rollout.bench.service_arm import ServiceArm, serve_command
from flashrl_rollout.bench.settings import ArmName
from flashrl_rollout.bench.workload import Workload, make_workload
from flashrl_rollout.config import load_config

INT8, NONE = ArmName("service", "int8"), ArmName("engine", "none")
WORKLOADS = [make_workload(settings(samples=2), 512, turn) for turn in range(3)]
LIMIT_S = 60.0


class ScriptedArm:
    """An arm that writes down what happens to it, and is ready when it has been asked so often."""

    def __init__(self, name: ArmName, events: list[str], polls: int = 2, faults: Sequence[str] = ()) -> None:
        self._name, self._events, self._polls, self._faults = name, events, polls, faults

    @property
    def name(self) -> ArmName:
        return self._name

    def start(self) -> None:
        self._events.append(f"start {self._name}")

    def is_ready(self) -> bool:
        if "never ready" in self._faults:
            return False
        self._polls -= 1
        return self._polls < 0

    def ask(self, workload: Workload) -> Answer:
        self._events.append(f"{self._name} {WORKLOADS.index(workload)}")
        if "dies" in self._faults:
            raise ArmFailedError(f"{self._name} died")
        cut = 1 if "short" in self._faults else 0
        return Answer(2.0, [[tokens - cut] * workload.samples for tokens in workload.max_tokens], 0.5)

    def weight_bytes(self) -> int | None:
        return 7

    def cache_tokens(self) -> int | None:
        return 640

    def failed(self, why: str) -> ArmFailedError:
        return ArmFailedError(f"{self._name} {why}")

    def stop(self) -> None:
        self._events.append(f"stop {self._name}")


class Seen:
    """What was shown."""

    def __init__(self) -> None:
        self.waiting: list[tuple[list[str], int]] = []
        self.turns: list[Turn] = []

    def loading(self, waiting: Sequence[ArmName], ready: int, elapsed_s: float) -> None:
        self.waiting.append((list(map(str, waiting)), ready))

    def warming(self, arm: ArmName) -> None:
        """Not looked at."""

    def turn(self, turn: Turn) -> None:
        self.turns.append(turn)


def test_all_arms_are_loaded_first_then_take_turns_in_rotated_order() -> None:
    events: list[str] = []
    seen = Seen()
    arms = [ScriptedArm(INT8, events), ScriptedArm(NONE, events, polls=0)]
    turns, facts = run(arms, WORKLOADS, seen, timeout_s=LIMIT_S, at_once=True)
    assert events[:8] == [
        "start service/int8", "start engine/none",
        "service/int8 0", "engine/none 0", "engine/none 1", "service/int8 1", "service/int8 2", "engine/none 2",
    ]  # fmt: skip
    assert sorted(events[8:]) == ["stop engine/none", "stop service/int8"]
    assert seen.waiting[0] == (["service/int8"], 1)
    assert seen.waiting[-1] == ([], 2)
    assert [(turn.round, str(turn.arm)) for turn in turns] == [
        (1, "engine/none"), (1, "service/int8"), (2, "service/int8"), (2, "engine/none")
    ]  # fmt: skip
    assert turns == seen.turns
    assert turns[0].tokens_per_s == 6 * 8 / 2.0
    assert facts[INT8] == ArmFacts(7, 640, facts[INT8].start_s)


def test_arms_that_share_a_profiled_gpu_start_one_after_the_other() -> None:
    seen = Seen()
    arms = [ScriptedArm(INT8, []), ScriptedArm(NONE, [])]
    run(arms, WORKLOADS, seen, timeout_s=LIMIT_S, at_once=False)
    assert all(len(waiting) <= 1 for waiting, _ in seen.waiting)


@pytest.mark.parametrize(
    ("faults", "message"),
    [
        (["dies"], "engine/none died"),
        (["short"], "engine/none drew 42 tokens where 48 were asked for"),
        (["never ready"], r"service/int8 was not ready after 0 s \(timeout_s\)"),
    ],
)
def test_whatever_fails_all_arms_are_stopped(faults: list[str], message: str) -> None:
    events: list[str] = []
    arms = [ScriptedArm(INT8, events), ScriptedArm(NONE, events, faults=faults)]
    timeout_s = 0.0 if faults == ["never ready"] else LIMIT_S
    with pytest.raises(ArmFailedError, match=message):
        run(arms, WORKLOADS, Seen(), timeout_s=timeout_s, at_once=True)
    assert sorted(events[-2:]) == ["stop engine/none", "stop service/int8"]


def wait_ready(arm: ServiceArm | EngineArm) -> None:
    load([arm], Seen(), timeout_s=LIMIT_S, at_once=True)


def test_the_service_arm_asks_a_whole_service(tmp_path: Path) -> None:
    variables = ("PORT=0", "WEIGHTS_PORT=0", f"STAGE_ROOT={tmp_path}")
    program = [sys.executable, "-m", "flashrl_rollout.scripted_service"]
    start = ["env", *(f"FLASHRL_ROLLOUT_{each}" for each in variables), *program]
    arm = ServiceArm(INT8, start, 2, LIMIT_S, tmp_path)
    try:
        wait_ready(arm)
        workload = make_workload(settings(samples=2, requests=6), 512, 1)
        answer = arm.ask(workload)
        assert answer.lengths == [[8, 8]] * 3
        assert answer.seconds > 0
        # two matrices of codes with scales and a norm: 64 x 32, 128 x 16, 64
        assert arm.weight_bytes() == 64 * 32 + 64 * 4 + 128 * 16 + 128 * 4 + 64 * 2
        assert arm.cache_tokens() is None
        with pytest.raises(ArmFailedError, match=r"service/int8 refused a request: .*outside the vocabulary"):
            arm.ask(make_workload(settings(), 100_000, 1))
    finally:
        arm.stop()


ENGINE = """
import json, sys
print(json.dumps({"ready": True}), flush=True)
print("Model loading took 1.5 GiB memory and 2 seconds", file=sys.stderr, flush=True)
print("GPU KV cache size: 12,345 tokens, ", file=sys.stderr, flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    if asked["seed"] is None:
        sys.exit("no seed!")
    print(json.dumps({"seconds": 3.0, "lengths": [[n] * asked["samples"] for n in asked["max_tokens"]]}), flush=True)
"""


def test_the_engine_arm_speaks_lines_and_shows_the_log_of_an_engine_that_dies(tmp_path: Path) -> None:
    arm = EngineArm(NONE, [sys.executable, "-c", ENGINE], arm_environment("engine/none"), LIMIT_S, tmp_path)
    try:
        wait_ready(arm)
        assert arm.ask(WORKLOADS[0]).lengths == [[8, 8]] * 3
        assert arm.ask(WORKLOADS[0]).seconds == 3.0
        assert arm.weight_bytes() == 3 << 29
        assert arm.cache_tokens() == 12345
        with pytest.raises(
            ArmFailedError, match=r"engine/none ended with exit code 1; the end of its log:\n(.*\n)*no s"
        ):
            arm.ask(make_workload(settings(seeded=False), 512, 0))
    finally:
        arm.stop()


def test_an_arm_that_does_not_start_shows_the_end_of_its_log(tmp_path: Path) -> None:
    arm = ServiceArm(INT8, [sys.executable, "-c", "raise SystemExit('no such model')"], 1, LIMIT_S, tmp_path)
    try:
        with pytest.raises(ArmFailedError, match=r"service/int8 ended with exit code 1; .*\nno such model"):
            wait_ready(arm)
    finally:
        arm.stop()


def test_stopping_a_child_ends_what_it_started(tmp_path: Path) -> None:
    program = (
        "import subprocess, sys; p = subprocess.Popen(['sleep', '600']); print(p.pid, flush=True); sys.stdin.read()"
    )
    child = Child("it", [sys.executable, "-c", program], arm_environment("it"), tmp_path / "log")
    line = child.line(LIMIT_S)
    assert line is not None
    grandchild = os.pidfd_open(int(line))
    assert not select.select([grandchild], [], [], 0)[0]
    child.stop()
    assert select.select([grandchild], [], [], LIMIT_S)[0]
    os.close(grandchild)


KILLED_BENCH = """
import os, pathlib, sys
from flashrl_rollout.bench.process import Child

child = Child("it", ["sleep", "600"], os.environ, pathlib.Path(sys.argv[1]), stops_by_signal=sys.argv[2] == "signal")
print(child._process.pid, flush=True)
sys.stdin.read()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's signal at a parent's death")
@pytest.mark.parametrize("mode", ["signal", "none"])
def test_a_service_is_told_to_stop_when_its_benchmark_is_killed(mode: str, tmp_path: Path) -> None:
    script = tmp_path / "bench.py"
    script.write_text(KILLED_BENCH)
    command = [sys.executable, str(script), str(tmp_path / "log"), mode]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as bench:
        assert bench.stdout is not None
        service = int(bench.stdout.readline())
        handle = os.pidfd_open(service)
        bench.kill()
        bench.wait(LIMIT_S)
        has_ended = bool(select.select([handle], [], [], 10.0 if mode == "signal" else 0.5)[0])
    os.close(handle)
    if not has_ended:
        os.kill(service, signal.SIGKILL)
    assert has_ended == (mode == "signal")


def test_arms_know_no_settings_of_a_service_and_an_engine_in_none_no_plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHRL_ROLLOUT_PORT", "7")
    monkeypatch.setenv("FLASHRL_TOKEN", "secret")
    launch: Any = type("Launch", (), {"threads": 2})
    environ = engine_environment(NONE, launch)
    assert not [name for name in environ if name.startswith("FLASHRL_")]
    assert (environ["VLLM_PLUGINS"], environ["OMP_NUM_THREADS"]) == ("", "2")
    assert environ["VLLM_CACHE_ROOT"].endswith("flashrl-bench/engine-none")
    assert "VLLM_PLUGINS" not in engine_environment(ArmName("engine", "int8"), launch)


def test_the_service_is_started_with_settings_that_it_has() -> None:
    launch = Launch(
        folder="m", max_model_len=384, max_num_seqs=256, gpu_memory_utilization=0.05, kv_cache_gib=1.5, device="cuda",
        threads=2, enforce_eager=True, seeded=True, timeout_s=900.0,
    )  # fmt: skip
    words = serve_command(INT8, launch, ["--engines", "2"])[4:]
    assert "--enforce-eager" in words
    words.remove("--enforce-eager")
    flags = {flag[2:].replace("-", "_"): value for flag, value in zip(words[::2], words[1::2], strict=True)}
    config = load_config(None, {}, flags)
    assert (config.model, config.quantization, config.device, config.engines) == ("m", "int8", "cuda", 2)
    assert (config.kv_cache_gib, config.gpu_memory_utilization, config.max_model_len) == (1.5, 0.05, 384)
    assert (config.port, config.weights_port, config.request_timeout_s, config.threads) == (0, 0, 900.0, 2)
    profiled = serve_command(INT8, replace(launch, kv_cache_gib=None, enforce_eager=False), [])
    assert not {"--kv-cache-gib", "--enforce-eager"} & set(profiled)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "tiny", "--samples", "3"], "error: requests: 256 sequences are no whole groups of 3 samples\n"),
        (["--model", "/no/such"], "error: model: there is no folder /no/such\n"),
        (["--shape", "tiny", "--json", "/no/such/file"], "error: json: cannot write /no/such/file: No such file"),
        (["--shape", "tiny", "--work-dir", "/no/such"], "error: work_dir: /no/such: No such file or directory\n"),
    ],
)
def test_mistakes_of_the_command_exit_with_2_and_one_line(arguments: list[str], message: str) -> None:
    code, _, errors = command("bench", *arguments)
    assert (code, errors.count("\n")) == (2, 1)
    assert errors.startswith(message)


def test_a_load_that_the_model_has_no_room_for(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"max_position_embeddings": 300, "vocab_size": 9}))
    (tmp_path / "model.safetensors").touch()
    code, _, errors = command("bench", "--model", str(tmp_path))
    assert code == 2
    assert "tokens: 128 of a prompt and up to 256 of an answer are more than the model's context of 300" in errors
