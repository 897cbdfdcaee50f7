"""A whole service process around the scripted engine, for tests that kill, stop or starve one.

    python -m flashrl_rollout.scripted_service '{"token_s": 0.01, "faults": {"apply_delay_s": 5}}'
    python -m flashrl_rollout.scripted_service '{"folder": "examples/tiny_arith/model"}'

Everything but the engine is what `flashrl-rollout serve` runs, with settings from FLASHRL_ROLLOUT_* variables.
"""

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any

from flashrl_rollout import startup
from flashrl_rollout.cli import USAGE_ERROR
from flashrl_rollout.config import load_config
from flashrl_rollout.engine import Engine, EngineInfo
from flashrl_rollout.engine_group import EngineGroup
from flashrl_rollout.logs import set_up_logging
from flashrl_rollout.scripted_engine import Faults, ScriptedEngine
from flashrl_rollout.serving import serve
from flashrl_rollout.stored_state import random_parts
from flashrl_wire.layout import TensorSpec, WeightLayout

VOCAB_SIZE, MAX_MODEL_LEN = 512, 4096


def scripted_layout(rows: int = 64) -> WeightLayout:
    """Two quantized matrices and a norm."""
    return WeightLayout.of(
        [
            TensorSpec(name="layers.0.down.weight", shape=(rows, 32), storage="int8_rows"),
            TensorSpec(name="layers.0.up.weight", shape=(2 * rows, 16), storage="int8_rows"),
            TensorSpec(name="norm.weight", shape=(rows,), storage="bf16"),
        ]
    )


async def start_engine(options: dict[str, Any]) -> Engine:
    """`options`: rows and seed of the weights or a model's folder, start_s, start_error, token_s, faults by name.

    `engines`, a list of options that differ from engine to engine, makes a group.
    """
    if "engines" in options:
        common = {name: value for name, value in options.items() if name != "engines"}
        return await EngineGroup.of([await start_engine(common | own) for own in options["engines"]])
    await asyncio.sleep(options.get("start_s", 0.0))
    if "start_error" in options:
        raise ValueError(options["start_error"])
    token_s, faults = options.get("token_s", 0.0), Faults(**options.get("faults", {}))
    if "folder" in options:
        from flashrl_rollout.scripted_folder import open_folder  # transformers takes seconds

        kept, quantization = options.get("keep_bf16", ()), options.get("quantization", "int8")
        return open_folder(Path(options["folder"]), quantization, keep_bf16=kept, token_s=token_s, faults=faults)
    layout = scripted_layout(options.get("rows", 64))
    info = EngineInfo("scripted", "int8", VOCAB_SIZE, MAX_MODEL_LEN, "0" * 32)
    parts = random_parts(layout, options.get("seed", 0))
    return ScriptedEngine(layout, parts, info, token_s=token_s, faults=faults)


def main(arguments: list[str]) -> int:
    """Serve until a signal; the exit code."""
    options = json.loads(arguments[0]) if arguments else {}
    try:
        config = load_config(None, os.environ, {"model": "scripted"})
        set_up_logging(config.log_level, config.log_format)
        bound = startup.bind(config)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return USAGE_ERROR
    chosen = {"quantization": config.quantization, "keep_bf16": config.keep_bf16}
    return serve(config, bound, lambda: start_engine(chosen | options))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
