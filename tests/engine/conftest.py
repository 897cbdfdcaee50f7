"""Engines and checkpoints, each made once a session: an engine takes the better part of a minute to start."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.helpers.real_engine import (
    KEPT_BY_FP8,
    MAX_MODEL_LEN,
    PROMPTS,
    ROOT,
    Checkpoints,
    LoopThread,
    make_checkpoints,
    output_of,
)

from flashrl_rollout.engine import Engine
from flashrl_rollout.engine_settings import EngineSettings
from flashrl_rollout.layer_selection import LayerSelection
from flashrl_wire.messages import Quantization

MODEL = ROOT / "examples" / "tiny_arith" / "model"
CHAT_TEMPLATE = "{% for message in messages %}{{ message.content }}\n{% endfor %}"


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    """The tiny model and two others like it."""
    return make_checkpoints(MODEL, tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture(scope="session")
def loop() -> Iterator[LoopThread]:
    """The loop of all engines."""
    thread = LoopThread()
    yield thread
    thread.stop()


@pytest.fixture(scope="session")
def int8_engine(loop: LoopThread) -> Iterator[Engine]:
    """An engine of the tiny model in int8; tests leave it with the weights they found."""
    yield from _engine(loop, "int8")


@pytest.fixture(scope="session")
def none_engine(loop: LoopThread, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """The same, unquantized, and with a chat template, which the tiny model has not."""
    folder = tmp_path_factory.mktemp("chat") / "model"
    shutil.copytree(MODEL, folder)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    yield from _engine(loop, "none", folder)


def _engine(loop: LoopThread, quantization: Quantization, model: Path = MODEL) -> Iterator[Engine]:
    from flashrl_rollout.vllm_engine import VllmEngine

    settings = EngineSettings(
        str(model),
        quantization,
        quantize_layers="all",  # on CUDA such small layers would stay bf16
        max_model_len=MAX_MODEL_LEN,
        enforce_eager=True,
        kv_cache_gib=0.125,
        threads=1,
    )
    engine = loop.run(VllmEngine.start(settings), 900)
    yield engine
    loop.run(engine.close())


@pytest.fixture(scope="session")
def fresh(checkpoints: Checkpoints) -> dict[str, Any]:
    """Per quantization, the greedy output of an engine started from the last checkpoint."""
    everything = LayerSelection(quantize_layers="all")
    config = {
        "int8": everything.additional_config(),
        "fp8": everything.model_copy(update={"keep_bf16": (KEPT_BY_FP8,)}).additional_config(),
    }
    arguments = [str(checkpoints.third), json.dumps(PROMPTS), "24", json.dumps(config), "int8", "fp8", "none"]
    return dict(output_of("fresh_greedy.py", arguments))
