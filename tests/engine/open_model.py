"""A program: loads a checkpoint as one tensor-parallel rank would, without an engine, and prints what it found.

`python open_model.py FOLDER QUANTIZATION RANK DEGREE PORT` prints a JSON object: layout, regions, unused, digests.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any


def main(folder: str, quantization: str, rank: int, degree: int, port: str) -> None:
    """Load, probe, print."""
    os.environ.update(VLLM_LOGGING_LEVEL="ERROR", VLLM_DIST_IDENT=port, OMP_NUM_THREADS="1")
    from vllm.config import set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import get_model

    from flashrl_rollout.checkpoint_reader import Checkpoint
    from flashrl_rollout.rank_weights import RankWeights
    from flashrl_rollout.worker import as_text

    arguments = EngineArgs(
        folder, quantization=quantization, dtype="bfloat16", enforce_eager=True, tensor_parallel_size=degree
    )
    config = arguments.create_engine_config()
    with set_current_vllm_config(config):
        init_distributed_environment(degree, rank, f"tcp://127.0.0.1:{port}", rank, "gloo")
        initialize_model_parallel(degree)
        model: Any = get_model(vllm_config=config)
        opened = RankWeights.open(model, Checkpoint(Path(folder)))
    found = opened.describe() | {"unused": sorted(opened.unused), "digests": as_text(opened.weights.digests())}
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5])
