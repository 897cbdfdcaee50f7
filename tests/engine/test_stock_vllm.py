"""vLLM's own server with our package installed: quantized by our method, updated through vLLM's own routes."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from examples import stock_vllm
from tests.helpers.real_engine import MAX_MODEL_LEN, PROMPTS, ROOT, Checkpoints

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(1200)]

START_LIMIT_S = 400.0


class StockServer:
    """`vllm serve` of the tiny model, as a user would start it."""

    def __init__(self, model: Path, stage_root: Path, log: Path) -> None:
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            port = str(found.getsockname()[1])
        self.url, self.model, self.log = f"http://127.0.0.1:{port}", model, log
        self.stage_root = stage_root
        variables = {
            "VLLM_SERVER_DEV_MODE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "FLASHRL_ROLLOUT_STAGE_ROOT": str(stage_root),
        }
        # the command `vllm serve` itself asks for a distribution named vllm, which that for the CPU is not
        line = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--port", port]
        line += ["--host", "127.0.0.1", "--quantization", "flashrl_int8", "--dtype", "bfloat16", "--enforce-eager"]
        line += ["--max-model-len", str(MAX_MODEL_LEN), "--kv-cache-memory-bytes", str(64 << 20)]
        line += ["--logprobs-mode", "processed_logprobs", "--no-enable-chunked-prefill"]
        line += ["--weight-transfer-config", json.dumps({"backend": "flashrl"})]
        self.environment = os.environ | variables
        with log.open("w") as output:
            self.process = subprocess.Popen(
                line, env=self.environment, stdout=output, stderr=output, start_new_session=True
            )

    def wait(self) -> None:
        """Until it answers; AssertionError with its log if it ends before."""
        end = time.monotonic() + START_LIMIT_S
        while time.monotonic() < end:
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=5):
                    return
            except OSError:
                self._ended_within(0.2)
        pytest.fail(self.log.read_text()[-3000:])

    def _ended_within(self, seconds: float) -> None:
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return

    def post(self, route: str, body: dict[str, Any] | None = None) -> tuple[int, str]:
        """Status and body of a reply."""
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.url + route, json.dumps(body or {}).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=120) as reply:
                return reply.status, reply.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def greedy(self) -> list[list[Any]]:
        """Greedy tokens and log-probs, in the form of the `fresh` fixture."""
        return [self._completion(prompt) for prompt in PROMPTS]

    def _completion(self, prompt: list[int]) -> list[Any]:
        body = {"model": str(self.model), "prompt": prompt, "temperature": 0, "max_tokens": 24, "logprobs": 0}
        status, reply = self.post("/v1/completions", body | {"return_token_ids": True})
        assert status == 200, reply
        choice = json.loads(reply)["choices"][0]
        return [choice["token_ids"], choice["logprobs"]["token_logprobs"]]

    def update(self, new: Path) -> subprocess.CompletedProcess[str]:
        """Run the example that pushes a delta."""
        line = [sys.executable, str(ROOT / "examples/stock_vllm.py"), str(self.model), str(new), "--url", self.url]
        return subprocess.run(line, env=self.environment, capture_output=True, text=True, timeout=120, check=False)

    def stop(self) -> None:
        """End it and everything that it started."""
        self.process.terminate()
        try:
            self.process.wait(60)
        finally:
            if self.process.poll() is None:
                os.killpg(self.process.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def server(checkpoints: Checkpoints, tmp_path_factory: pytest.TempPathFactory) -> Iterator[StockServer]:
    folder = tmp_path_factory.mktemp("stock")
    found = StockServer(checkpoints.first, folder, folder / "log")
    try:
        found.wait()
        yield found
    finally:
        found.stop()


def test_what_is_refused_changes_nothing_and_leaves_no_session_open(
    server: StockServer, checkpoints: Checkpoints
) -> None:
    before = server.greedy()
    assert server.post("/update_weights", {"update_info": {"file": "x", "manifest": {}}})[0] >= 400  # not started
    assert server.post("/init_weight_transfer_engine", {"init_info": {"stage": "../x"}})[0] >= 400
    assert server.post("/init_weight_transfer_engine", {"init_info": {"stage": "mine"}})[0] == 200
    folder = server.stage_root / f"flashrl-{os.getuid()}-mine"
    state = json.loads((folder / "weights.json").read_text())
    manifest = stock_vllm.write_update(folder / "good", state, checkpoints.first, checkpoints.second)
    content = (folder / "good").read_bytes()
    (folder / "damaged").touch(mode=0o600)
    (folder / "damaged").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    declared = manifest.model_dump(mode="json")
    for update, reason in (
        ({}, "Invalid update_info"),
        ({"file": "good", "manifest": {"kind": "delta"}}, "manifest: run_id"),
        ({"file": "../good", "manifest": declared}, "is no plain name"),
        ({"file": "damaged", "manifest": declared}, "chunk hash differs"),
        ({"file": "good", "manifest": declared | {"base_version": 7, "version": 8}}, "starts from version 7"),
        ({"file": "good", "manifest": declared | {"digest": "0" * 32}}, "written weights have digest"),
    ):
        assert server.post("/start_weight_update")[0] == 200
        status, body = server.post("/update_weights", {"update_info": update})
        assert status >= 400
        assert reason in body
        assert "Traceback" not in body
    assert server.greedy() == before
    assert json.loads((folder / "weights.json").read_text()) == state


def test_a_delta_through_vllms_routes_leads_where_a_fresh_start_does(
    server: StockServer, checkpoints: Checkpoints, fresh: dict[str, Any]
) -> None:
    assert server.greedy() != fresh["int8"]
    done = server.update(checkpoints.third)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "version 1, digest" in done.stdout
    assert server.greedy() == fresh["int8"]
    again = server.update(checkpoints.second)  # its base is the first checkpoint, which is gone
    assert again.returncode != 0
    assert "the server holds" in again.stderr
