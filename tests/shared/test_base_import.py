"""The messages must be usable in a base install: importing them loads nothing large."""

import subprocess
import sys

import pytest

HEAVY = ("torch", "vllm", "fastapi", "httpx", "zmq", "numpy")


@pytest.mark.parametrize("module", ["flashrl_wire.messages", "flashrl_wire.errors", "flashrl_wire.layout"])
def test_import_loads_nothing_large(module: str) -> None:
    code = f"import sys, {module}; print([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"
