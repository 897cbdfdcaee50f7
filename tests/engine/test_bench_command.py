"""The benchmark with the bare engine for real: the service as an arm is what tests/rollout/test_bench_run.py has."""

import json
from pathlib import Path

import pytest
from tests.helpers.real_engine import ROOT
from tests.rollout.test_rollout_cli import command

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(900)]


def test_the_bare_engine_draws_every_length_exactly_and_is_reported(tmp_path: Path) -> None:
    """The tiny model ends an answer after 30 tokens on average; 60 are asked for, and its end token is taken away."""
    file = tmp_path / "bench.json"
    flags = ["--arms", "engine", "--quantization", "int8", "--requests", "8", "--samples", "2", "--tokens", "60"]
    flags += ["--prompt-tokens", "16", "--rounds", "1", "--max-num-seqs", "8", "--threads", "1", "--enforce-eager"]
    code, output, errors = command(
        "bench", "--model", str(ROOT / "examples/tiny_arith/model"), "--device", "cpu", "--json", str(file), *flags
    )
    assert code == 0, errors
    assert "engine/int8" in output
    found = json.loads(file.read_text())
    assert found["arms"]["engine/int8"]["tokens_per_s"] > 0
    assert [turn["tokens"] for turn in found["rounds"]] == [8 * 60]
    assert found["service_over_engine"] is None
    assert found["settings"]["requests"] == 8
    assert set(found["versions"]) == {"python", "vllm", "torch", "flashrl", "commit"}
    assert found["machine"]["cores"] >= 1
