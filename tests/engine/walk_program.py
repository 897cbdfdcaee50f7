"""A program: starts an engine, takes it from checkpoint to checkpoint, prints what it said, and waits to be killed.

`python walk_program.py QUANTIZATION KEEP_BF16 STAGE_FOLDER FOLDER...` prints, as one line of JSON, the storage of every
tensor and the report of `walk`.
"""

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

from tests.helpers.real_engine import MAX_MODEL_LEN, walk

from flashrl_rollout.engine_settings import EngineSettings


async def main(quantization: Any, keep_bf16: str, stage: Path, folders: list[Path]) -> None:
    """Walk, print, wait."""
    from flashrl_rollout.vllm_engine import VllmEngine

    settings = EngineSettings(
        str(folders[0]),
        quantization,
        quantize_layers="all",
        keep_bf16=(keep_bf16,),
        max_model_len=MAX_MODEL_LEN,
        enforce_eager=True,
        kv_cache_gib=0.125,
        threads=1,
    )
    engine = await VllmEngine.start(settings)
    storage = {spec.name: spec.storage for spec in (await engine.layout()).tensors}
    print(json.dumps([storage, await walk(engine, folders, stage)]), flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), [Path(folder) for folder in sys.argv[4:]]))
