"""Model families in one process each: started, sampled, updated, and held to a fresh start of where they were taken.

A case each of what sets families apart; `benchmarks/families.py` has all of them in every precision.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.helpers.real_engine import ROOT, environment

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1200)]

CASES = {
    "llama_one_kv_head/fp8": 35,  # biases everywhere
    "qwen3/int8": 25,  # norms of queries and keys
    "mistral/none": 21,  # a sliding window
    "gemma2/int8": 24,  # norms from 1, soft caps, two kinds of layers
    "phi3/fp8": 15,  # fused in the checkpoint already
}
"""Case -> tensors of the stored form."""


def families(*arguments: str, cwd: Path) -> list[dict[str, Any]]:
    """What the benchmark found, case by case."""
    line = [sys.executable, str(ROOT / "benchmarks/families.py"), *arguments, "--json", str(cwd / "found.json")]
    variables = environment() | {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    done = subprocess.run(line, env=variables, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode in (0, 1), done.stderr[-3000:]
    return list(json.loads((cwd / "found.json").read_text()))


def test_deltas_lead_where_a_fresh_start_does_in_every_kind_of_family(tmp_path: Path) -> None:
    found = {f"{case['family']}/{case['quantization']}": case for case in families("--family", *CASES, cwd=tmp_path)}
    assert {name: case["problem"] for name, case in found.items()} == dict.fromkeys(CASES, "")
    assert {name: case["tensors"] for name, case in found.items()} == CASES


@pytest.mark.shared_data
def test_a_real_model(model_dir: Callable[[str], Path], tmp_path: Path) -> None:
    folder = model_dir("smollm2-135m")
    (case,) = families("--family", "--model", str(folder), "--quantization", "int8", cwd=tmp_path)
    assert (case["problem"], case["tensors"]) == ("", 272)
