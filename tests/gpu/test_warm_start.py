"""An engine that has started compiles no kernel during a request, as vLLM's own monitor of compilation sees it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "examples" / "tiny_arith" / "model"
READY = "READY: nothing may be compiled from here on"


@pytest.mark.parametrize("quantization", ["int8", "none"])
def test_no_kernel_is_compiled_during_a_request(quantization: str) -> None:
    command = [sys.executable, str(ROOT / "tests" / "gpu" / "warm_requests.py"), str(MODEL), quantization]
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"VLLM_LOGGING_LEVEL": "INFO", "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=800, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:]
    before, after = done.stdout.split(READY)
    assert "JIT monitor activated" in before
    assert int(after.split()[-1]) > 500
    assert [line for line in after.splitlines() if "during inference" in line] == []
