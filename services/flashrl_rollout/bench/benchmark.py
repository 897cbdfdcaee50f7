"""A benchmark from its settings to its numbers: the model's folder, the arms, the rounds.

Knows what is made of what; knows nothing of flags, or of how an arm works.
"""

import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from flashrl_rollout.bench.arms import Arm, ArmFailedError, Launch
from flashrl_rollout.bench.engine_arm import EngineArm, engine_command, engine_environment
from flashrl_rollout.bench.machine import machine, versions
from flashrl_rollout.bench.model import find_folder, kv_cache_gib, read_config, without_end
from flashrl_rollout.bench.progress import Progress
from flashrl_rollout.bench.report import numbers
from flashrl_rollout.bench.run import run
from flashrl_rollout.bench.service_arm import ServiceArm, serve_command
from flashrl_rollout.bench.settings import ArmName, BenchSettings
from flashrl_rollout.bench.workload import make_workload, response_lengths

_SHARED_GPU = 0.05  # what must be free when an arm starts; its cache has a size of its own


def benchmark(settings: BenchSettings, work_dir: Path | None) -> dict[str, Any]:
    """Everything of the JSON file; ValueError for a mistake, ArmFailedError when an arm fails."""
    names = settings.arm_names()
    try:
        made = tempfile.TemporaryDirectory(prefix="flashrl-bench-", dir=work_dir)
    except OSError as error:
        raise ValueError(f"work_dir: {work_dir}: {error.strerror}") from error
    with made as name, Progress(len(names) * settings.rounds) as progress:
        folder = Path(name)
        model = _model(settings, folder, progress)
        launch, config = _launch(settings, model), read_config(model)
        workloads = [make_workload(settings, config["vocab_size"], turn) for turn in range(settings.rounds + 1)]
        arms = [_arm(arm, launch, settings, folder) for arm in names]
        at_once = not settings.gpu_memory_utilization
        turns, facts = run(arms, workloads, progress, timeout_s=settings.timeout_s, at_once=at_once)
    facts_of_run = {"machine": machine(), "versions": versions(), "settings": settings.model_dump(mode="json")}
    return numbers(turns, facts) | facts_of_run | {"kv_cache_gib": launch.kv_cache_gib}


def _model(settings: BenchSettings, folder: Path, progress: Progress) -> Path:
    """The folder that all arms load."""
    if settings.model:
        return without_end(find_folder(settings.model), folder / "model")
    progress.say(f"writing random weights in the shape of {settings.shape}")
    command = [sys.executable, "-m", "flashrl_rollout.bench.shapes", settings.shape, str(folder / "model")]
    # in a process of its own: the device memory it used is free again when it has ended
    done = subprocess.run(command, capture_output=True, text=True, timeout=settings.timeout_s, check=False)
    if done.returncode:
        raise ArmFailedError(f"random weights could not be written:\n{done.stderr[-2000:]}")
    return folder / "model"


def _launch(settings: BenchSettings, model: Path) -> Launch:
    """How every arm is started; ValueError where the load is too long for the model."""
    config, lengths = read_config(model), response_lengths(settings)
    max_model_len = settings.prompt_tokens + max(lengths)
    context = config.get("max_position_embeddings", max_model_len)
    if max_model_len > context:
        raise ValueError(
            f"tokens: {settings.prompt_tokens} of a prompt and up to {max(lengths)} of an answer are more than the "
            f"model's context of {context}"
        )
    sequences = [length for length in lengths for _ in range(settings.samples)]
    return Launch(
        folder=str(model),
        max_model_len=max_model_len,
        max_num_seqs=settings.max_num_seqs,
        gpu_memory_utilization=settings.gpu_memory_utilization or _SHARED_GPU,
        kv_cache_gib=_cache(settings, config, sequences),
        device=settings.device,
        threads=settings.threads,
        enforce_eager=settings.enforce_eager,
        seeded=settings.seeded,
        timeout_s=settings.timeout_s,
    )


def _cache(settings: BenchSettings, config: dict[str, Any], lengths: list[int]) -> float | None:
    """GiB for keys and values; None: vLLM's to find."""
    if settings.kv_cache_gib:
        return settings.kv_cache_gib
    if settings.gpu_memory_utilization:
        return None
    return kv_cache_gib(config, settings.prompt_tokens, lengths, settings.max_num_seqs)


def _arm(name: ArmName, launch: Launch, settings: BenchSettings, folder: Path) -> Arm:
    if name.side == "engine":
        command, environ = engine_command(name, launch), engine_environment(name, launch)
        return EngineArm(name, command, environ, launch.timeout_s, folder)
    command = serve_command(name, launch, shlex.split(settings.service_flags))
    return ServiceArm(name, command, settings.prompts_in_request, launch.timeout_s, folder)
