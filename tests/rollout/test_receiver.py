"""The receiving thread, from its commands and one socket; test_transfer.py holds what a transfer answers."""

from collections.abc import AsyncIterator

import pytest
from tests.helpers.rig import LAYOUT
from tests.helpers.wire_trainer import Wire, snapshot_update

from flashrl_rollout import stored_state
from flashrl_rollout.receiver import Receiver
from flashrl_rollout.transfer import Transfer
from flashrl_wire.frames import Credit, Failed, Hello

CREDIT = 1000


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    found = Receiver("127.0.0.1", 0)
    yield found
    found.stop()


@pytest.fixture
async def wire(receiver: Receiver) -> AsyncIterator[Wire]:
    found = Wire(receiver.port)
    yield found
    found.close()


def transfer(name: str) -> Transfer:
    parts = stored_state.random_parts(LAYOUT, 0)
    return Transfer(name, snapshot_update(LAYOUT, parts, parts).manifest, CREDIT)


@pytest.mark.anyio
async def test_first_frame_may_arrive_together_with_the_commands_that_open_its_transfer(
    receiver: Receiver, wire: Wire
) -> None:
    """A transfer begun right after an abort: two commands and a Hello are there when the thread looks."""
    receiver.open(transfer("first"), lambda _: None)
    receiver.finish(Failed("first", "aborted", ""))
    receiver.open(transfer("second"), lambda _: None)
    await wire.send(Hello("second"))
    assert receiver._router.poll(10_000)  # its thread does not run yet
    receiver.start()
    assert await wire.receive() == Credit("second", CREDIT, -1)


@pytest.mark.anyio
async def test_transfer_that_was_never_opened_is_unknown(receiver: Receiver, wire: Wire) -> None:
    receiver.start()
    await wire.send(Hello("never"))
    assert await wire.receive() == Failed("never", "unknown_transfer", "no such transfer")
