"""The double must behave as the protocol says, or every test that uses it says nothing."""

import asyncio
from pathlib import Path

import pytest
import torch
from tests.helpers.rig import INFO, LAYOUT

from flashrl_rollout import stored_state
from flashrl_rollout.engine import Engine, EngineDeadError, EngineError
from flashrl_rollout.scripted_engine import Faults, ScriptedEngine
from flashrl_rollout.staged import write_staged
from flashrl_wire.delta import Change
from flashrl_wire.digest import PartDigest
from flashrl_wire.messages import Sampling

pytestmark = pytest.mark.anyio

CHANGES = [
    Change("norm.weight", torch.tensor([2.0, 3.0], dtype=torch.bfloat16), torch.tensor([4, 9])),
    Change("down.weight", torch.full((40,), 5, dtype=torch.int8), start=100),
]


def engine(faults: Faults | None = None) -> ScriptedEngine:
    return ScriptedEngine(LAYOUT, stored_state.random_parts(LAYOUT, 0), INFO, end_token=None, faults=faults)


async def tokens(found: Engine, **sampling: object) -> list[list[int]]:
    drawn = await found.generate("r", [1, 2], 2, Sampling.model_validate({"max_tokens": 5, "seed": 3} | sampling), 0)
    return [completion.token_ids for completion in drawn]


async def test_tokens_depend_on_seed_and_weights(tmp_path: Path) -> None:
    first, second = engine(), engine()
    before = await tokens(first)
    assert before == await tokens(second)
    assert before[1] == (await tokens(first, seed=4))[0]
    greedy = await tokens(first, temperature=0)
    assert greedy[0] == greedy[1]
    await first.apply(write_staged(tmp_path / "u", CHANGES))
    await first.adopt(1)
    await first.keep()
    assert await tokens(first) != before


async def test_apply_reports_how_the_digests_moved(tmp_path: Path) -> None:
    found = engine()
    before = await found.digests()
    shifts = await found.apply(write_staged(tmp_path / "u", CHANGES))
    after = await found.digests()
    assert {name: before[name] + shifts.get(name, PartDigest()) for name in before} == after
    assert found.parts["norm.weight"][[4, 9]].tolist() == [2.0, 3.0]
    await found.revert()
    assert await found.digests() == before


async def test_stop_words_and_lengths_end_a_sample() -> None:
    found = engine()
    (first, _) = await found.generate("r", [1], 2, Sampling(max_tokens=9, seed=0), 0)
    assert (first.finish_reason, len(first.token_ids)) == ("length", 9)
    word = first.text[3:5]
    (stopped, _) = await found.generate("r", [1], 2, Sampling(max_tokens=9, seed=0, stop=[word]), 0)
    assert (stopped.finish_reason, stopped.token_ids) == ("stop", first.token_ids[:5])


async def test_faults_happen_and_can_be_switched_off(tmp_path: Path) -> None:
    found = engine(Faults(fail_apply=True))
    update = write_staged(tmp_path / "u", CHANGES)
    before = await found.digests()
    with pytest.raises(EngineError):
        await found.apply(update)
    assert await found.digests() == before
    found.faults.fail_apply, found.faults.corrupt_write = False, True
    shifts = await found.apply(update)
    assert (await found.digests())["norm.weight"] == before["norm.weight"] + shifts["norm.weight"]
    assert found.parts["norm.weight"][4] != 2.0


async def test_paused_engine_draws_nothing_until_it_is_resumed() -> None:
    found = engine()
    await found.pause("keep", 1.0)
    waiting = asyncio.create_task(tokens(found))
    for _ in range(20):
        await asyncio.sleep(0)
    assert not waiting.done()
    await found.resume()
    assert len(await waiting) == 2


async def test_dead_engine_refuses_everything() -> None:
    found = engine()
    await found.close()
    assert not found.is_alive
    for call in (found.digests(), found.resume(), found.adopt(1), found.keep(), tokens(found)):
        with pytest.raises(EngineDeadError):
            await call
