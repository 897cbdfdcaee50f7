"""Several engines as one: who gets a request, and weights that change on all of them or on none."""

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.helpers.rig import INFO, LAYOUT

from flashrl_rollout import stored_state
from flashrl_rollout.engine import CopiesDifferError, EngineDeadError, EngineError, EngineStats
from flashrl_rollout.engine_group import EngineGroup
from flashrl_rollout.scripted_engine import ScriptedEngine
from flashrl_rollout.staged import StagedUpdate, write_staged
from flashrl_wire.delta import Change
from flashrl_wire.messages import PauseMode, Sampling

pytestmark = pytest.mark.anyio

CHANGES = [
    Change("norm.weight", torch.tensor([2.0, 3.0], dtype=torch.bfloat16), torch.tensor([4, 9])),
    Change("down.weight", torch.full((40,), 5, dtype=torch.int8), start=100),
]


def scripted(count: int, token_s: float = 0.0) -> list[ScriptedEngine]:
    parts = [stored_state.random_parts(LAYOUT, 0) for _ in range(count)]
    return [ScriptedEngine(LAYOUT, held, INFO, end_token=None, token_s=token_s) for held in parts]


def weights(engines: list[ScriptedEngine]) -> list[object]:
    return [stored_state.digests(engine.parts) for engine in engines]


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


@pytest.fixture
def update(tmp_path: Path) -> StagedUpdate:
    return write_staged(tmp_path / "staged", CHANGES)


async def test_a_request_goes_whole_to_the_engine_with_the_fewest_sequences() -> None:
    engines = scripted(3)
    group = await EngineGroup.of(engines)
    await group.pause("keep", 1.0)
    seen, calls = [], []
    for index, n in enumerate([4, 1, 2, 1, 1, 1]):
        calls.append(asyncio.create_task(group.generate(f"r{index}", [1], n, Sampling(max_tokens=3, seed=1), 0)))
        await asyncio.sleep(0)
        seen.append(group.sequences)
    # by hand: 4 to the first, 1 to the second, 2 to the third; then to the fewest, the first of equals
    assert seen == [(4, 0, 0), (4, 1, 0), (4, 1, 2), (4, 2, 2), (4, 3, 2), (4, 3, 3)]
    calls[0].cancel()
    await settle()
    assert group.sequences == (0, 3, 3)
    await group.resume()
    found = await asyncio.gather(*calls[1:])
    assert [len(completions) for completions in found] == [1, 2, 1, 1, 1]
    assert group.sequences == (0, 0, 0)
    assert [engine.generated_tokens for engine in engines] == [0, 9, 9]
    assert (await group.stats()).generated_tokens == 18


async def test_every_engine_draws_the_same_tokens() -> None:
    group = await EngineGroup.of(scripted(2))
    sampling = Sampling(max_tokens=5, seed=3)
    both = await asyncio.gather(*(group.generate(f"r{i}", [1, 2], 2, sampling, 0) for i in range(2)))
    assert both[0] == both[1]


async def test_an_update_is_on_all_and_the_version_moves_on_all(update: StagedUpdate) -> None:
    engines = scripted(2)
    group = await EngineGroup.of(engines)
    before = await group.digests()
    shifts = await group.apply(update)
    await group.adopt(7)
    await group.keep()
    after = await group.digests()
    assert {name: before[name] + shift for name, shift in shifts.items()} == {name: after[name] for name in shifts}
    found = await asyncio.gather(*(group.generate(f"r{i}", [1], 1, Sampling(max_tokens=4), 0) for i in range(2)))
    assert [completion.weight_versions for (completion,) in found] == [[(7, 0, 4)]] * 2


@pytest.mark.parametrize("failing", [0, 1, 2])
@pytest.mark.parametrize("fault", ["fail_apply", "corrupt_write"])
async def test_a_write_that_fails_on_one_is_on_none(fault: str, failing: int, update: StagedUpdate) -> None:
    engines = scripted(3)
    group = await EngineGroup.of(engines)
    before = weights(engines)
    setattr(engines[failing].faults, fault, True)
    with pytest.raises(EngineError) as caught:
        await group.apply(update)
    assert not isinstance(caught.value, EngineDeadError)
    assert (weights(engines), group.is_alive) == (before, True)
    setattr(engines[failing].faults, fault, False)
    await group.apply(update)
    await group.adopt(1)
    await group.keep()
    assert weights(engines)[0] == weights(engines)[failing] != before[0]


async def test_a_checkpoint_that_one_cannot_load_is_on_none(tmp_path: Path) -> None:
    engines = scripted(2)
    group = await EngineGroup.of(engines)
    before = weights(engines)
    with pytest.raises(EngineError, match="neither"):
        await group.load_checkpoint(tmp_path)
    assert weights(engines) == before


