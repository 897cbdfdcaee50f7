"""The bare engine as an arm: vLLM's AsyncLLM in a process of its own (`engine`), asked by lines of JSON.

Knows that process's command line and lines; knows nothing of vLLM.
"""

import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from flashrl_rollout.bench.arms import Answer, ArmFailedError, Launch
from flashrl_rollout.bench.process import Child, arm_environment
from flashrl_rollout.bench.settings import ArmName
from flashrl_rollout.bench.workload import Workload

_PROGRAM = "flashrl_rollout.bench.engine"
_LOADED = re.compile(r"Model loading took ([\d.]+) GiB")
_CACHE = re.compile(r"KV cache size: ([\d,]+) tokens")


class EngineArm:
    """One AsyncLLM with vLLM's defaults; every prompt is a call to its `generate`, and all are made at once."""

    def __init__(
        self, name: ArmName, command: Sequence[str], environ: Mapping[str, str], timeout_s: float, folder: Path
    ) -> None:
        """`command` starts it in `environ` (`engine_command`, `engine_environment`)."""
        self._name, self._command, self._environ, self._timeout_s = name, command, environ, timeout_s
        self._log = folder / f"engine-{name.quantization}.log"
        self._child: Child | None = None
        self._is_ready = False

    @property
    def name(self) -> ArmName:
        return self._name

    def start(self) -> None:
        self._child = Child(str(self._name), self._command, self._environ, self._log)

    def is_ready(self) -> bool:
        self._is_ready = self._is_ready or self._started().line(0.0) is not None
        return self._is_ready

    def ask(self, workload: Workload) -> Answer:
        child = self._started()
        before = child.cpu_s()
        child.send(json.dumps(workload.as_json()))
        line = child.line(self._timeout_s)
        if line is None:
            raise child.failed(f"did not answer within {self._timeout_s:g} s (timeout_s)")
        answer: dict[str, Any] = json.loads(line)
        return Answer(answer["seconds"], answer["lengths"], child.cpu_s() - before)

    def weight_bytes(self) -> int | None:
        found = _LOADED.search(self._started().log())  # on the CPU vLLM does not say
        return round(float(found.group(1)) * (1 << 30)) if found else None

    def cache_tokens(self) -> int | None:
        found = _CACHE.search(self._started().log())
        return int(found.group(1).replace(",", "")) if found else None

    def failed(self, why: str) -> ArmFailedError:
        return self._started().failed(why)

    def stop(self) -> None:
        if self._child is not None:
            if not self._is_ready:
                self._child.terminate()  # it reads its input once the model is loaded
            self._child.stop()

    def _started(self) -> Child:
        assert self._child is not None, "an arm is started before it is used"
        return self._child


def engine_command(name: ArmName, launch: Launch) -> list[str]:
    """The command line of the engine's process."""
    return [sys.executable, "-m", _PROGRAM, json.dumps(asdict(launch) | {"quantization": name.quantization})]


def engine_environment(name: ArmName, launch: Launch) -> dict[str, str]:
    """vLLM's own, but for threads; without quantization none of its plugins is loaded, ours neither."""
    environ = arm_environment(str(name)) | {"VLLM_LOGGING_LEVEL": "INFO", "VLLM_NO_USAGE_STATS": "1"}
    if name.quantization == "none":
        environ["VLLM_PLUGINS"] = ""
    if launch.threads:
        environ |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(launch.threads)}
    return environ
