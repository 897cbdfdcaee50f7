"""The service as an arm: `flashrl-rollout serve` in a process of its own, asked over HTTP as the trainer asks.

Knows the command line and two routes; knows nothing of rounds or other arms.
"""

import asyncio
import json
import re
import sys
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import httpx

from flashrl_rollout.bench.arms import Answer, ArmFailedError, Launch
from flashrl_rollout.bench.process import Child, arm_environment
from flashrl_rollout.bench.settings import ArmName
from flashrl_rollout.bench.workload import Workload

_READY = re.compile(r"ready on (http://\S+:\d+)")
_CONTROL_TIMEOUT_S = 30.0
_REQUESTS_PER_CLIENT = 16  # httpx goes through all connections for every request: 256 on one client cost it seconds


class ServiceArm:
    """One service on free ports; every request has `prompts_per_request` prompts and all are sent at once."""

    def __init__(
        self, name: ArmName, command: Sequence[str], prompts_per_request: int, timeout_s: float, folder: Path
    ) -> None:
        """`command` starts it (`serve_command`)."""
        self._name, self._command, self._prompts_per_request = name, command, prompts_per_request
        self._timeout_s = timeout_s
        self._log = folder / f"service-{name.quantization}.log"
        self._child: Child | None = None
        self._url = ""

    @property
    def name(self) -> ArmName:
        return self._name

    def start(self) -> None:
        environ = arm_environment(str(self._name))
        self._child = Child(str(self._name), self._command, environ, self._log, stops_by_signal=True)

    def is_ready(self) -> bool:
        child = self._started()
        found = _READY.search(child.log())
        if found is None:
            child.check()
            return False
        self._url = found.group(1)
        return True

    def ask(self, workload: Workload) -> Answer:
        child = self._started()
        before = child.cpu_s()
        try:
            seconds, replies = asyncio.run(ask(self._url, self._bodies(workload), self._timeout_s))
        except httpx.HTTPError as error:
            child.check()
            raise child.failed(f"did not answer: {type(error).__name__} {error}") from error
        lengths = [
            [len(sample["token_ids"]) for sample in result["completions"]]
            for reply in replies
            for result in self._results(reply)
        ]
        return Answer(seconds, lengths, child.cpu_s() - before)

    def weight_bytes(self) -> int | None:
        return int(self._get("/weights")["storage_bytes"])

    def cache_tokens(self) -> int | None:
        return int(self._get("/status")["load"]["kv_cache_tokens"]) or None

    def _get(self, path: str) -> dict[str, Any]:
        reply = httpx.get(self._url + path, timeout=_CONTROL_TIMEOUT_S, trust_env=False).raise_for_status()
        body: dict[str, Any] = reply.json()
        return body

    def failed(self, why: str) -> ArmFailedError:
        return self._started().failed(why)

    def stop(self) -> None:
        if self._child is not None:
            self._child.terminate()
            self._child.stop()

    def _started(self) -> Child:
        assert self._child is not None, "an arm is started before it is used"
        return self._child

    def _bodies(self, workload: Workload) -> list[dict[str, Any]]:
        size = self._prompts_per_request
        return [request_body(workload, start, size) for start in range(0, len(workload.prompts), size)]

    def _results(self, reply: dict[str, Any]) -> list[dict[str, Any]]:
        if "results" not in reply:
            raise ArmFailedError(f"{self._name} refused a request: {json.dumps(reply)}")
        results: list[dict[str, Any]] = reply["results"]
        return results


def serve_command(name: ArmName, launch: Launch, more_flags: Sequence[str]) -> list[str]:
    """The service's command line; later flags win over earlier ones."""
    values: dict[str, object] = {
        "--model": launch.folder,
        "--quantization": name.quantization,
        "--device": launch.device,
        "--port": 0,
        "--weights-port": 0,
        "--max-model-len": launch.max_model_len,
        "--max-num-seqs": launch.max_num_seqs,
        "--gpu-memory-utilization": launch.gpu_memory_utilization,
        "--threads": launch.threads,
        "--request-timeout-s": launch.timeout_s,
        "--start-timeout-s": launch.timeout_s,
    }
    if launch.kv_cache_gib is not None:
        values["--kv-cache-gib"] = launch.kv_cache_gib
    flags = [word for flag, value in values.items() for word in (flag, str(value))]
    flags += ["--enforce-eager"] if launch.enforce_eager else []
    return [sys.executable, "-m", "flashrl_rollout", "serve", *flags, *more_flags]


def request_body(workload: Workload, start: int, size: int) -> dict[str, Any]:
    """The body of the /generate request for prompts `start` to `start + size`, which all have one length."""
    sampling: dict[str, Any] = {"temperature": 1.0, "max_tokens": workload.max_tokens[start]}
    if workload.seed is not None:
        sampling["seed"] = workload.prompt_seed(start)
    return {"prompts": workload.prompts[start : start + size], "n": workload.samples, "sampling": sampling}


async def ask(url: str, bodies: list[dict[str, Any]], timeout_s: float) -> tuple[float, list[dict[str, Any]]]:
    """Seconds from the first request to the last reply, parsed; and the replies in order."""
    async with AsyncExitStack() as stack:
        options: dict[str, Any] = {"base_url": url, "timeout": timeout_s, "limits": httpx.Limits(max_connections=None)}
        options |= {"trust_env": False, "verify": httpx.create_ssl_context()}  # made once: it takes long to make
        made = [httpx.AsyncClient(**options) for _ in range(-(-len(bodies) // _REQUESTS_PER_CLIENT))]
        clients = [await stack.enter_async_context(client) for client in made]

        async def one(client: httpx.AsyncClient, body: dict[str, Any]) -> dict[str, Any]:
            reply = await client.post("/generate", json=body)
            parsed: dict[str, Any] = reply.json()
            return parsed

        started = time.perf_counter()
        replies = await asyncio.gather(
            *(one(clients[i // _REQUESTS_PER_CLIENT], body) for i, body in enumerate(bodies))
        )
        return time.perf_counter() - started, replies
