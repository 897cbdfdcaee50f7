"""Shares of a service's limits, the order in which engines start, and memory that cannot be enough."""

import asyncio
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tests.helpers.rig import INFO, LAYOUT

from flashrl_rollout import stored_state
from flashrl_rollout.engine import Engine, EngineError
from flashrl_rollout.engine_settings import EngineSettings, environment
from flashrl_rollout.engine_start import share, start_engines
from flashrl_rollout.memory_check import check_memory
from flashrl_rollout.scripted_engine import ScriptedEngine

pytestmark = pytest.mark.anyio
GIB = 1 << 30


class Starter:
    """Starts scripted engines; the one of index `failing` does not start."""

    def __init__(self, failing: int | None = None, cache_bytes: int = 0) -> None:
        self.started: list[ScriptedEngine] = []
        self.settings: dict[int, EngineSettings] = {}
        self.under_way: list[int] = []
        self._failing, self._cache_bytes = failing, cache_bytes

    async def __call__(self, settings: EngineSettings, index: int) -> Engine:
        self.under_way.append(index)
        await asyncio.sleep(0)
        if index == self._failing:
            raise ValueError("no room")
        self.settings[index] = settings
        info = replace(INFO, kv_cache_bytes=0 if settings.kv_cache_gib else self._cache_bytes)
        self.started.append(ScriptedEngine(LAYOUT, stored_state.random_parts(LAYOUT, 0), info))
        return self.started[-1]


def test_shares_make_up_the_whole() -> None:
    whole = EngineSettings("m", engines=3, max_num_seqs=256, gpu_memory_utilization=0.6, kv_cache_gib=1.5, threads=2)
    part = share(whole)
    assert (part.max_num_seqs, part.kv_cache_gib, part.threads, part.engines) == (86, 0.5, 2, 3)
    assert part.gpu_memory_utilization == pytest.approx(0.2)


async def test_one_engine_gets_everything() -> None:
    start, settings = Starter(), EngineSettings("m", max_num_seqs=7)
    assert await start_engines(settings, start) is start.started[0]
    assert start.settings == {0: settings}


async def test_several_engines_have_a_share_each_and_die_as_one() -> None:
    start, settings = Starter(), EngineSettings("m", engines=2, max_num_seqs=7)
    group = await start_engines(settings, start)
    assert start.settings == dict.fromkeys((0, 1), share(settings))
    assert group.is_alive
    await start.started[1].close()
    assert not group.is_alive


async def test_the_first_starts_alone_and_the_others_get_a_cache_of_its_size() -> None:
    start, settings = Starter(cache_bytes=3 * GIB + 1), EngineSettings("m", engines=3)
    seen: list[list[int]] = []

    async def watched(part: EngineSettings, index: int) -> Engine:
        engine = await start(part, index)
        seen.append(list(start.under_way))
        return engine

    await start_engines(settings, watched)
    assert seen == [[0], [0, 1, 2], [0, 1, 2]]
    assert start.settings[0].kv_cache_bytes(is_cpu=False) is None
    assert [start.settings[index].kv_cache_bytes(is_cpu=False) for index in (1, 2)] == [3 * GIB + 1] * 2


async def test_the_environment_of_engines_stays_until_all_have_started() -> None:
    start, settings = Starter(), EngineSettings("m", engines=3, threads=2)

    async def in_it(part: EngineSettings, index: int) -> Engine:
        with environment(part.environment()):
            engine = await start(part, index)
        assert os.environ["OMP_NUM_THREADS"] == "2"  # another one's end has not taken it away
        return engine

    before = dict(os.environ)
    await start_engines(settings, in_it)
    assert dict(os.environ) == before


async def test_what_has_started_is_stopped_when_one_does_not_start() -> None:
    start = Starter(failing=1)
    with pytest.raises(ValueError, match="no room"):
        await start_engines(EngineSettings("m", engines=3), start)
    assert [engine.is_alive for engine in start.started] == [False, False]


async def test_engines_that_came_up_with_different_weights_are_stopped() -> None:
    start = Starter()

    async def different(settings: EngineSettings, index: int) -> Engine:
        await start(settings, index)
        start.started[-1].parts["norm.weight"][0] = float(index)
        return start.started[-1]

    with pytest.raises(EngineError, match="another copy"):
        await start_engines(EngineSettings("m", engines=2), different)
    assert [engine.is_alive for engine in start.started] == [False, False]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """1000 elements, and a norm of 24."""
    save_file({"up.weight": torch.zeros(40, 25), "norm.weight": torch.zeros(24)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({}))
    return tmp_path


@pytest.mark.parametrize(("quantization", "needed"), [("int8", 1024), ("fp8", 1024), ("none", 2048)])
def test_memory_that_is_less_than_the_weights_is_refused(folder: Path, quantization: str, needed: int) -> None:
    settings = EngineSettings("m", quantization, gpu_memory_utilization=0.5)  # type: ignore[arg-type]
    check_memory(folder, settings, 2 * needed + 2)
    with pytest.raises(ValueError, match=r"^gpu_memory_utilization: the weights need at least"):
        check_memory(folder, settings, 2 * needed)


def test_the_message_says_how_many_engines_share(folder: Path) -> None:
    settings = share(EngineSettings("m", "none", engines=4, gpu_memory_utilization=0.8))
    with pytest.raises(ValueError, match=r"an engine may use 0\.0 \(4 engines share the device\)$"):
        check_memory(folder, settings, 2048)
    check_memory(folder, settings, GIB)
