"""A program: loads checkpoints as one tensor-parallel rank would, without an engine, and prints what it found.

`python open_models.py RANK DEGREE PORT METHOD CONFIG FOLDER...` prints {folder name: reply, or {"error": ...}} as JSON;
CONFIG has vLLM's additional configuration by folder name.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any


def main(rank: int, degree: int, port: str, method: str, additional: dict[str, Any], folders: list[Path]) -> None:
    """Load, probe, digest, print."""
    os.environ.update(VLLM_LOGGING_LEVEL="ERROR", VLLM_DIST_IDENT=port)
    from vllm.config import set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.v1.worker import cpu_worker

    assert cpu_worker  # importing it readies PyTorch for a machine without an accelerator
    found: dict[str, Any] = {}
    for folder in folders:
        config = _config(folder, degree, method, additional.get(folder.name, {}))
        with set_current_vllm_config(config):
            if not found:
                init_distributed_environment(degree, rank, f"tcp://127.0.0.1:{port}", rank, "gloo")
                initialize_model_parallel(degree)
            try:
                found[folder.name] = _opened(config, folder)
            except ValueError as error:
                found[folder.name] = {"error": str(error)}
    print(json.dumps(found))


def _config(folder: Path, degree: int, method: str, additional: dict[str, Any]) -> Any:
    from vllm.engine.arg_utils import EngineArgs

    arguments = EngineArgs(
        str(folder),
        quantization=method,
        dtype="bfloat16",
        enforce_eager=True,
        tensor_parallel_size=degree,
        skip_tokenizer_init=True,
        additional_config=additional,
    )
    return arguments.create_engine_config()


def _opened(config: Any, folder: Path) -> dict[str, Any]:
    import torch
    from vllm.model_executor.model_loader import get_model

    from flashrl_rollout.checkpoint_reader import Checkpoint
    from flashrl_rollout.rank_weights import RankWeights
    from flashrl_rollout.runtime_weights import as_text

    config.compilation_config.static_forward_context.clear()
    with torch.no_grad():
        opened = RankWeights.open(get_model(vllm_config=config), Checkpoint(folder))
        return opened.describe() | {"unused": sorted(opened.unused), "digests": as_text(opened.weights.digests())}


if __name__ == "__main__":
    folders = [Path(folder) for folder in sys.argv[6:]]
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4], json.loads(sys.argv[5]), folders)
