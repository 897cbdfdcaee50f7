"""vLLM's own server and its own reload of a checkpoint, for `sync` to stand beside ours.

Started as a user would, in development mode, whose `/collective_rpc` is the only way to a reload by HTTP. Sampling
stands still for all of one. Knows vLLM's command line and that route; knows nothing of FlashRL.
"""

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
from benchmarks.service_process import free_port

START_DEADLINE_S = 900.0
STOP_DEADLINE_S = 60.0
RELOAD_DEADLINE_S = 600.0


class StockServer:
    """vLLM's server with the model of one folder."""

    def __init__(self, url: str, process: "subprocess.Popen[bytes]") -> None:
        self._process, self._http = process, httpx.Client(base_url=url, timeout=RELOAD_DEADLINE_S)

    @classmethod
    @contextmanager
    def started(cls, folder: Path, log: Path, flags: str) -> Iterator["StockServer"]:
        """Answering, until the block ends; RuntimeError with its log's end if it does not get so far."""
        port = free_port()
        # the command `vllm serve` itself asks for a distribution named vllm, which that for the CPU is not
        line = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--port", str(port)]
        line += ["--host", "127.0.0.1", "--dtype", "bfloat16", "--max-model-len", "1024", *shlex.split(flags)]
        variables = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_NO_USAGE_STATS": "1"}
        with log.open("wb") as out:
            process = subprocess.Popen(line, stdout=out, stderr=out, env=os.environ | variables, start_new_session=True)
        server = cls(f"http://127.0.0.1:{port}", process)
        try:
            server._wait(log)
            yield server
        finally:
            server._stop()

    def _wait(self, log: Path) -> None:
        end = time.monotonic() + START_DEADLINE_S
        while time.monotonic() < end and self._process.poll() is None:
            try:
                if self._http.get("/health", timeout=5.0).status_code == 200:
                    return
            except httpx.HTTPError:
                pass
            time.sleep(0.2)
        raise RuntimeError(f"vLLM did not start; the end of its log:\n{log.read_text(errors='replace')[-2000:]}")

    def reload(self) -> float:
        """Read the same checkpoint again; seconds."""
        started = time.monotonic()
        self._http.post("/collective_rpc", json={"method": "reload_weights"}).raise_for_status()
        return time.monotonic() - started

    def _stop(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(STOP_DEADLINE_S)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