async def test_a_write_that_cannot_be_taken_back_ends_the_group(update: StagedUpdate) -> None:
    engines = scripted(2)
    group = await EngineGroup.of(engines)
    engines[0].faults.fail_apply = engines[1].faults.fail_revert = True
    with pytest.raises(EngineDeadError, match="apply was told to fail; and the old weights could not be put back"):
        await group.apply(update)
    assert not group.is_alive


@pytest.mark.parametrize("failing", [(1,), (0, 1)])
async def test_a_version_that_one_does_not_adopt_is_taken_back(failing: tuple[int, ...], update: StagedUpdate) -> None:
    engines = scripted(2)
    group = await EngineGroup.of(engines)
    before = await group.digests()
    await group.apply(update)
    for index in failing:
        engines[index].faults.fail_adopt = True
    with pytest.raises(EngineError, match="adopt was told to fail"):
        await group.adopt(1)
    await group.revert()
    assert await group.digests() == before
    found = await asyncio.gather(*(group.generate(f"r{i}", [1], 1, Sampling(max_tokens=4), 0) for i in range(2)))
    assert [completion.weight_versions for (completion,) in found] == [[(0, 0, 4)]] * 2


async def test_old_values_that_one_cannot_drop_end_the_group(update: StagedUpdate) -> None:
    engines = scripted(2)
    group = await EngineGroup.of(engines)
    await group.apply(update)
    await group.adopt(1)
    engines[1].faults.fail_keep = True
    with pytest.raises(EngineDeadError, match="keep was told to fail"):
        await group.keep()
    assert not group.is_alive


async def test_weights_that_differ_are_found(update: StagedUpdate) -> None:
    engines = scripted(2)
    group = await EngineGroup.of(engines)
    engines[1].faults.corrupt_untouched = True
    await group.apply(update)
    with pytest.raises(CopiesDifferError, match=r"engine 1 holds another copy of down\.weight than engine 0"):
        await group.digests()


async def test_engines_that_differ_make_no_group() -> None:
    (first, second), parts = scripted(2), stored_state.random_parts(LAYOUT, 1)
    with pytest.raises(CopiesDifferError):
        await EngineGroup.of([first, ScriptedEngine(LAYOUT, parts, INFO)])
    with pytest.raises(EngineError, match="different models"):
        await EngineGroup.of([first, ScriptedEngine(LAYOUT, second.parts, replace(INFO, vocab_size=7))])


async def test_drain_that_one_does_not_finish_in_time_leaves_all_running() -> None:
    group = await EngineGroup.of([*scripted(1), *scripted(1, token_s=0.05)])
    sampling = Sampling(max_tokens=8)
    slow = [asyncio.create_task(group.generate(f"r{i}", [1], 1, sampling, 0)) for i in range(2)][1]
    await settle()
    with pytest.raises(TimeoutError):
        await group.pause("drain", 0.05)
    (other,) = await group.generate("other", [1], 1, sampling, 0)  # goes to the one that was at rest already
    assert not slow.done()
    assert [len(completion.token_ids) for completion in (other, *await slow)] == [8, 8]


async def test_a_pause_that_one_refuses_leaves_all_running() -> None:
    class Unwilling(ScriptedEngine):
        async def pause(self, mode: PauseMode, deadline_s: float) -> None:
            raise EngineError("not now")

    unwilling = Unwilling(LAYOUT, stored_state.random_parts(LAYOUT, 0), INFO)
    group = await EngineGroup.of([*scripted(1), unwilling])
    with pytest.raises(EngineError, match="not now"):
        await group.pause("keep", 1.0)
    assert len(await group.generate("r", [1], 1, Sampling(max_tokens=2), 0)) == 1


async def test_one_death_ends_the_group() -> None:
    engines = scripted(2)
    group = await EngineGroup.of(engines)
    await engines[1].close()
    assert not group.is_alive
    with pytest.raises(EngineDeadError):
        await group.resume()
    await group.close()
    assert not engines[0].is_alive


async def test_gauges_are_summed_and_shares_averaged() -> None:
    class Measured(ScriptedEngine):
        usage = 0.0

        async def stats(self) -> EngineStats:
            return EngineStats(running=3, waiting=1, generated_tokens=10, extra={"kv_cache_usage": self.usage})

    engines = [Measured(LAYOUT, stored_state.random_parts(LAYOUT, 0), INFO) for _ in range(2)]
    engines[0].usage, engines[1].usage = 0.5, 0.25
    found = await (await EngineGroup.of(engines)).stats()
    assert found == EngineStats(running=6, waiting=2, generated_tokens=20, extra={"kv_cache_usage": 0.375})
