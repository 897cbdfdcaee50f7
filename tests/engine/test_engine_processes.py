"""A real engine's processes: none outlives its parent. The engine on the way is the fp8 one, with layers in bf16."""

import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest
from tests.helpers.real_engine import KEPT_BY_FP8, Checkpoints, command, environment

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1200)]


def test_fp8_updates_exactly_and_a_killed_service_leaves_no_process(
    checkpoints: Checkpoints, fresh: dict[str, Any], tmp_path: Path
) -> None:
    folders = [str(folder) for folder in (checkpoints.first, checkpoints.second, checkpoints.third)]
    with (tmp_path / "stderr").open("w") as log:
        program = subprocess.Popen(
            command("walk_program.py", ["fp8", KEPT_BY_FP8, str(tmp_path), *folders]),
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
    try:
        assert program.stdout is not None
        report = next((line for line in program.stdout if line.startswith("[{")), None)  # vLLM writes there, too
        assert report is not None, (tmp_path / "stderr").read_text()[-3000:]
        family = psutil.Process(program.pid).children(recursive=True)
    finally:
        os.kill(program.pid, signal.SIGKILL)
    storage, (first, second, third) = json.loads(report)
    projections = {name: stored for name, stored in storage.items() if name.endswith("_proj.weight")}
    kept = {name for name, stored in projections.items() if stored == "bf16"}
    assert kept == {name for name in projections if ".down_proj." in name} != set()
    assert [first["digests_agree"], second["digests_agree"], third["digests_agree"]] == [True] * 3
    assert third["greedy"] == fresh["fp8"]
    assert first["greedy"] != second["greedy"] != third["greedy"]
    assert len(family) >= 2  # the engine core and its worker
    _, alive = psutil.wait_procs(family, timeout=30)
    assert not alive
