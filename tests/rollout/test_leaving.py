"""Clients that leave, and requests that run out of time, while they wait for something other than tokens."""

import asyncio
from pathlib import Path

import pytest
from tests.helpers.rig import Rig, running

from flashrl_rollout.generation import ClientGoneError
from flashrl_wire.errors import TimedOutError
from flashrl_wire.messages import GenerateRequest, Sampling

pytestmark = pytest.mark.anyio
REQUEST = GenerateRequest(prompts=["hi", "ho"], n=3, sampling=Sampling(max_tokens=100, seed=1))


def is_free(rig: Rig) -> bool:
    gate = rig.parts.gate
    return (gate.active_requests, gate.active_sequences, rig.engine.running_requests) == (0, 0, 0)


async def leaving(rig: Rig, left: asyncio.Event) -> "asyncio.Task[object]":
    """A request at the gate, whose client leaves once `left` is set."""
    asking = asyncio.create_task(rig.parts.generator.generate(REQUEST, left.wait))  # type: ignore[arg-type]
    await rig.until(lambda: rig.parts.gate.active_sequences == 6)
    return asking  # type: ignore[return-value]


async def test_client_that_leaves_while_sampling_is_paused(rig: Rig) -> None:
    await rig.http.post("/pause")
    left = asyncio.Event()
    asking = await leaving(rig, left)
    left.set()
    with pytest.raises(ClientGoneError):
        await asking
    assert is_free(rig)
    await rig.http.post("/resume")
    assert len(await rig.sample()) > 0


async def test_client_that_leaves_during_a_commit(rig: Rig) -> None:
    rig.engine.faults.apply_delay_s = 0.1
    transfer_id = await rig.trainer.staged(rig.delta())
    commit = asyncio.create_task(rig.trainer.commit(transfer_id))
    await rig.until(lambda: rig.parts.gate.is_closed_by("commit"))
    left = asyncio.Event()
    asking = await leaving(rig, left)
    left.set()
    with pytest.raises(ClientGoneError):
        await asking
    assert is_free(rig)
    assert not commit.done()
    assert (await commit).json()["version"] == 1


async def test_running_sequences_whose_client_leaves_in_a_commit_are_not_resumed(tmp_path: Path) -> None:
    async with running(tmp_path, token_s=0.005) as rig:
        left = asyncio.Event()
        asking = await leaving(rig, left)
        await rig.until(lambda: rig.engine.running_requests == 2)
        rig.engine.faults.apply_delay_s = 0.1
        commit = asyncio.create_task(rig.trainer.publish(rig.delta()))
        await rig.until(lambda: rig.parts.gate.is_closed_by("commit"))
        left.set()
        with pytest.raises(ClientGoneError):
            await asking
        assert is_free(rig)
        assert (await commit).json()["version"] == 1


async def test_deadline_counts_the_wait_at_the_gate(tmp_path: Path) -> None:
    async with running(tmp_path, request_timeout_s=0.05, admit_timeout_s=60) as rig:
        await rig.http.post("/pause")
        with pytest.raises(TimedOutError, match=r"0\.05 s"):
            await rig.parts.generator.generate(REQUEST, asyncio.Event().wait)  # type: ignore[arg-type]
        assert is_free(rig)
