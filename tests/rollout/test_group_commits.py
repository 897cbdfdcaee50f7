"""Commits to a service of several engines, one of which fails: the old weights are on all, or nothing is served."""

import asyncio
from pathlib import Path

import pytest
from tests.helpers.rig import Rig, running

from flashrl_rollout import stored_state

pytestmark = pytest.mark.anyio

TWO_PROMPTS = {"prompts": ["a", "b"], "n": 2}


def digests(rig: Rig) -> list[object]:
    return [stored_state.digests(engine.parts) for engine in rig.engines]


async def sample(rig: Rig) -> list[list[int]]:
    """Seeded tokens of two prompts: each engine answers one."""
    body = {**TWO_PROMPTS, "sampling": {"seed": 3, "max_tokens": 8}}
    reply = await rig.http.post("/generate", json=body)
    assert reply.status_code == 200, reply.text
    return [completion["token_ids"] for result in reply.json()["results"] for completion in result["completions"]]


@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize("fault", ["fail_apply", "corrupt_write", "fail_adopt"])
async def test_an_update_that_one_engine_refuses_leaves_all_as_they_were(
    fault: str, failing: int, tmp_path: Path
) -> None:
    async with running(tmp_path, engines=2) as rig:
        weights, tokens = digests(rig), await sample(rig)
        setattr(rig.engines[failing].faults, fault, True)
        reply = await rig.trainer.publish(rig.delta())
        assert (reply.status_code, reply.json()["error"]["code"]) == (500, "engine_failed")
        assert (digests(rig), rig.version, await sample(rig)) == (weights, 0, tokens)
        setattr(rig.engines[failing].faults, fault, False)
        assert (await rig.trainer.publish(rig.delta())).status_code == 200
        assert digests(rig)[0] == digests(rig)[1] != weights[0]


async def test_a_wrong_digest_is_undone_on_all(tmp_path: Path) -> None:
    async with running(tmp_path, engines=2) as rig:
        weights = digests(rig)
        reply = await rig.trainer.publish(rig.delta().declaring(digest="f" * 32))
        assert (reply.status_code, reply.json()["error"]["code"]) == (422, "digest_mismatch")
        assert (digests(rig), rig.version) == (weights, 0)


async def test_a_snapshot_heals_engines_that_have_come_apart(tmp_path: Path) -> None:
    faults = ("fail_adopt", "fail_revert")
    async with running(tmp_path, engines=2) as rig:
        for fault in faults:
            setattr(rig.engines[1].faults, fault, True)
        reply = await rig.trainer.publish(rig.delta())
        assert (reply.status_code, reply.json()["error"]["poisoned"]) == (503, True)
        assert (await rig.http.post("/generate", json=TWO_PROMPTS)).status_code == 503
        for fault in faults:
            setattr(rig.engines[1].faults, fault, False)
        new = rig.state(5)
        assert (await rig.trainer.publish(rig.snapshot(new))).status_code == 200
        assert digests(rig) == [stored_state.digests(new)] * 2
        assert (await rig.http.get("/ready")).json() == {"ready": True, "version": 1}
        assert len(await sample(rig)) == 4


async def test_an_audit_finds_an_engine_that_holds_other_weights(tmp_path: Path) -> None:
    async with running(tmp_path, engines=2, audit_every=1) as rig:
        rig.engines[1].faults.corrupt_untouched = True
        assert (await rig.trainer.publish(rig.delta())).status_code == 200
        await asyncio.wait_for(rig.parts.gate.fenced(), 10)
        assert (await rig.http.get("/ready")).json()["error"]["poisoned"] is True
        assert 'result="audit_failed"} 1.0' in (await rig.http.get("/metrics")).text


async def test_sequences_of_all_engines_go_on_under_the_new_weights(tmp_path: Path) -> None:
    async with running(tmp_path, engines=2, token_s=0.005) as rig:
        body = {**TWO_PROMPTS, "n": 1, "sampling": {"max_tokens": 100, "seed": 3}}
        waiting = asyncio.create_task(rig.http.post("/generate", json=body))
        await rig.until(lambda: all(engine.generated_tokens > 0 for engine in rig.engines))
        assert (await rig.trainer.publish(rig.delta())).status_code == 200
        for result in (await waiting).json()["results"]:
            (completion,) = result["completions"]
            (first, start, middle), (second, middle_again, end) = completion["weight_versions"]
            assert (first, start, second, end) == (0, 0, 1, 100)
            assert 0 < middle == middle_again


async def test_pause_holds_all_engines_until_resume(tmp_path: Path) -> None:
    async with running(tmp_path, engines=2) as rig:
        assert (await rig.http.post("/pause")).json() == {"paused": True}
        waiting = asyncio.create_task(sample(rig))
        for _ in range(20):
            await asyncio.sleep(0)
        assert [engine.generated_tokens for engine in rig.engines] == [0, 0]
        await rig.http.post("/resume")
        assert len(await waiting) == 4
        assert [engine.generated_tokens for engine in rig.engines] == [16, 16]
