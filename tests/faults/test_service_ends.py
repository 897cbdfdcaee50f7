"""How a service process ends, and what it leaves behind for the next one on its ports."""

import asyncio
import signal
import time
from pathlib import Path

import httpx
import pytest
from tests.faults.conftest import Start
from tests.helpers.forked import LIMIT_S, ServiceProgram, free_ports
from tests.helpers.wire_trainer import Wire, WireTrainer, delta_update

from flashrl_rollout import stored_state
from flashrl_rollout.scripted_service import scripted_layout
from flashrl_rollout.serving import KEEP_ALIVE_S

pytestmark = pytest.mark.anyio
LAYOUT = scripted_layout()
LONG = {"prompts": ["hi"], "sampling": {"max_tokens": 2000, "seed": 1}}


async def staged(service: ServiceProgram, ports: list[int]) -> tuple[WireTrainer, str]:
    """A trainer of the service, and its staged transfer: one element of the norm changed."""
    old, new = (stored_state.random_parts(LAYOUT, 0) for _ in range(2))
    new["norm.weight"][3] = 7.0
    trainer = WireTrainer(httpx.AsyncClient(base_url=service.url, timeout=LIMIT_S), Wire(ports[1]))
    return trainer, await trainer.staged(delta_update(LAYOUT, old, new))


async def until_active(service: ServiceProgram, count: int) -> None:
    """Return once so many requests are under way."""
    async with asyncio.timeout(LIMIT_S), httpx.AsyncClient(base_url=service.url) as http:
        while f"flashrl_active_requests {count}.0" not in (await http.get("/metrics")).text:  # noqa: ASYNC110
            await asyncio.sleep(0.005)


def folders(tmp_path: Path) -> list[Path]:
    return sorted(path for path in tmp_path.iterdir() if path.is_dir())


async def test_commit_under_way_is_finished_before_the_end(start: Start, tmp_path: Path) -> None:
    ports = free_ports(2)
    service = start(ports, faults={"apply_delay_s": 1.0})
    trainer, transfer_id = await staged(service, ports)
    commit = asyncio.create_task(trainer.commit(transfer_id))
    await asyncio.sleep(0)
    while (await trainer.abort(transfer_id)).json()["error"]["code"] != "update_in_progress":
        pass
    service.signal(signal.SIGTERM)
    reply = await commit
    assert (reply.status_code, reply.json()["version"]) == (200, 1)
    ended = service.wait()
    assert ended.code == 0, ended.errors
    assert folders(tmp_path) == []
    trainer.wire.close()


async def test_killed_in_a_commit_the_next_one_starts_afresh(start: Start, tmp_path: Path) -> None:
    ports = free_ports(2)
    service = start(ports, faults={"apply_delay_s": 60.0})
    trainer, transfer_id = await staged(service, ports)
    commit = asyncio.create_task(trainer.commit(transfer_id))
    await asyncio.sleep(0.05)
    service.kill()
    with pytest.raises(httpx.HTTPError):
        await commit
    trainer.wire.close()
    assert [path.suffix for folder in folders(tmp_path) for path in folder.iterdir()] == [".staged"]
    again = start(ports)
    assert (again.weights()["version"], again.weights()["run_id"]) == (0, None)
    assert [list(folder.iterdir()) for folder in folders(tmp_path)] == [[]]


async def test_engine_that_dies_ends_requests_with_503_and_the_process_with_1(
    start: Start, http: httpx.AsyncClient
) -> None:
    service = start(token_s=0.01, faults={"die_after_requests": 20})
    waiting = [asyncio.create_task(http.post(f"{service.url}/generate", json=LONG)) for _ in range(20)]
    await until_active(service, 20)
    began = time.monotonic()
    waiting.append(asyncio.create_task(http.post(f"{service.url}/generate", json=LONG)))  # one too many
    replies = [await reply for reply in waiting]
    assert {(reply.status_code, reply.json()["error"]["code"]) for reply in replies} == {(503, "not_ready")}
    assert all(int(reply.headers["retry-after"]) > 0 for reply in replies)
    ended = service.wait()
    assert (ended.code, "the engine has died" in ended.errors, "Traceback" in ended.errors) == (1, True, False)
    assert time.monotonic() - began < 30


async def test_terminated_while_crowded_it_answers_everybody(start: Start, http: httpx.AsyncClient) -> None:
    """The grace is over before the samples are: they get 503, as do those that come too late."""
    service = start(token_s=0.05, settings={"shutdown_grace_s": 0.3})
    waiting = [asyncio.create_task(http.post(f"{service.url}/generate", json=LONG)) for _ in range(50)]
    await until_active(service, 50)
    service.signal(signal.SIGTERM)
    replies = [await reply for reply in waiting]
    assert {(reply.status_code, reply.json()["error"]["message"]) for reply in replies} == {
        (503, "the service is stopping")
    }
    assert service.wait().code == 0


async def test_client_gives_an_idle_connection_up_before_the_service_does(http: httpx.AsyncClient) -> None:
    expiry_s = http._transport._pool._keepalive_expiry  # type: ignore[attr-defined]
    assert expiry_s is not None
    assert expiry_s * 2 < KEEP_ALIVE_S


async def test_second_service_on_a_port_does_not_touch_the_first(start: Start) -> None:
    ports, others = free_ports(2), free_ports(2)
    first = start(ports)
    for taken, name in ((ports[0], others[1]), "port"), ((others[0], ports[1]), "weights_port"):
        ended = start(list(taken)).wait()
        assert (ended.code, ended.errors.count("\n")) == (2, 1)
        assert ended.errors.startswith(f"error: {name}: cannot listen on 127.0.0.1:")
    elsewhere = start(ports, settings={"host": "127.0.0.2"}).wait()  # both ports are free there
    assert (elsewhere.code, elsewhere.errors.count("\n")) == (2, 1)
    assert elsewhere.errors.startswith("error: stage_root: another service stages in ")
    trainer, transfer_id = await staged(first, ports)
    assert (await trainer.commit(transfer_id)).status_code == 200
    trainer.wire.close()
