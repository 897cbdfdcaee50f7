"""Everything that can be wrong with an update, against one service process that lives through all of it.

After each fault the service serves exactly the old or exactly the new version, and takes the next one. The faults are
in `cases`; the other rows of the matrix are beside this file: killed services and trainers, strangers, tied weights, a
full disk. Uneven shards and ranks without rows are `tests/trainer/test_baseline.py`, a thousand updates in a row
`benchmarks/thousand_updates.py`.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

import httpx
import pytest
import torch
from tests.faults import served
from tests.faults.cases import FAULTS, Case
from tests.faults.served import Stored
from tests.helpers.forked import LIMIT_S, ServiceProgram, free_ports
from tests.helpers.wire_trainer import Wire, WireTrainer

from flashrl_wire.digest import bits

pytestmark = pytest.mark.anyio
BFLOAT_BITS = [0x7FC1, 0xFFC0, 0x8000, 0x0001, 0x8001, 0x007F, 0x7F80, 0xFF80]
"""NaNs with payload and sign, -0.0, the smallest and the largest subnormals, infinities."""


class Survivor:
    """The service of this file, and what it serves."""

    def __init__(self, service: ServiceProgram, ports: list[int]) -> None:
        self.service, self.ports, self.stored = service, ports, served.first()

    def now_serves(self, stored: Stored) -> None:
        """Exactly this, and the next update works."""
        served.assert_serves(self.service, stored)
        self.stored = served.assert_takes_the_next(self.service, stored)


@pytest.fixture(scope="module")
def survivor(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Survivor]:
    ports = free_ports(2)
    log = tmp_path_factory.mktemp("survivor") / "service"
    service = ServiceProgram(log, ports, token_s=0.002, settings={"audit_every": 1})
    while not service.is_ready:
        assert not service.ends_within(0.01), service.errors
    survivor = Survivor(service, ports)
    survivor.stored = served.assert_takes_the_next(service, survivor.stored)  # from now on it follows the run
    yield survivor
    service.kill()
    assert "Traceback" not in service.errors


@pytest.fixture
async def trainer(survivor: Survivor) -> AsyncIterator[WireTrainer]:
    wire = Wire(survivor.ports[1])
    async with httpx.AsyncClient(base_url=survivor.service.url, timeout=LIMIT_S) as http:
        yield WireTrainer(http, wire)
    wire.close()


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
async def test_fault(fault: Callable[[Case], Awaitable[bool]], survivor: Survivor, trainer: WireTrainer) -> None:
    old, new = survivor.stored, survivor.stored.moved()
    case = Case(trainer, survivor.ports[1], old, new, old.delta_to(new))
    assert len(case.update.payloads) > 3
    survivor.now_serves(new if await fault(case) else old)


async def committed(trainer: WireTrainer, old: Stored, new: Stored) -> dict[str, object]:
    reply = await trainer.publish(old.delta_to(new))
    assert reply.status_code == 200, reply.text
    return dict(reply.json())


async def test_values_that_are_no_ordinary_numbers(survivor: Survivor, trainer: WireTrainer) -> None:
    old, new = survivor.stored, survivor.stored.moved()
    patterns = torch.tensor(BFLOAT_BITS, dtype=torch.int32).to(torch.int16)
    bits(new.parts["norm.weight"])[: len(BFLOAT_BITS)] = patterns
    new.parts["layers.0.up.weight_scale"][:2, 0] = torch.tensor([1e-45, -0.0])
    await committed(trainer, old, Stored(new.version, new.parts))
    survivor.now_serves(Stored(new.version, new.parts))


async def test_empty_delta(survivor: Survivor, trainer: WireTrainer) -> None:
    same = Stored(survivor.stored.version + 1, survivor.stored.parts)
    reply = await committed(trainer, survivor.stored, same)
    assert (reply["changed_elements"], reply["wire_bytes"], reply["digest"]) == (0, 0, survivor.stored.digest)
    survivor.now_serves(same)


async def test_delta_of_every_element(survivor: Survivor, trainer: WireTrainer) -> None:
    old = survivor.stored
    new = Stored(old.version + 1, {name: values.clone() for name, values in old.parts.items()})
    for values in new.parts.values():
        bits(values.view(-1)).bitwise_xor_(1)
    reply = await committed(trainer, old, new)
    assert reply["changed_elements"] == sum(values.numel() for values in old.parts.values())
    survivor.now_serves(new)


async def test_commit_while_sequences_run(survivor: Survivor, trainer: WireTrainer) -> None:
    """They go on under the new weights, and every token says under which it was drawn."""
    old, new = survivor.stored, survivor.stored.moved()
    transfer_id = await trainer.staged(old.delta_to(new))
    body = {"prompts": ["a", "b"], "n": 2, "sampling": {"max_tokens": 300, "seed": 1}}
    sampling = asyncio.create_task(trainer.http.post("/generate", json=body))
    async with asyncio.timeout(LIMIT_S):
        while (await trainer.http.get("/status")).json()["load"]["running_sequences"] < 2:
            pass
    await asyncio.sleep(0.02)  # a commit may be over before the first token
    assert (await trainer.commit(transfer_id)).status_code == 200
    results = (await sampling).json()["results"]
    completions = [completion for result in results for completion in result["completions"]]
    spans = [completion["weight_versions"] for completion in completions]
    assert any([span[0] for span in each] == [old.version, new.version] for each in spans), spans
    for completion, each in zip(completions, spans, strict=True):
        assert [0, *(span[2] for span in each)] == [*(span[1] for span in each), len(completion["token_ids"])]
    survivor.now_serves(new)
