"""The gate: who waits, who is let in under which version, who is turned away."""

import asyncio

import pytest

from flashrl_rollout.versions import VersionGate
from flashrl_wire.errors import NotReadyError, QueueFullError, TooLargeError, VersionNotReachedError

pytestmark = pytest.mark.anyio


async def enter(gate: VersionGate, num_sequences: int = 1, min_version: int = 0) -> int:
    async with gate.admitted(num_sequences, min_version) as version:
        return version


async def test_closed_gate_opens_when_its_last_reason_is_gone() -> None:
    gate = VersionGate(10, 5.0)
    gate.close("commit")
    gate.close("pause")
    waiting = asyncio.create_task(enter(gate))
    await asyncio.sleep(0)
    gate.open("commit")
    await asyncio.sleep(0)
    assert not waiting.done()
    gate.version = 4
    gate.open("pause")
    assert await waiting == 4


async def test_gate_that_closes_again_at_once_lets_nobody_slip_through() -> None:
    gate = VersionGate(10, 5.0)
    gate.close("commit")
    waiting = asyncio.create_task(enter(gate))
    await asyncio.sleep(0)
    gate.open("commit")
    gate.close("commit")
    for _ in range(3):
        await asyncio.sleep(0)
    assert not waiting.done()
    gate.open("commit")
    assert await waiting == 0


async def test_waiting_has_a_limit_that_names_the_reason() -> None:
    gate = VersionGate(10, 0.01)
    gate.close("pause")
    with pytest.raises(NotReadyError, match=r"0\.01 s: pause"):
        await enter(gate)
    assert (gate.active_requests, gate.active_sequences) == (0, 0)


async def test_waiting_requests_count_against_the_queue() -> None:
    gate = VersionGate(3, 5.0)
    gate.close("commit")
    waiting = asyncio.create_task(enter(gate, 2))
    await asyncio.sleep(0)
    with pytest.raises(QueueFullError, match="2 sequences run or wait, the limit is 3"):
        await enter(gate, 2)
    with pytest.raises(TooLargeError):
        await enter(gate, 4)
    gate.open("commit")
    await waiting
    assert await enter(gate, 3) == 0


async def test_version_is_judged_after_the_wait() -> None:
    gate = VersionGate(3, 5.0)
    with pytest.raises(VersionNotReachedError) as error:
        await enter(gate, min_version=1)
    assert error.value.facts == {"version": 0}
    gate.close("commit")
    waiting = asyncio.create_task(enter(gate, min_version=1))
    await asyncio.sleep(0)
    gate.version = 1
    gate.open("commit")
    assert await waiting == 1


async def test_fence_turns_everybody_away_until_it_is_lifted() -> None:
    gate = VersionGate(3, 5.0)
    gate.close("commit")
    waiting = asyncio.create_task(enter(gate))
    await asyncio.sleep(0)
    gate.fence(NotReadyError("poisoned", poisoned=True))
    await asyncio.wait_for(gate.fenced(), 1)
    for blocked in (waiting, enter(gate)):
        with pytest.raises(NotReadyError, match="poisoned"):
            await blocked
    gate.open("commit")
    gate.unfence()
    assert await enter(gate) == 0


async def test_idle_waits_for_the_last_request() -> None:
    gate = VersionGate(3, 5.0)
    await asyncio.wait_for(gate.idle(), 1)
    async with gate.admitted(1):
        idle = asyncio.create_task(gate.idle())
        await asyncio.sleep(0)
        assert not idle.done()
    await asyncio.wait_for(idle, 1)
