"""Updates of a real engine: exact, reversible, all or nothing."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.helpers.real_engine import (
    GREEDY,
    PROMPTS,
    Checkpoints,
    LoopThread,
    delta,
    greedy,
    load,
    save_like,
    walk,
)

from flashrl_rollout import stored_state
from flashrl_rollout.engine import Engine, EngineError
from flashrl_rollout.staged import write_staged
from flashrl_wire.delta import Change
from flashrl_wire.digest import PartDigest

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1200)]


def _engine(request: pytest.FixtureRequest, quantization: str) -> Engine:
    engine: Engine = request.getfixturevalue(f"{quantization}_engine")
    return engine


@pytest.mark.parametrize("quantization", ["int8", "none"])
def test_deltas_lead_where_a_fresh_start_does(
    request: pytest.FixtureRequest,
    quantization: str,
    loop: LoopThread,
    checkpoints: Checkpoints,
    fresh: dict[str, Any],
    tmp_path: Path,
) -> None:
    engine = _engine(request, quantization)
    folders = [checkpoints.first, checkpoints.second, checkpoints.third]
    first, second, third = loop.run(walk(engine, folders, tmp_path))
    loop.run(load(engine, checkpoints.first, 3))
    assert [first["digests_agree"], second["digests_agree"], third["digests_agree"]] == [True] * 3
    assert [[tokens, logprobs] for tokens, logprobs in third["greedy"]] == fresh[quantization]
    tokens = [[found for found, _ in step["greedy"]] for step in (first, second, third)]
    assert tokens[0] != tokens[2]
    assert first["greedy"] != second["greedy"] != third["greedy"]
    assert loop.run(greedy(engine)) == first["greedy"]


def test_quantizations_differ(fresh: dict[str, Any]) -> None:
    assert fresh["int8"] != fresh["none"] != fresh["fp8"] != fresh["int8"]


def test_revert_gives_back_output_and_digests(
    int8_engine: Engine, loop: LoopThread, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    async def there_and_back() -> None:
        layout = await int8_engine.layout()
        before, digests = await greedy(int8_engine), await int8_engine.digests()
        old, new = (stored_state.read_parts(folder, layout) for folder in (checkpoints.first, checkpoints.third))
        await int8_engine.pause("keep", 30)
        await int8_engine.apply(delta(layout, old, new, tmp_path / "staged"))
        assert await int8_engine.digests() == stored_state.digests(new)
        await int8_engine.revert()
        assert await int8_engine.digests() == digests
        await int8_engine.resume()
        assert await greedy(int8_engine) == before

    loop.run(there_and_back())


def test_an_idle_engine_is_paused_before_it_has_said_so(
    int8_engine: Engine, loop: LoopThread, checkpoints: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is asked of it afterwards finds it at rest, and what it says is read in the end, good or bad."""
    core: Any = int8_engine._llm.engine_core  # type: ignore[attr-defined]
    pause_scheduler = core.pause_scheduler_async

    async def paused_unheard(answer: asyncio.Future[None]) -> None:
        async def slow(**options: Any) -> None:
            await pause_scheduler(**options)
            await answer

        with monkeypatch.context() as patched:
            patched.setattr(core, "pause_scheduler_async", slow)
            await int8_engine.pause("keep", 30)
        assert await core.is_scheduler_paused_async()

    async def updated_unheard() -> None:
        layout = await int8_engine.layout()
        await load(int8_engine, checkpoints.first, 15)
        old, new = (stored_state.read_parts(folder, layout) for folder in (checkpoints.first, checkpoints.third))
        answer = asyncio.get_running_loop().create_future()
        await paused_unheard(answer)
        waiting = asyncio.create_task(int8_engine.generate("waiting", PROMPTS[0], 1, GREEDY, 0))
        await int8_engine.apply(delta(layout, old, new, tmp_path / "staged"))
        adopting = asyncio.create_task(int8_engine.adopt(16))
        assert await int8_engine.digests() == stored_state.digests(new)
        assert not waiting.done()
        assert not adopting.done()
        answer.set_result(None)
        await adopting
        await int8_engine.resume()
        (completion,) = await waiting
        assert {version for version, _, _ in completion.weight_versions} == {16}
        await int8_engine.keep()

    async def failed_unheard() -> None:
        answer = asyncio.get_running_loop().create_future()
        await paused_unheard(answer)
        answer.set_exception(RuntimeError("no pause"))
        with pytest.raises(EngineError, match="no pause"):
            await int8_engine.adopt(17)
        await int8_engine.revert()
        await int8_engine.resume()
        await load(int8_engine, checkpoints.first, 18)

    loop.run(updated_unheard())
    loop.run(failed_unheard())


