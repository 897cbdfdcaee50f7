"""Two real engines behind one: a delta is on both, both draw, and their metrics are told apart."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client import generate_latest
from tests.helpers.real_engine import MAX_MODEL_LEN, PROMPTS, Checkpoints, LoopThread, delta, spans_cover

from flashrl_rollout import stored_state
from flashrl_rollout.engine import Engine, EngineCompletion, EngineError
from flashrl_rollout.engine_group import EngineGroup
from flashrl_rollout.engine_settings import EngineSettings
from flashrl_wire.messages import Sampling

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(1200)]

TOKENS = 120


@pytest.fixture(scope="module")
def second(loop: LoopThread, checkpoints: Checkpoints) -> Iterator[Engine]:
    """An engine like the session's, which passes its tokens on as they are drawn."""
    from flashrl_rollout.vllm_engine import VllmEngine

    settings = EngineSettings(
        str(checkpoints.first),
        "int8",
        quantize_layers="all",
        max_model_len=MAX_MODEL_LEN,
        enforce_eager=True,
        kv_cache_gib=0.125,
        threads=1,
        output_interval=1,
    )
    engine = loop.run(VllmEngine.starter(2)(settings, 1), 900)
    yield engine
    loop.run(engine.close())


@pytest.fixture
def group(int8_engine: Engine, second: Engine, loop: LoopThread) -> EngineGroup:
    return loop.run(EngineGroup.of([int8_engine, second]))


async def draw(group: EngineGroup, n: int = 2, **settings: float) -> list[EngineCompletion]:
    """The same request twice: each engine answers one."""
    sampling = Sampling.model_validate({"max_tokens": TOKENS, "seed": 5, **settings})
    both = await asyncio.gather(*(group.generate(f"r{i}", PROMPTS[0], n, sampling, 2 * i) for i in range(2)))
    return [completion for completions in both for completion in completions]


def test_tokens_that_were_held_are_those_that_were_not(group: EngineGroup, loop: LoopThread) -> None:
    held, other, *as_drawn = loop.run(draw(group))
    assert [held.token_ids, other.token_ids] == [completion.token_ids for completion in as_drawn]
    assert [held.logprobs, other.logprobs] == [completion.logprobs for completion in as_drawn]
    assert all(spans_cover(completion) for completion in (held, other, *as_drawn))


def test_a_delta_under_way_is_on_both_and_every_token_knows_its_version(
    group: EngineGroup, loop: LoopThread, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    async def commit(old: stored_state.Parts, new: stored_state.Parts, version: int) -> None:
        layout = await group.layout()
        update = delta(layout, old, new, tmp_path / f"{version}.staged")
        await group.prepare(update)
        await group.pause("keep", 30)
        await asyncio.gather(group.apply(update), group.adopt(version))
        await group.resume()
        await group.keep()

    async def under_way() -> list[EngineCompletion]:
        layout = await group.layout()
        first, second = (stored_state.read_parts(folder, layout) for folder in (checkpoints.first, checkpoints.second))
        drawing = asyncio.create_task(draw(group, 8, temperature=2.0, max_tokens=250))
        while (await group.stats()).running <= 8:  # both have some then
            assert not drawing.done()
            await asyncio.sleep(0.01)
        await commit(first, second, 21)
        assert await group.digests() == stored_state.digests(second)
        drawn = await drawing
        await commit(second, first, 22)
        return drawn

    found = loop.run(under_way())
    assert all(spans_cover(completion) for completion in found)
    crossed = [completion for completion in found if len(completion.weight_versions) == 2]
    assert {completion.weight_versions[1][0] for completion in crossed} == {21}


def test_what_one_refuses_is_on_none(
    group: EngineGroup, second: Engine, loop: LoopThread, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    before = loop.run(group.digests())
    loop.run(group.pause("keep", 30))
    with pytest.raises(EngineError, match="neither"):
        loop.run(group.load_checkpoint(tmp_path))
    loop.run(group.resume())
    assert loop.run(group.digests()) == before
    assert loop.run(second.digests()) == before


def test_metrics_of_the_second_have_its_number(group: EngineGroup, loop: LoopThread) -> None:
    def tokens() -> float:
        lines = [line for line in generate_latest().decode().splitlines() if "vllm:generation_tokens_total{" in line]
        (line,) = [line for line in lines if 'engine="1"' in line]
        return float(line.rpartition(" ")[2])

    before = tokens()
    drawn = loop.run(draw(group))[2:]
    assert tokens() == before + sum(len(completion.token_ids) for completion in drawn)