def test_what_was_prepared_for_other_weights_is_made_anew(
    int8_engine: Engine, loop: LoopThread, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    """A checkpoint in between has changed the old values that were read: what is reported must be true of the new."""

    async def prepared_too_early() -> None:
        layout = await int8_engine.layout()
        old, new = (stored_state.read_parts(folder, layout) for folder in (checkpoints.first, checkpoints.third))
        update = delta(layout, old, new, tmp_path / "staged")
        await int8_engine.prepare(update)
        await load(int8_engine, checkpoints.second, 11)
        before = await int8_engine.digests()
        await int8_engine.pause("keep", 30)
        shifts = await int8_engine.apply(update)
        expected = {name: value + shifts.get(name, PartDigest()) for name, value in before.items()}
        assert await int8_engine.digests() == expected
        await int8_engine.revert()
        assert await int8_engine.digests() == before
        await int8_engine.resume()
        await load(int8_engine, checkpoints.first, 12)

    loop.run(prepared_too_early())


@pytest.mark.parametrize("raises", [False, True])
def test_a_cache_that_is_not_forgotten_leaves_version_and_weights(
    int8_engine: Engine,
    loop: LoopThread,
    checkpoints: Checkpoints,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    raises: bool,
) -> None:
    core: Any = int8_engine._llm.engine_core  # type: ignore[attr-defined]

    async def refused(**_: bool) -> bool:
        if raises:
            raise RuntimeError("did not forget")
        return False

    async def adopted_in_vain() -> None:
        layout = await int8_engine.layout()
        await load(int8_engine, checkpoints.first, 13)
        before = await greedy(int8_engine)
        old, new = (stored_state.read_parts(folder, layout) for folder in (checkpoints.first, checkpoints.third))
        await int8_engine.pause("keep", 30)
        await int8_engine.apply(delta(layout, old, new, tmp_path / "staged"))
        with monkeypatch.context() as patched:
            patched.setattr(core, "reset_prefix_cache_async", refused)
            with pytest.raises(EngineError, match="did not forget"):
                await int8_engine.adopt(14)
        await int8_engine.revert()
        await int8_engine.resume()
        assert await greedy(int8_engine) == before
        (completion,) = await int8_engine.generate("after", PROMPTS[0], 1, GREEDY, 0)
        assert {version for version, _, _ in completion.weight_versions} == {13}

    loop.run(adopted_in_vain())


def test_a_checkpoint_of_another_shape_changes_nothing(
    int8_engine: Engine, loop: LoopThread, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    tensors = load_file(checkpoints.third / "model.safetensors")
    last = max(name for name in tensors if name.endswith("norm.weight"))
    wrong = save_like(checkpoints.first, tmp_path / "wrong", tensors | {last: tensors[last][:-1].clone()})
    nan = save_like(checkpoints.first, tmp_path / "nan", tensors | _with_nan(tensors))
    digests = loop.run(int8_engine.digests())
    for folder, message in ((wrong, f"{last} is .* the model's"), (nan, "NaN"), (tmp_path, "neither")):
        with pytest.raises(EngineError, match=message):
            loop.run(load(int8_engine, folder, 9))
        loop.run(int8_engine.resume())
        assert loop.run(int8_engine.digests()) == digests
    (completion,) = loop.run(int8_engine.generate("after", PROMPTS[0], 1, GREEDY, 0))
    assert {version for version, _, _ in completion.weight_versions} != {9}


def _with_nan(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    name = max(name for name in tensors if name.endswith("up_proj.weight"))
    broken = tensors[name].clone()
    broken[0, 0] = float("nan")
    return {name: broken}


def test_a_head_that_differs_from_the_tied_embedding_changes_nothing(
    int8_engine: Engine, loop: LoopThread, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    tensors = load_file(checkpoints.first / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    equal = save_like(checkpoints.first, tmp_path / "equal", tensors | {"lm_head.weight": embedding.clone()})
    other = save_like(checkpoints.first, tmp_path / "other", tensors | {"lm_head.weight": embedding * 2})
    digests = loop.run(int8_engine.digests())
    with pytest.raises(EngineError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
        loop.run(load(int8_engine, other, 9))
    loop.run(int8_engine.resume())
    assert loop.run(int8_engine.digests()) == digests
    assert set(loop.run(load(int8_engine, equal, 11)).values()) == {PartDigest()}


def test_a_staged_update_that_does_not_fit_is_undone(int8_engine: Engine, loop: LoopThread, tmp_path: Path) -> None:
    digests = loop.run(int8_engine.digests())
    norm = next(name for name in sorted(digests) if name.endswith("norm.weight"))
    good = Change(norm, torch.full((3,), 9.0, dtype=torch.bfloat16))
    bad = Change("model.no_such.weight", torch.zeros(1, dtype=torch.bfloat16))
    update = write_staged(tmp_path / "staged", [good, bad])
    with pytest.raises(EngineError, match=r"model\.no_such\.weight is no part of this model; the old weights are in"):
        loop.run(int8_engine.apply(update))
    loop.run(int8_engine.prepare(update))  # says nothing: it is the write that does
    with pytest.raises(EngineError, match=r"model\.no_such\.weight is no part of this model"):
        loop.run(int8_engine.apply(update))
    with pytest.raises(EngineError, match="No such file"):
        loop.run(int8_engine.apply(update.model_copy(update={"path": str(tmp_path / "gone")})))
    assert loop.run(int8_engine.digests()) == digests
    assert int8_engine.is_alive


def test_the_same_state_again_shifts_nothing(int8_engine: Engine, loop: LoopThread, checkpoints: Checkpoints) -> None:
    shifts = loop.run(load(int8_engine, checkpoints.first, 12))
    assert set(shifts.values()) == {PartDigest()}
    assert shifts.keys() == loop.run(int8_engine.digests()).keys()
